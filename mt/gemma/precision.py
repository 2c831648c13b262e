"""Which numbers are kept in which format.

Weights that are trained, their gradients' sums, the optimizer and EMA are
float32, always: in bfloat16 a weight of 1.0 does not move under steps of 1e-3.
So are logits, whose exponentials are summed over the vocabulary. What is left
to choose is the format of activations and that of frozen weights. float16 is
none of the choices: Gemma's activations go beyond its largest number, 65,504.
"""

import dataclasses

import jax.numpy as jnp
import ml_collections

_FLOAT32 = jnp.dtype(jnp.float32)
CHOICES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Policy:
  """Formats of everything in a step.

  Attributes:
    compute: of activations, and of weights where they are multiplied.
    frozen: of weights that are not trained, in memory.
    master: of trained weights, gradients, the optimizer and EMA.
    logits: of the output layer's results and all that the loss does with them.
  """

  compute: jnp.dtype
  frozen: jnp.dtype
  master: jnp.dtype = _FLOAT32
  logits: jnp.dtype = _FLOAT32


def make_policy(train: ml_collections.ConfigDict) -> Policy:
  """The policy of `config.train`."""
  for name in (train.dtype, train.frozen_dtype):
    if name not in CHOICES:
      raise ValueError(
        f'{name!r} is none of {CHOICES}; see mt/train/settings.py'
      )
  return Policy(jnp.dtype(train.dtype), jnp.dtype(train.frozen_dtype))
