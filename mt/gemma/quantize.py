"""Frozen matrices in 8 or 4 bits, with a scale for each block (QLoRA).

A block is 64 weights that follow each other along the contracted axis `in`, of
one output; 64 divides `in` of every published Gemma. A weight is its block's
scale times a number that is stored: of 8 bits from -127 to 127; of 4 bits one
of NF4's 16 levels, which are equally likely where weights are normal, and -1,
0, 1 among them. Blocks and levels are those of QLoRA (arXiv 2305.14314), but
scales are bfloat16: a quarter of a bit for each weight.

Two 4-bit numbers are in a byte. XLA has a 4-bit type, but compilers for GPUs
write a second copy of it in another order of axes before the loop over layers.
"""

import dataclasses
import functools
import math

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

BITS = {'int8': 8, 'int4': 4}  # By train.frozen_dtype.
_BLOCK = 64
# bitsandbytes' numbers, rounded.
_NF4 = np.array(
  [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343]
  + [-0.091050036, 0.0, 0.0795803, 0.1609302, 0.24611230, 0.33791524]
  + [0.44070983, 0.562617, 0.72295684, 1.0],
  np.float32,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix [in, out], or a stack of them [N, in, out].

  Attributes:
    q: int8 [..., in, out]; or, of 4 bits, uint8 [..., in / 2, out]: byte j of a
      block has the level of its weight j in the lower half, and the level of
      weight j + block / 2 in the upper one.
    scale: bfloat16 [..., in / block, out].
  """

  q: jax.Array
  scale: jax.Array


@functools.partial(jax.jit, static_argnames='bits')
def quantize(w: jax.Array, bits: int) -> Quantized:
  """The nearest numbers, a layer at a time: [N, in, out], float."""
  chex.assert_rank(w, 3)
  block, largest = math.gcd(_BLOCK, w.shape[1]), {8: 127, 4: 1}[bits]

  def one_layer(w):
    x = w.astype(jnp.float32).reshape(-1, block, w.shape[-1])
    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / largest
    scale = scale.astype(jnp.bfloat16)
    x /= jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    if bits == 4:
      middles = (_NF4[1:] + _NF4[:-1]) / 2
      q = jnp.searchsorted(middles, x, method='compare_all').astype(jnp.uint8)
      low, high = jnp.split(q, 2, axis=1)
      q = low | high << 4
    else:
      q = jnp.clip(jnp.round(x), -largest, largest).astype(jnp.int8)
    return Quantized(q.reshape(-1, w.shape[-1]), scale[:, 0])

  return lax.map(one_layer, w)


def dequantize(w: Quantized, dtype: jnp.dtype) -> jax.Array:
  """A matrix [in, out] in a float type."""
  chex.assert_rank([w.q, w.scale], 2)
  chex.assert_equal_shape_suffix([w.q, w.scale], 1)
  chex.assert_is_divisible(w.q.shape[0], w.scale.shape[0])
  blocks, out = w.scale.shape
  q = w.q.reshape(blocks, -1, out)
  if q.dtype == jnp.uint8:
    q = jnp.asarray(_NF4)[jnp.concatenate([q & 15, q >> 4], axis=1)]
  x = q.astype(jnp.float32) * w.scale[:, None].astype(jnp.float32)
  return x.astype(dtype).reshape(-1, out)


@jax.custom_vjp
def matmul(x: jax.Array, w: Quantized) -> jax.Array:
  """x @ w, where w gets no gradient: [B, L, in], [in, out] -> [B, L, out].

  The backward pass makes the matrix anew: `w` is all that is saved of it.
  """
  chex.assert_rank([x, w.q], [3, 2])
  # Tied to x, no compiler makes all layers' matrices before a loop of decoding.
  x, w = lax.optimization_barrier((x, w))
  return x @ dequantize(w, x.dtype)


matmul.defvjp(
  lambda x, w: (matmul(x, w), w),
  lambda w, g: (g @ dequantize(w, g.dtype).T, None),
)
