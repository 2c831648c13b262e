"""The programs of a run, compiled from shapes alone: nothing is computed.

  train_step      and the next one, as the loop calls them
  eval_step
  decode_weights  folds low-rank products in, and makes the decoder's weights
  prefill         reads a group of prompts
  insert          puts it into the batch that is decoded
  resize          moves that into one of half the cache slots
  decode_step     all that a token of each row takes, in a loop

All have the widest shapes that the run may use.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import SingleDeviceSharding
import ml_collections

from mt.base import errors
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import optimizer as optimizer_lib
from mt.train import roofline
from mt.train import state as state_lib
from mt.train import step
from mt.train import targets
from mt.translate import batching
from mt.translate import decode as decode_lib
from mt.translate import search as search_lib

TRAINING = ('train_step', 'eval_step')
DECODING = ('decode_weights', 'prefill', 'insert', 'resize', 'decode_step')

# On a CPU, products want float32: weights kept in bfloat16 would be converted,
# all layers at once, before the loop over the layers. No accelerator does that.
_FOR_CPU = {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}
# Share of the tokens in a packed row that are targets: 21,405 of 40,372 in the
# bundled sample. It decides how often the loop over the vocabulary runs.
_TARGET_SHARE = 0.5
# As many as Gemma 3 has: EOS, and the pieces that are newlines.
_STOP_IDS = (1, *range(107, 138))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program; bytes are of the device that has most.

  Attributes:
    name: of TRAINING or DECODING.
    bytes: by kind, and `total`. What is on the device beside the program while
      it runs is counted too; `temporary` is all else that the compiler takes.
    kernels: see roofline.kernels; [] where the compiler gave up for want of
      memory.
    compile_seconds: of tracing and compiling.
  """

  name: str
  bytes: dict[str, int]
  kernels: list[roofline.Kernel]
  compile_seconds: float


def model_size(weights: ml_collections.ConfigDict) -> sizes.ModelConfig:
  """The model's shape without a look at its weights."""
  source = weights.source.lower()
  if source == 'random' or weights.size != 'debug':
    return sizes.SIZES[weights.size]
  # gemma3-270m, gemma-3-4b, gemma/flax/2b, gemma-1.1-2b-it, translategemma-4b …
  pattern = r'gemma-?(\d(?!\d))?\D*?(?:1\.1-)?(e?\d+[mb])(?![a-z0-9])'
  found, unsaid = re.search(pattern, source), 1
  if 'translategemma' in source:
    unsaid = 3
  name = f'gemma{found[1] or unsaid}_{found[2]}' if found else ''
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
  return _placed(state, sharding.of_tree(cfg, mesh, state))


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


def _placed(tree, places):
  """Shapes at these places: one for all, or a tree of them."""
  if isinstance(places, jax.sharding.Sharding):
    places = jax.tree.map(lambda _: places, tree)
  return jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    tree,
    places,
  )


def bytes_of(tree) -> int:
  """Of a tree of shapes, on the fullest device: its shards are the first."""

  def of(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(of, jax.tree.leaves(tree)))


def decode_shapes(
  settings: batching.Settings, config: ml_collections.ConfigDict
) -> tuple[tuple[int, int], tuple[int, int]]:
  """The largest batch, (sentences, cache slots), and group, (prompts, tokens).

  Of all that prompts of up to data.length tokens can lead to, see batching.py.
  """
  decode = config.decode

  def slots(tokens):
    limit = int(decode.max_ratio * tokens) + decode.max_extra
    need = batching.Prompt(range(tokens), limit).slots(settings.search.width)
    return batching.bucket(need, batching.SMALLEST_SLOTS)

  batches, groups = set(), set()
  for tokens in range(1, config.data.length + 1):
    rows = settings.most_rows(slots(tokens))
    batches.add((rows, slots(tokens)))
    groups.add((max(1, rows // 4), batching.bucket(tokens - 1)))
  return max(batches, key=math.prod), max(groups, key=math.prod)


@dataclasses.dataclass(frozen=True)
class _Run:
  """What all programs of a run have in common."""

  config: ml_collections.ConfigDict
  target: targets.Target
  cfg: sizes.ModelConfig
  mesh: Mesh | None
  state: state_lib.TrainState  # Of shapes.

  def at_home(self, tree):
    """Shapes on the one device, where there is no mesh; else copied to all."""
    if self.mesh is None:
      return _placed(tree, SingleDeviceSharding(self.target.devices[0]))
    return _placed(tree, sharding.whole(self.mesh))

  @property
  def held(self) -> dict[str, Any]:
    """What is on the device as long as the run lasts, by kind."""
    state = self.state
    return {
      'parameters': (state.trained, state.frozen),
      'optimizer': (state.opt_state, state.ema),
    }


def compile_run(
  config: ml_collections.ConfigDict,
  target: targets.Target,
  only: tuple[str, ...] = TRAINING + DECODING,
) -> Iterator[Program]:
  """The programs of a run, each as soon as it is compiled.

  None comes after one of DECODING that the compiler had not the memory for.
  """
  cfg = model_size(config.weights)
  mesh = sharding.make_mesh(config.mesh, target.devices)
  train = config.train
  sharding.check_rows(mesh, train.batch_size, train.micro_batches)
  run = _Run(config, target, cfg, mesh, abstract_state(cfg, config, mesh))
  batch = abstract_batch(config, mesh)
  if mesh is None:
    run = dataclasses.replace(run, state=run.at_home(run.state))
    batch = run.at_home(batch)
  rows = -(-train.batch_size // sharding.row_shards(mesh))
  chunks = rows * config.data.length * _TARGET_SHARE / train.loss_chunk
  if 'train_step' in only:
    optimizer = optimizer_lib.make_optimizer(config.optim, train.max_steps)
    fn = step.make_train_step(cfg, config, optimizer, mesh)
    kinds = run.held | {'gradients': run.state.trained}
    trips = math.ceil(chunks / train.micro_batches)
    yield _compile(run, 'train_step', fn, (run.state, batch), kinds, trips)[0]
  if 'eval_step' in only:
    fn = step.make_eval_step(cfg, config, mesh)
    args, trips = (run.state, batch), math.ceil(chunks)
    yield _compile(run, 'eval_step', fn, args, run.held, trips)[0]
  if set(only) & set(DECODING):
    yield from (p for p in _decoding(run) if p.name in only)


def _decoding(run) -> Iterator[Program]:
  """What translates, with the training state on the device beside it."""
  config, cfg = run.config, run.cfg
  decode, dtype = config.decode, config.train.dtype
  search = search_lib.Search(decode.beam, decode.length_penalty)
  settings = batching.Settings(
    cfg, search, _STOP_IDS, decode.batch_size, dtype, run.mesh
  )

  made, weights, new = _decode_weights(run)
  yield made
  (rows, slots), (group, width) = decode_shapes(settings, config)
  int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  prompts = run.at_home(
    batching.Group(int32((group, width)), *[int32((group,))] * 5)
  )
  if weights is None:
    return
  batch = _empty_batch(run, settings, rows, slots)
  kinds = run.held | {'decoding': (new, batch)}
  args = cfg, weights, prompts.tokens, prompts.lengths, dtype
  made, cache = _compile(run, 'prefill', decode_lib.prefill, args, kinds)
  yield made
  if cache is None:
    return
  args = settings, batch, prompts, cache
  yield _compile(run, 'insert', batching.insert, args, kinds)[0]
  number = run.at_home(int32(()))
  smaller = max(slots // 2, batching.SMALLEST_SLOTS)
  places = run.at_home(int32((settings.most_rows(smaller),)))
  args = settings, batch, places, number, smaller
  yield _compile(run, 'resize', batching.resize, args, kinds)[0]
  args = settings, batch, weights, number
  yield _compile(run, 'decode_step', batching.decode, args, kinds)[0]


def _decode_weights(run):
  """(Program, the weights, those that are new), the latter as shapes.

  A layer is made at a time, so that is what it takes beside its results.
  """
  dtype = jnp.dtype(run.config.train.dtype)
  params = parameters.unflatten(run.state.frozen | run.state.eval_params)
  number = run.at_home(jax.ShapeDtypeStruct((), jnp.int32))
  stacks = {k: v for k, v in params.items() if isinstance(v, dict)}
  new = {
    k: jax.ShapeDtypeStruct(v.shape, dtype, sharding=v.sharding)
    for k, v in params.items()
    if k not in stacks and v.ndim > 1 and v.dtype != dtype
  }
  programs = []
  for name, layers in stacks.items():
    args = layers, number, dtype
    made, layer = _compile(
      run, 'decode_weights', decode_lib.split_layer, args, run.held
    )
    if layer is None:
      return made, None, None
    times = len(layers['attn_norm'])
    new[name] = (layer,) * times
    kernels = [k._replace(times=k.times * times) for k in made.kernels]
    programs.append((made, bytes_of(layer), kernels))
  # The stack that takes most while its layers are made, beside all results.
  made, one, _ = max(programs, key=lambda p: p[0].bytes['total'] - p[1])
  known = made.bytes | {'decoding': bytes_of(new)}
  known['temporary'] -= one
  known['total'] += bytes_of(new) - one
  made = dataclasses.replace(
    made,
    bytes=known,
    kernels=[k for _, _, kernels in programs for k in kernels],
    compile_seconds=sum(p.compile_seconds for p, _, _ in programs),
  )
  return made, params | new, new


def _empty_batch(run, settings, rows, slots):
  """The shapes and places of batching.init."""
  shapes = jax.eval_shape(lambda: batching.init(settings, rows, slots))
  if run.mesh is None:
    return run.at_home(shapes)
  compiled = batching.init.lower(settings, rows, slots).compile()
  return _placed(shapes, compiled.output_shardings)


def _compile(run, name, fn, args, kinds, trips=1):
  """(Program, its outputs as shapes, or None where it does not fit).

  `kinds` are the trees that are on the device while it runs, arguments or not;
  all else that it takes is temporary.
  """
  arrays = [x for x in jax.tree.leaves(args) if hasattr(x, 'sharding')]
  start = time.monotonic()
  lowered = fn.lower(*args)
  try:
    compiled = lowered.compile(
      _FOR_CPU if run.target.platform == 'cpu' else None
    )
  except jax.errors.JaxRuntimeError as e:
    compiled, program = None, _bytes_wanted(e, bytes_of(arrays))
  spent = time.monotonic() - start
  known, found, made = {k: bytes_of(v) for k, v in kinds.items()}, [], None
  if compiled is not None:
    memory = compiled.memory_analysis()
    # What it does not read is no argument of it, but is there.
    program = max(memory.argument_size_in_bytes, bytes_of(arrays))
    program += memory.temp_size_in_bytes
    program += memory.output_size_in_bytes - memory.alias_size_in_bytes
    made = _placed(lowered.out_info, compiled.output_shardings)
    found = roofline.kernels(compiled.as_text(), run.target.chip, trips)
  given = set(map(id, arrays))
  beside = [x for x in jax.tree.leaves(kinds) if id(x) not in given]
  total = max(program + bytes_of(beside), sum(known.values()))
  known |= {'temporary': total - sum(known.values()), 'total': total}
  return Program(name, known, found, spent), made


def _bytes_wanted(e, arguments):
  """What a TPU's compiler says that a program takes, if that is too much."""
  found = re.search(r'(temporaries \(|Used )([\d.]+)([KMGT])', str(e))
  if 'RESOURCE_EXHAUSTED' not in str(e) or not found:
    raise e
  size = float(found[2]) * 1024 ** ' KMGT'.index(found[3])
  return int(size) + (0 if found[1] == 'Used ' else arguments)
