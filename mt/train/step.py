"""The two jitted steps: `(state, batch) -> (state, metrics)`.

Metrics are sums and what to divide them by; the host divides. A new objective
is another `target_weights`, or another `gradients`.
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
from mt.gemma import embedding
from mt.gemma import lora
from mt.gemma import loss
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import optimizer as optimizer_lib
from mt.train import usage
from mt.train.state import TrainState
from mt.train.state import model_params

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def target_weights(batch: Batch) -> jax.Array:
  """What each position counts in the loss: the mean over the batch's targets.

  Args:
    batch: see mt/data/batches.py; `target_mask` [B, L] bool.

  Returns:
    [B, L] float32, 0 where there is no target.
  """
  mask = batch['target_mask']
  chex.assert_rank(mask, 2)
  return mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


def batch_nll(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  batch: Batch,
  weights: jax.Array,
  train: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
  *,
  embedded: jax.Array | None = None,
  smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The model and its loss: see loss.target_nll for what is returned.

  Args:
    params: see mt/gemma/parameters.py.
    batch: tokens, positions, segment_ids [B, L] int32.
    weights: [B, L] float32.
    train: `config.train`, for dtype and remat.
    mesh: of several devices, see mt/gemma/sharding.py.
    embedded: [B, L, D], embedding.embed of the tokens, if it is there already.
    smoothing: of the labels, see loss.target_nll.
  """
  dims = chex.Dimensions()
  dims['BL'] = batch['tokens'].shape
  chex.assert_shape([*batch.values(), weights], dims['BL'])
  hidden = model.forward(
    cfg,
    params,
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    dtype=jnp.dtype(train.dtype),
    remat=train.remat,
    implementation=train.attention,
    mesh=mesh,
    embedded=embedded,
  )
  return loss.target_nll(
    hidden,
    params['embedding'],
    batch['tokens'],
    weights,
    final_softcap=cfg.final_softcap,
    smoothing=smoothing,
    chunk=train.loss_chunk,
    tile=None if train.loss_tile == -1 else train.loss_tile,
    mesh=mesh,
  )


def gradients(
  cfg: sizes.ModelConfig,
  train: ml_collections.ConfigDict,
  trained: lora.Flat,
  frozen: lora.Flat,
  batch: Batch,
  weights: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[lora.Flat, jax.Array]:
  """Gradients of the weighted sum of the targets' nll, and the plain sum.

  The embedding is the output layer, too. The gradient of its look-up is added
  to that layer's in place: autodiff would make a second [V, D] of it.
  """
  chex.assert_equal_shape([batch['tokens'], weights])

  def weighted_nll(trained, embedded):
    params = model_params(train, trained, frozen)
    total, nll = batch_nll(
      cfg,
      params,
      batch,
      weights,
      train,
      mesh,
      embedded=embedded,
      smoothing=train.label_smoothing,
    )
    return total, jnp.sum(nll)

  table = (frozen | trained)['embedding']
  dtype = jnp.dtype(train.dtype)
  embedded = embedding.embed(table, batch['tokens'], dtype, mesh)
  (grads, d_embedded), nll = jax.grad(
    weighted_nll, argnums=(0, 1), has_aux=True
  )(trained, embedded)
  if 'embedding' in trained:
    grads['embedding'] = embedding.add_grad(
      grads['embedding'], batch['tokens'], d_embedded, mesh
    )
  return grads, nll


def micro_batches(batch: Batch, number: int) -> Batch:
  """[B, L] -> [number, B / number, L]; the first has rows 0, number, …"""
  chex.assert_is_divisible(jax.tree.leaves(batch)[0].shape[0], number)
  return jax.tree.map(
    lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch
  )


def accumulated_gradients(
  cfg: sizes.ModelConfig,
  train: ml_collections.ConfigDict,
  trained: lora.Flat,
  frozen: lora.Flat,
  batch: Batch,
  mesh: Mesh | None = None,
) -> tuple[lora.Flat, jax.Array]:
  """`gradients`, summed over train.micro_batches parts of the batch.

  The weights are those of the whole batch: a token counts the same wherever it
  stands, and the sum is what one large batch gives.
  """
  weights = target_weights(batch)
  if train.micro_batches == 1:
    return gradients(cfg, train, trained, frozen, batch, weights, mesh)

  def split_like_parameters(grads):
    if mesh is None:
      return grads
    places = sharding.of_tree(cfg, mesh, grads)
    return lax.with_sharding_constraint(grads, places)

  def add(total, part):
    rows, weights = part
    grads, nll = gradients(cfg, train, trained, frozen, rows, weights, mesh)
    grads = split_like_parameters(grads)
    return jax.tree.map(jnp.add, total, (grads, nll)), None

  zeros = split_like_parameters(jax.tree.map(jnp.zeros_like, trained))
  parts = micro_batches((batch, weights), train.micro_batches)
  return lax.scan(add, (zeros, jnp.float32(0)), parts)[0]


def make_train_step(
  cfg: sizes.ModelConfig,
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """A jitted step; it consumes (donates) the state that it is given.

  The loss is the mean over the target tokens of the whole batch. If it or a
  gradient is not finite, the step is skipped: it is counted, and nothing else
  of the state changes. The learning rate does not go on either.

  Metrics: nll (sum, with train.label_smoothing), targets, tokens (padding
  excluded), grad_norm, learning_rate, useful_flops (see mt/train/usage.py), and
  the state's skipped and skipped_in_a_row.
  """
  decay = config.optim.ema_decay
  schedule = optimizer_lib.make_schedule(config.optim, config.train.max_steps)

  def train_step(state, batch):
    grads, nll = accumulated_gradients(
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

    old = state.trained, state.opt_state, state.ema
    trained, opt_state, ema = _if_good(good, update, old)
    new = dataclasses.replace(
      state,
      step=state.step + 1,
      skipped=state.skipped + ~good,
      skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
      trained=trained,
      opt_state=opt_state,
      ema=ema,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    if mesh is not None:
      places = sharding.of_tree(cfg, mesh, new)
      new = lax.with_sharding_constraint(new, places)
    return new, {
      'nll': nll,
      'targets': jnp.sum(batch['target_mask']),
      'tokens': jnp.sum(batch['segment_ids'] > 0),
      'grad_norm': grad_norm,
      'learning_rate': jnp.float32(schedule(state.step - state.skipped)),
      'useful_flops': usage.useful_flops(cfg, state.trained, batch),
      'skipped': new.skipped,
      'skipped_in_a_row': new.skipped_in_a_row,
    }

  return compiling.jit_once(
    train_step,
    donate_argnums=0,
    compiler_options=sharding.compiler_options(mesh),
  )


def _if_good(good, update, old):
  """`update(*old)`, or `old` where the step is to be skipped.

  `cond` would have an accelerator copy all that its branches may change, and
  `where` would have a CPU hold two of each array: so each has the other.
  """

  def select(*old):
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), update(*old), old)

  def branch(*old):
    return lax.cond(good, update, lambda *old: old, *old)

  return lax.platform_dependent(*old, cpu=branch, default=select)


def make_eval_step(
  cfg: sizes.ModelConfig,
  config: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], Metrics]:
  """A jitted step without gradients. Metrics: nll (sum), targets."""

  def eval_step(state, batch):
    params = model_params(config.train, state.eval_params, state.frozen)
    weights = batch['target_mask'].astype(jnp.float32)
    total, _ = batch_nll(cfg, params, batch, weights, config.train, mesh)
    return {'nll': total, 'targets': jnp.sum(batch['target_mask'])}

  return compiling.jit_once(
    eval_step, compiler_options=sharding.compiler_options(mesh)
  )
