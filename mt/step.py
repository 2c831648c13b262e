"""The training state and the two jitted steps.

A step is a pure function: `(state, batch) -> (state, metrics)`. Metrics are
sums with their denominators, divided once, on the host.
"""

from collections.abc import Callable
import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax

from mt import compiling
from mt import loss
from mt import model
from mt import sizes
from mt import trainable

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training changes or reads, in one immutable pytree.

  Attributes:
    step: int32 scalar, steps done.
    trained: float32 parameters by path, see mt/trainable.py.
    frozen: the other parameters by path.
    opt_state: of the optimizer, for `trained` alone.
  """

  step: jax.Array
  trained: trainable.Flat
  frozen: trainable.Flat
  opt_state: optax.OptState


def make_schedule(
  optim: ml_collections.ConfigDict, max_steps: int
) -> optax.Schedule:
  """Learning rate by step (0 is the first): warm-up, then the schedule."""
  chex.assert_scalar_positive(max_steps)
  peak, rest = optim.learning_rate, max(1, max_steps - optim.warmup_steps)
  after = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
  }[optim.schedule]()
  if not optim.warmup_steps:
    return after

  def warmup(step):  # The first step already learns.
    return peak * (step + 1) / (optim.warmup_steps + 1)

  return optax.join_schedules([warmup, after], [optim.warmup_steps])


def make_optimizer(
  optim: ml_collections.ConfigDict, max_steps: int
) -> optax.GradientTransformation:
  """The optimizer of `config.optim`."""
  schedule = make_schedule(optim, max_steps)
  if optim.name == 'sgd':
    update = optax.sgd(schedule)
  else:
    update = optax.adamw(
      schedule,
      b1=optim.beta1,
      b2=optim.beta2,
      eps=optim.epsilon,
      weight_decay=optim.weight_decay,
      mask=lambda flat: {name: 'norm' not in name for name in flat},
    )
  if not optim.clip_norm:
    return update
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), update)


def init_state(
  params: model.Params,
  train: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  key: chex.PRNGKey,
) -> TrainState:
  """The state before the first step.

  Args:
    params: pretrained; the state takes them over.
    train: `config.train`.
    optimizer: see make_optimizer.
    key: for the random half of LoRA's factors.
  """
  trained, frozen = trainable.split(
    params, train.parts, rank=train.lora_rank, key=key
  )
  chex.assert_type(list(trained.values()), jnp.float32)
  return TrainState(jnp.int32(0), trained, frozen, optimizer.init(trained))


def model_params(
  train: ml_collections.ConfigDict,
  trained: trainable.Flat,
  frozen: trainable.Flat,
) -> model.Params:
  """The parameters that mt/model.py takes, out of the two parts."""
  scale = train.lora_alpha / train.lora_rank
  return trainable.join(trained, frozen, lora_scale=scale)


def batch_nll(
  cfg: sizes.ModelConfig,
  params: model.Params,
  batch: dict[str, jax.Array],
  train: ml_collections.ConfigDict,
) -> jax.Array:
  """Sum of the target tokens' negative log-likelihoods, in nats.

  Args:
    cfg: the model's shape.
    params: see mt/model.py.
    batch: tokens, positions, segment_ids [B, L] int32, target_mask [B, L] bool.
    train: `config.train`, for dtype and remat.
  """
  chex.assert_rank(list(batch.values()), 2)
  hidden = model.forward(
    cfg,
    params,
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    dtype=jnp.dtype(train.dtype),
    remat=train.remat,
  )
  return loss.target_nll(
    hidden,
    params['embedding'],
    batch['tokens'],
    batch['target_mask'],
    final_softcap=cfg.final_softcap,
  )


def make_train_step(
  cfg: sizes.ModelConfig,
  train: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  shapes: int = 1,
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
  """A jitted step; it consumes (donates) the state that it is given.

  It compiles once for each of `shapes` shapes of a batch.

  The loss is the mean over the target tokens of the whole batch.
  Metrics: nll (sum), targets, tokens (padding excluded), grad_norm.
  """

  def train_step(state, batch):
    targets = jnp.sum(batch['target_mask'])

    def mean_nll(trained):
      params = model_params(train, trained, state.frozen)
      nll = batch_nll(cfg, params, batch, train)
      return nll / jnp.maximum(targets, 1), nll

    grads, nll = jax.grad(mean_nll, has_aux=True)(state.trained)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    new = TrainState(
      step=state.step + 1,
      trained=optax.apply_updates(state.trained, updates),
      frozen=state.frozen,
      opt_state=opt_state,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    return new, {
      'nll': nll,
      'targets': targets,
      'tokens': jnp.sum(batch['segment_ids'] > 0),
      'grad_norm': optax.tree.norm(grads),
    }

  return compiling.jit_once(train_step, shapes, donate_argnums=0)


def make_eval_step(
  cfg: sizes.ModelConfig, train: ml_collections.ConfigDict
) -> Callable[[TrainState, dict], Metrics]:
  """A jitted step without gradients. Metrics: nll (sum), targets."""

  def eval_step(state, batch):
    params = model_params(train, state.trained, state.frozen)
    return {
      'nll': batch_nll(cfg, params, batch, train),
      'targets': jnp.sum(batch['target_mask']),
    }

  return compiling.jit_once(eval_step)
