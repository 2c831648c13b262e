"""What a run would take: compiled for its mesh, on devices that do not exist.

  python train.py --config=configs/….py --plan

The train step is compiled ahead of time for as many virtual devices as the mesh
has, from shapes alone; nothing is read, downloaded or computed. XLA's compiler
for CPUs stands in for those of accelerators: it partitions as they do, but has
no bfloat16, so that activations and what is sent count up to twice.
"""

import dataclasses
import re
import time
from typing import Any

import chex
import jax
from jax.extend import backend
import jax.numpy as jnp
import ml_collections
import numpy as np

from mt.base import errors
from mt.base import journal
from mt.gemma import model
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import hlo
from mt.train import optimizer as optimizer_lib
from mt.train import settings
from mt.train import step

ACCELERATORS = (16, 24, 40, 80, 96, 141)  # GB of memory, 10^9 bytes each.
# On a CPU, products want float32: weights kept in bfloat16 would be converted,
# all layers at once, before the loop over the layers. No accelerator does that.
_COMPILER = {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}
_USABLE = 0.92  # The rest is the runtime's, and lost between arrays.
# Share of the tokens in a packed row that are targets: 21,405 of 40,372 in the
# bundled sample. It decides how often the loop over the vocabulary runs.
_TARGET_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one training step; bytes are of the device that has most.

  Attributes:
    devices: in the mesh.
    parameters, gradients, optimizer: bytes, EMA under optimizer.
    activations: bytes, all else that the compiled program holds at its peak.
    total: bytes, their sum.
    flops: of all devices together.
    targets: target tokens in a step.
    ideal: 6 * active parameters, floating-point operations per target token.
    sent: bytes that each device receives in collectives.
    seconds: of compiling.
  """

  devices: int
  parameters: int
  gradients: int
  optimizer: int
  activations: int
  total: int
  flops: float
  targets: int
  ideal: float
  sent: float
  seconds: float


def model_size(weights: ml_collections.ConfigDict) -> sizes.ModelConfig:
  """The model's shape without a look at its weights.

  Raises:
    errors.UserError: the source does not tell it and weights.size neither.
  """
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
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Any
) -> step.TrainState:
  """The state's shapes, dtypes and places; no array."""
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)

  def init():
    params = model.init_params(cfg, jax.random.key(0))
    return step.init_state(cfg, params, config, optimizer, jax.random.key(0))

  state = jax.eval_shape(init)
  if mesh is None:
    return state
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    sharding.of_tree(cfg, mesh, state),
  )


def abstract_batch(config: ml_collections.ConfigDict, mesh: Any) -> step.Batch:
  """A batch's shapes, dtypes and places."""
  shape = config.train.batch_size, config.data.length
  place = None if mesh is None else sharding.of_rows(mesh)
  dtypes = dict.fromkeys(('tokens', 'positions', 'segment_ids'), jnp.int32)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for name, dtype in (dtypes | {'target_mask': jnp.bool_}).items()
  }


def bytes_of(tree) -> int:
  """Of a tree of shapes, on the fullest device: its shards are the first."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    total += int(np.prod(shape)) * x.dtype.itemsize
  return total


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Compiles the train step of `config` for its mesh."""
  cfg = model_size(config.weights)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_rows(mesh, config.train.batch_size, config.train.micro_batches)
  state = abstract_state(cfg, config, mesh)
  batch = abstract_batch(config, mesh)
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  start = time.monotonic()
  train_step = step.make_train_step(cfg, config, optimizer, mesh)
  compiled = train_step.lower(state, batch).compile(_COMPILER)
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  devices = 1 if mesh is None else mesh.size
  places = config.train.batch_size * config.data.length
  targets = int(places * _TARGET_SHARE)
  shards = 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']
  chunks = -(
    -targets // (shards * config.train.micro_batches * config.train.loss_chunk)
  )
  cost = hlo.cost(compiled.as_text(), unknown_trips=chunks)
  gradients = bytes_of(state.trained)
  active = sum(
    int(np.prod(s))
    for s in jax.tree.leaves(
      model.param_shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)
    )
  )
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  held += memory.output_size_in_bytes - memory.alias_size_in_bytes
  rest = bytes_of((state.opt_state, state.ema))
  parameters = bytes_of((state.trained, state.frozen))
  return Plan(
    devices=devices,
    parameters=parameters,
    gradients=gradients,
    optimizer=rest,
    activations=max(0, held - parameters - gradients - rest),
    total=max(held, parameters + gradients + rest),
    flops=cost.flops * devices,
    targets=targets,
    ideal=6.0 * active,
    sent=cost.sent,
    seconds=seconds,
  )


def describe(plan: Plan) -> str:
  """The plan for a person: memory, work, traffic, and what it fits."""
  chex.assert_scalar_positive(plan.total)
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


def use_virtual_devices(mesh: ml_collections.ConfigDict) -> None:
  """As many CPU devices as the mesh has; before anything asks for devices.

  With a -1 in it they are those of this machine.
  """
  shape = [mesh[axis] for axis in sharding.MESH_AXES]
  number = int(np.prod(shape))
  if -1 in shape:
    number = len(jax.devices())
    backend.clear_backends()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', number)


def run(config: ml_collections.ConfigDict) -> Plan:
  """Prints what training with `config` would take.

  Raises:
    errors.UserError: the config is impossible, or its model unknown.
  """
  settings.check(config)
  use_virtual_devices(config.mesh)
  plan = make_plan(config)
  journal.say(describe(plan))
  return plan
