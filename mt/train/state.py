"""The training state: one immutable pytree of all that training changes.

What is trained, its gradients, the optimizer and EMA are always float32: in
bfloat16 a weight of 1.0 does not move under steps of 1e-3. A config chooses the
format of activations (train.dtype) and of frozen weights (train.frozen_dtype).
float16 is no choice: Gemma's activations exceed its largest number, 65,504.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import optax

from mt.base import errors
from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import quantize
from mt.gemma import sharding
from mt.gemma import sizes
from mt.weights import kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training changes or reads."""

  step: jax.Array  # int32 scalar, steps done, the skipped ones included.
  skipped: jax.Array  # int32 scalar, steps whose numbers were not finite.
  skipped_in_a_row: jax.Array  # int32 scalar, those since the last good one.
  trained: lora.Flat  # float32 parameters by path, see mt/gemma/lora.py.
  frozen: lora.Flat  # The other parameters by path.
  opt_state: optax.OptState  # Of the optimizer, for `trained` alone.
  ema: lora.Flat  # float32 moving averages of `trained`; {} without EMA.

  @property
  def at(self) -> int:
    """Steps done, as a number of the host."""
    return int(jax.device_get(self.step))

  @property
  def eval_params(self) -> lora.Flat:
    """What is evaluated, translates and is exported: EMA if there is one."""
    return self.ema or self.trained


def init_state(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  key: chex.PRNGKey,
  mesh: Mesh | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    params: pretrained; the state takes them over.
    config: for `train` and `optim`.
    optimizer: see mt/train/optimizer.py.
    key: for the random half of LoRA's factors.
    mesh: where the state shall be; on a single device where None.

  Raises:
    errors.UserError: train.parts or train.lora_targets names nothing.
  """
  trained, frozen = split_params(cfg, params, config.train, key, mesh)

  def rest(trained):
    ema = jax.tree.map(jnp.copy, trained) if config.optim.ema_decay else {}
    counts = dict.fromkeys(('step', 'skipped', 'skipped_in_a_row'), 0)
    counts = {k: jnp.int32(v) for k, v in counts.items()}
    return counts | {'opt_state': optimizer.init(trained), 'ema': ema}

  if mesh is not None:
    places = sharding.of_tree(cfg, mesh, jax.eval_shape(rest, trained))
    rest = jax.jit(rest, out_shardings=places)
  state = TrainState(trained=trained, frozen=frozen, **rest(trained))
  if mesh is not None:
    return state
  # As a restored state is bound to its device: so its programs are the same.
  return jax.device_put(state, jax.local_devices()[0])


def keeping(
  cfg: sizes.ModelConfig,
  train: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
) -> kept.Keep:
  """In which format, and where, a run keeps each pretrained parameter.

  With train.frozen_dtype int8 or int4 the frozen matrices of the layers are
  that, and what else is frozen is bfloat16. What is trained is float32.

  Raises:
    errors.UserError: there is no such matrix, or see lora.trained_paths.
  """
  trained, frozen = lora.trained_paths(cfg, train.parts), train.frozen_dtype
  matrices = {p.path for p in parameters.table(cfg) if p.lora} - trained
  if frozen in quantize.BITS and not matrices:
    raise errors.UserError(
      f'train.frozen_dtype is {frozen!r}, but train.parts={train.parts!r} '
      'leaves no matrix of a layer frozen; bfloat16 or train.parts=lora '
      'expected.'
    )
  rest = 'bfloat16' if frozen in quantize.BITS else frozen
  dtypes = dict.fromkeys(parameters.shapes(cfg), rest)
  dtypes |= dict.fromkeys(matrices, frozen) | dict.fromkeys(trained, 'float32')
  return kept.Keep(dtypes, mesh)


def split_params(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  train: ml_collections.ConfigDict,
  key: chex.PRNGKey,
  mesh: Mesh | None = None,
) -> tuple[lora.Flat, lora.Flat]:
  """The parameters as (trained, frozen), in their formats and places.

  They may have these already (see `keeping`), or be float32 and on one device.

  Raises:
    errors.UserError: see `keeping` and lora.partition.
  """
  keep = keeping(cfg, train, mesh)
  parts = lora.partition(
    cfg,
    params,
    train.parts,
    rank=train.lora_rank,
    matrices=train.lora_targets,
    key=key,
  )

  def as_kept(path, x):
    dtype = keep.dtypes.get(path, 'float32')  # LoRA's factors are float32.
    if isinstance(x, quantize.Quantized):
      return x
    if dtype in quantize.BITS:
      x = quantize.quantize(x, quantize.BITS[dtype])
    elif x.dtype != dtype:
      x = x.astype(dtype)
    if mesh is None or _is_on(x, mesh):
      return x
    return sharding.put(x, sharding.of_tree(cfg, mesh, {path: x})[path])

  return tuple({k: as_kept(k, v) for k, v in flat.items()} for flat in parts)


def _is_on(x, mesh):
  """Whether an array is on the mesh already."""
  where = getattr(x, 'sharding', None)
  return isinstance(where, NamedSharding) and where.mesh == mesh


def model_params(
  train: ml_collections.ConfigDict, trained: lora.Flat, frozen: lora.Flat
) -> parameters.Params:
  """The parameters that mt/gemma/model.py takes, out of the two parts."""
  scale = train.lora_alpha / train.lora_rank
  return lora.merge(trained, frozen, lora_scale=scale)


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
  """Whether all numbers that training changes are finite: bool scalar."""
  leaves = jax.tree.leaves((state.trained, state.opt_state, state.ema))
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
