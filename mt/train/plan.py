"""What a run would take: compiled for its mesh, on devices that do not exist.

  python train.py --config=configs/….py --plan

The train step is compiled ahead of time for as many virtual devices as the mesh
has, from shapes alone; nothing is read, downloaded or computed. XLA's compiler
for CPUs stands in for those of accelerators: it partitions as they do, but has
no bfloat16, so that activations and what is sent count up to twice.

Each run asks for less, by arithmetic on shapes: whether a step can fit at all,
before anything is read or compiled (`check_memory`).
"""

import dataclasses
import math
import pathlib
import re
import time

import jax
from jax.extend import backend
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import psutil

from mt.base import errors
from mt.base import journal
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import hlo
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import settings
from mt.train import state as state_lib
from mt.train import step

ACCELERATORS = (16, 24, 40, 80, 96, 141)  # GB of memory, 10^9 bytes each.
# On a CPU, products want float32: weights kept in bfloat16 would be converted,
# all layers at once, before the loop over the layers. No accelerator does that.
_COMPILER = {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}
_USABLE = 0.92  # The rest is the runtime's, and lost between arrays.
# Share of the tokens in a packed row that are targets: 21,405 of 40,372 in the
# bundled sample. It decides how often the loop over the vocabulary runs.
_TARGET_SHARE = 0.5
_CGROUPS = (  # (limit, in use), of version 2 and 1.
  ('memory.max', 'memory.current'),
  ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one training step; bytes are of the device that has most."""

  devices: int
  parameters: int  # Bytes, as the next ones.
  gradients: int
  optimizer: int  # With EMA.
  activations: int  # All else that the compiled program holds at its peak.
  total: int
  flops: float  # Of all devices together.
  targets: int  # Target tokens.
  ideal: float  # 6 * active parameters: operations per target token.
  sent: float  # Bytes that each device receives in collectives.
  seconds: float  # Of compiling.


def run(config: ml_collections.ConfigDict) -> Plan:
  """Prints what training with `config` would take."""
  settings.check(config)
  use_virtual_devices(config.mesh)
  plan = make_plan(machine.choose(config))
  journal.say(describe(plan))
  return plan


def use_virtual_devices(mesh: ml_collections.ConfigDict) -> None:
  """As many CPU devices as the mesh has; before anything asks for devices.

  With a -1 in it they are those of this machine.
  """
  shape = [mesh[axis] for axis in sharding.MESH_AXES]
  number = math.prod(shape)
  if -1 in shape:
    number = len(jax.devices())
    backend.clear_backends()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', number)


def model_size(weights: ml_collections.ConfigDict) -> sizes.ModelConfig:
  """The model's shape without a look at its weights."""
  source = weights.source.lower()
  if source == 'random' or weights.size != 'debug':
    return sizes.SIZES[weights.size]
  # gemma3-270m, gemma-3-4b, gemma2-2b-it, gemma/flax/2b …
  found = re.search(r'gemma-?(\d)?\D*?(\d+(?:m|b))(?![a-z0-9])', source)
  name = f'gemma{found[1] or 1}_{found[2]}' if found else ''
  if name not in sizes.SIZES:
    raise errors.UserError(
      f'--plan: weights.source={weights.source!r} does not tell the size of '
      f'the model; set weights.size to one of {", ".join(sizes.SIZES)}.'
    )
  return sizes.SIZES[name]


def abstract_state(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> state_lib.TrainState:
  """The state's shapes, dtypes and places; no array."""
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)

  def init():
    key = jax.random.key(0)
    params = parameters.init(cfg, key)
    return state_lib.init_state(cfg, params, config, optimizer, key)

  state = jax.eval_shape(init)
  if mesh is None:
    return state
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    sharding.of_tree(cfg, mesh, state),
  )


def abstract_batch(
  config: ml_collections.ConfigDict, mesh: Mesh | None
) -> step.Batch:
  """A batch's shapes, dtypes and places."""
  shape = config.train.batch_size, config.data.length
  place = None if mesh is None else sharding.of_rows(mesh)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
  mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=place)
  names = ('tokens', 'positions', 'segment_ids')
  return dict.fromkeys(names, ids) | {'target_mask': mask}


def bytes_of(tree) -> int:
  """Of a tree of shapes, on the fullest device: its shards are the first."""

  def of(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(of, jax.tree.leaves(tree)))


def _row_shards(mesh):
  """Groups of devices that have rows of their own."""
  return 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Compiles the train step of `config` for its mesh."""
  cfg = model_size(config.weights)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_rows(mesh, config.train.batch_size, config.train.micro_batches)
  state = abstract_state(cfg, config, mesh)
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  start = time.monotonic()
  train_step = step.make_train_step(cfg, config, optimizer, mesh)
  compiled = train_step.lower(state, abstract_batch(config, mesh)).compile(
    _COMPILER
  )
  seconds = time.monotonic() - start
  targets = int(config.train.batch_size * config.data.length * _TARGET_SHARE)
  at_once = config.train.micro_batches * config.train.loss_chunk
  chunks = -(-targets // (_row_shards(mesh) * at_once))
  cost = hlo.cost(compiled.as_text(), unknown_trips=chunks)
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  held += memory.output_size_in_bytes - memory.alias_size_in_bytes
  kept = bytes_of((state.trained, state.frozen))
  gradients = bytes_of(state.trained)
  rest = bytes_of((state.opt_state, state.ema))
  devices = 1 if mesh is None else mesh.size
  shapes = jax.eval_shape(lambda: parameters.init(cfg, jax.random.key(0)))
  return Plan(
    devices=devices,
    parameters=kept,
    gradients=gradients,
    optimizer=rest,
    activations=max(0, held - kept - gradients - rest),
    total=max(held, kept + gradients + rest),
    flops=cost.flops * devices,
    targets=targets,
    ideal=6.0 * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
    sent=cost.sent,
    seconds=seconds,
  )


def describe(plan: Plan) -> str:
  """The plan for a person: memory, work, traffic, and what it fits."""
  lines = [f'for each of {plan.devices} devices:']
  for name in ('parameters', 'gradients', 'optimizer', 'activations', 'total'):
    lines.append(f'  {name:12} {getattr(plan, name) / 1e9:9.3f} GB')
  per_target = plan.flops / plan.targets
  lines += [
    f'work: {per_target:.3g} FLOPs per target token (half of the tokens being '
    f'targets), {per_target / plan.ideal:.2f} times the ideal of 6 x active '
    f'parameters = {plan.ideal:.3g}',
    f'collectives: {plan.sent / 1e9:.3f} GB per device and step',
  ]
  for size in ACCELERATORS:
    fits = plan.total <= size * _USABLE * 1e9
    lines.append(f'  {size:4} GB: {"fits" if fits else "too small"}')
  lines.append(f'compiled in {plan.seconds:.0f} s')
  return '\n'.join(lines)


def available(root: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Bytes that a device of this process can still give.

  `root` is where Linux tells the limits of this process's control group.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    return stats.get('bytes_limit', 1 << 62) - stats.get('bytes_in_use', 0)
  free = psutil.virtual_memory().available
  for names in _CGROUPS:
    try:
      limit, used = (int((root / name).read_text()) for name in names)
    except (OSError, ValueError):  # There is none, or it is 'max'.
      continue
    free = min(free, limit - used)
  return free // len(jax.local_devices())  # They share it.


def needed(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> int:
  """Bytes on one device: state, gradients, and what the backward pass reads.

  Of the latter only what no compiler can leave out: the input of each layer
  and, without `train.remat`, what the products with weights read. With a
  pattern in `train.parts` that may be nothing.
  """
  train = config.train
  state = abstract_state(cfg, config, mesh)
  total = bytes_of(state) + bytes_of(state.trained)
  if train.parts not in ('all', 'blocks', 'lora'):
    return total
  rows = train.batch_size // train.micro_batches // _row_shards(mesh)
  width = cfg.embed_dim
  if train.remat != 'full':
    width += cfg.embed_dim + cfg.num_heads * cfg.head_dim + cfg.hidden_dim
  item = 2 if train.dtype == 'bfloat16' else 4
  return total + rows * config.data.length * cfg.num_layers * width * item


def check_memory(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> None:
  """Refuses a config that cannot fit, with the three knobs that save most."""
  need, free = needed(cfg, config, mesh), available()
  if need <= free:
    return
  saved = []
  for knob, value in (
    ('train.micro_batches', config.train.batch_size // _row_shards(mesh)),
    ('train.remat', 'full'),
    ('train.parts', 'lora'),
    ('optim.name', 'adafactor'),
    ('train.frozen_dtype', 'bfloat16'),
  ):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({knob: value})
    less = need - needed(cfg, other, mesh)
    if less > 0:
      saved.append((less, f'{knob}={value} (saves {_size(less)})'))
  ways = [text for _, text in sorted(saved, reverse=True)[:3]]
  raise errors.UserError(
    f'a step needs {_size(need)} of memory at the least, and {_size(free)} are '
    f'free; {" or ".join(ways) or "a smaller weights.size"} would help, and so '
    'would a smaller train.batch_size or data.length.'
  )


def _size(number):
  return f'{number / 1e9:,.1f} GB'
