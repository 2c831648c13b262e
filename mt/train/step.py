"""The training state and the two jitted steps.

A step is a pure function: `(state, batch) -> (state, metrics)`. Metrics are
sums with their denominators, divided once, on the host.
"""

from collections.abc import Callable
import dataclasses

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from mt.base import compiling
from mt.gemma import lora
from mt.gemma import loss
from mt.gemma import model
from mt.gemma import precision
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import optimizer as optimizer_lib

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training changes or reads, in one immutable pytree.

  Attributes:
    step: int32 scalar, steps done, the skipped ones included.
    skipped: int32 scalar, steps skipped for numbers that are not finite.
    skipped_in_a_row: int32 scalar, those up to the last step; 0 after a good
      one.
    trained: float32 parameters by path, see mt/gemma/lora.py.
    frozen: the other parameters by path.
    opt_state: of the optimizer, for `trained` alone.
    ema: moving averages of `trained`, float32; {} where optim.ema_decay is 0.
  """

  step: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  trained: lora.Flat
  frozen: lora.Flat
  opt_state: optax.OptState
  ema: lora.Flat

  @property
  def eval_params(self) -> lora.Flat:
    """What is evaluated, translates and is exported: EMA if there is one."""
    return self.ema or self.trained


def init_state(
  cfg: sizes.ModelConfig,
  params: model.Params,
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  key: chex.PRNGKey,
  mesh: Mesh | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    cfg: the model's shape.
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
  return TrainState(trained=trained, frozen=frozen, **rest(trained))


def split_params(
  cfg: sizes.ModelConfig,
  params: model.Params,
  train: ml_collections.ConfigDict,
  key: chex.PRNGKey,
  mesh: Mesh | None = None,
) -> tuple[lora.Flat, lora.Flat]:
  """The parameters as (trained, frozen), each where and as it is kept."""
  policy = precision.make_policy(train)
  trained, frozen = lora.partition(
    params,
    train.parts,
    rank=train.lora_rank,
    targets=train.lora_targets,
    key=key,
  )
  formats = dict.fromkeys(frozen, policy.frozen)
  formats |= dict.fromkeys(trained, policy.master)

  def kept(path, x):
    x = x.astype(formats[path])
    if mesh is None:
      return x
    return sharding.put(x, sharding.of_parameter(cfg, mesh, path, x.shape))

  return tuple(
    {k: kept(k, v) for k, v in flat.items()} for flat in (trained, frozen)
  )


def model_params(
  train: ml_collections.ConfigDict,
  trained: lora.Flat,
  frozen: lora.Flat,
) -> model.Params:
  """The parameters that mt/gemma/model.py takes, out of the two parts."""
  scale = train.lora_alpha / train.lora_rank
  return lora.merge(trained, frozen, lora_scale=scale)


def batch_nll(
  cfg: sizes.ModelConfig,
  params: model.Params,
  batch: Batch,
  train: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
  embedded: jax.Array | None = None,
  weight: jax.Array | float = 1.0,
  smoothing: float = 0.0,
) -> jax.Array:
  """Weighted sum of the target tokens' negative log-likelihoods, in nats.

  Args:
    cfg: the model's shape.
    params: see mt/gemma/model.py.
    batch: tokens, positions, segment_ids [B, L] int32, target_mask [B, L] bool.
    train: `config.train`, for dtype and remat.
    mesh: of several devices, see mt/gemma/sharding.py.
    embedded: model.embed of the tokens, if it is there already.
    weight, smoothing: see loss.target_nll.
  """
  chex.assert_rank(list(batch.values()), 2)
  policy = precision.make_policy(train)
  hidden = model.forward(
    cfg,
    params,
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    dtype=policy.compute,
    remat=train.remat,
    mesh=mesh,
    embedded=embedded,
  )
  return loss.target_nll(
    hidden,
    params['embedding'],
    batch['tokens'],
    batch['target_mask'],
    weight=weight,
    final_softcap=cfg.final_softcap,
    smoothing=smoothing,
    chunk=train.loss_chunk,
    tile=train.loss_tile,
    logits_dtype=policy.logits,
    mesh=mesh,
  )


def micro_batches(batch: Batch, number: int) -> Batch:
  """[B, L] -> [number, B / number, L]; the first has rows 0, number, …"""
  chex.assert_is_divisible(jax.tree.leaves(batch)[0].shape[0], number)
  return jax.tree.map(
    lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch
  )


def gradients(
  cfg: sizes.ModelConfig,
  train: ml_collections.ConfigDict,
  trained: lora.Flat,
  frozen: lora.Flat,
  batch: Batch,
  mesh: Mesh | None = None,
) -> tuple[lora.Flat, jax.Array]:
  """Of the mean over all target tokens of the batch; and the sum of their nll.

  With train.micro_batches above 1 they are summed over parts of the batch, one
  after the other. Each part is divided by the targets of the whole batch, so
  that a token counts the same wherever it stands.
  """
  targets = jnp.maximum(jnp.sum(batch['target_mask']), 1)

  def mean_nll(trained, rows, embedded=None):
    params = model_params(train, trained, frozen)
    mean = batch_nll(
      cfg,
      params,
      rows,
      train,
      mesh,
      embedded,
      1.0 / targets,
      train.label_smoothing,
    )
    return mean, mean * targets

  def of_rows(trained, rows):
    if mesh is not None or 'embedding' not in trained:
      return jax.grad(mean_nll, has_aux=True)(trained, rows)
    # Gradients of the look-up are added to those of the output layer in place;
    # left to autodiff, they would be a second [V, D] full of zeros.
    dtype = precision.make_policy(train).compute
    x, pull = model.embed_vjp(trained['embedding'], rows['tokens'], dtype)
    of_both = jax.grad(mean_nll, argnums=(0, 2), has_aux=True)
    (grads, d_x), nll = of_both(trained, rows, x)
    return grads | {'embedding': pull(grads['embedding'], d_x)}, nll

  if train.micro_batches == 1:
    return of_rows(trained, batch)

  def at_home(grads):
    if mesh is None:
      return grads
    places = sharding.of_tree(cfg, mesh, grads)
    return jax.lax.with_sharding_constraint(grads, places)

  def add(total, rows):
    grads, nll = of_rows(trained, rows)
    total = jax.tree.map(jnp.add, total, (at_home(grads), nll))
    return total, None

  zeros = at_home(jax.tree.map(jnp.zeros_like, trained)), jnp.float32(0)
  return lax.scan(add, zeros, micro_batches(batch, train.micro_batches))[0]


def make_train_step(
  cfg: sizes.ModelConfig,
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None = None,
  shapes: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """A jitted step; it consumes (donates) the state that it is given.

  It compiles once for each of `shapes` shapes of a batch.

  The loss is the mean over the target tokens of the whole batch. If it or the
  gradients are not finite, the step is skipped: it is counted, and nothing else
  of the state changes, so that the schedule waits too.

  Metrics: nll (sum, with train.label_smoothing), targets, tokens (padding
  excluded), grad_norm, and the state's skipped and skipped_in_a_row.
  """
  decay = config.optim.ema_decay

  def train_step(state, batch):
    grads, nll = gradients(
      cfg, config.train, state.trained, state.frozen, batch, mesh
    )
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(nll) & jnp.isfinite(grad_norm)

    def update(trained, opt_state, ema):
      clipped = optimizer_lib.clip(grads, grad_norm, config.optim.clip_norm)
      updates, opt_state = optimizer.update(clipped, opt_state, trained)
      trained = optax.apply_updates(trained, updates)
      ema = {k: decay * v + (1 - decay) * trained[k] for k, v in ema.items()}
      return trained, opt_state, ema

    def skip(trained, opt_state, ema):
      return trained, opt_state, ema

    # Not a `where` for each array: that would keep two of them in memory.
    trained, opt_state, ema = lax.cond(
      good, update, skip, state.trained, state.opt_state, state.ema
    )
    new = TrainState(
      step=state.step + 1,
      skipped=state.skipped + ~good,
      skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
      trained=trained,
      frozen=state.frozen,
      opt_state=opt_state,
      ema=ema,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    if mesh is not None:
      places = sharding.of_tree(cfg, mesh, new)
      new = jax.lax.with_sharding_constraint(new, places)
    return new, {
      'nll': nll,
      'targets': jnp.sum(batch['target_mask']),
      'tokens': jnp.sum(batch['segment_ids'] > 0),
      'grad_norm': grad_norm,
      'skipped': new.skipped,
      'skipped_in_a_row': new.skipped_in_a_row,
    }

  return compiling.jit_once(train_step, shapes, donate_argnums=0)


def make_eval_step(
  cfg: sizes.ModelConfig,
  config: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], Metrics]:
  """A jitted step without gradients. Metrics: nll (sum), targets."""

  def eval_step(state, batch):
    params = model_params(config.train, state.eval_params, state.frozen)
    return {
      'nll': batch_nll(cfg, params, batch, config.train, mesh),
      'targets': jnp.sum(batch['target_mask']),
    }

  return compiling.jit_once(eval_step)


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
  """Whether every number that training changes is one: bool scalar."""
  leaves = jax.tree.leaves((state.trained, state.opt_state, state.ema))
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
