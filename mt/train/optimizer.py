"""Learning rate and optimizer out of `config.optim`, made of Optax's parts.

The state exists for what is trained only, and so does all of this: parameters
and gradients are flat dicts, see mt/gemma/lora.py.
"""

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax


def make_schedule(
  optim: ml_collections.ConfigDict, max_steps: int
) -> optax.Schedule:
  """Learning rate by step (0 is the first): warm-up, then the schedule."""
  chex.assert_scalar_positive(max_steps)
  warmup_steps = min(optim.warmup_steps, max_steps - 1)  # One is at the peak.
  peak, rest = optim.learning_rate, max_steps - warmup_steps
  after = {
    'constant': optax.constant_schedule(peak),
    'linear': optax.linear_schedule(peak, 0.0, rest),
    'cosine': optax.cosine_decay_schedule(peak, rest),
  }[optim.schedule]
  if not warmup_steps:
    return after

  def warmup(step):  # The first step already learns.
    return peak * (step + 1) / (warmup_steps + 1)

  return optax.join_schedules([warmup, after], [warmup_steps])


def decayed(flat: dict) -> dict[str, bool]:
  """Which parameters weight decay pulls to zero: all but norms and scales."""
  return {k: not ('norm' in k or k.endswith('/scale')) for k in flat}


def make_optimizer(
  optim: ml_collections.ConfigDict, max_steps: int
) -> optax.GradientTransformation:
  """The optimizer of `config.optim`, without clipping: see `clip`.

  AdamW: arXiv 1711.05101. Adafactor: arXiv 1804.04235, with its averages of
  rows and columns in place of Adam's square of every gradient, updates of an
  RMS of at most 1, relative to the RMS of the array that they are added to.
  """
  schedule = make_schedule(optim, max_steps)
  if optim.name == 'sgd':
    return optax.sgd(schedule)
  if optim.name == 'adafactor':
    return optax.adafactor(schedule)
  return optax.adamw(
    schedule,
    b1=optim.beta1,
    b2=optim.beta2,
    eps=optim.epsilon,
    weight_decay=optim.weight_decay,
    mask=decayed,
  )


def clip(grads: dict, norm: jax.Array, largest: float) -> dict:
  """optax.clip_by_global_norm for a norm that is known already.

  Args:
    grads: by path.
    norm: float32 scalar, the global norm of `grads`.
    largest: what it becomes where it is more; 0 for no clipping.
  """
  chex.assert_rank(norm, 0)
  if not largest:
    return grads
  # One factor, not Optax's g / norm * largest: divisions would be worth a copy
  # of all gradients to the compiler.
  scale = jnp.where(norm < largest, 1.0, largest / norm)
  return {k: g * scale for k, g in grads.items()}
