"""Attention over packed rows: who sees whom, RoPE, softmax, products.

Dimension letters are those of mt/gemma/model.py.
"""

import chex
import jax
import jax.numpy as jnp

from mt.gemma.sizes import ModelConfig

MASKED = -2.3819763e38  # Gemma's own "minus infinity" for attention logits.
_QUERIES, _MOST_BLOCKS = 128, 4  # In a block of causal_attend; of blocks.


def make_mask(
  q_positions: jax.Array,
  k_positions: jax.Array,
  q_segments: jax.Array,
  k_segments: jax.Array,
  window: jax.Array,
) -> jax.Array:
  """What each query may see: its own segment, not the future, in the window.

  Segment 0 is padding; padded queries see padded keys, so that no row of the
  softmax is empty, and nothing else sees them.

  Args:
    q_positions, q_segments: [B, L] int.
    k_positions, k_segments: [B, S] int.
    window: scalar int; a key counts if q_position - k_position < window.

  Returns:
    [B, L, S] bool.
  """
  chex.assert_rank([q_positions, k_positions, q_segments, k_segments], 2)
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  same = q_segments[:, :, None] == k_segments[:, None, :]
  return same & (distance >= 0) & (distance < window)


def rope_tables(
  cfg: ModelConfig, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines for layers with a window and for those without.

  Args:
    positions: [B, L] int32.

  Returns:
    Two [2, B, L, A / 2] float32.
  """
  chex.assert_rank(positions, 2)
  exponent = jnp.arange(cfg.head_dim // 2, dtype=jnp.float32)
  exponent = exponent * 2 / cfg.head_dim
  rates = jnp.stack(
    [
      cfg.rope_base_local**-exponent,
      cfg.rope_base_global**-exponent / cfg.rope_scale_global,
    ]
  )
  angles = positions[..., None].astype(jnp.float32) * rates[:, None, None]
  return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates the halves of each head (RoFormer, arXiv 2104.09864).

  Args:
    x: [B, L, heads, A].
    sin, cos: [B, L, A / 2] of the angles, float32.
  """
  chex.assert_rank([x, sin, cos], [4, 3, 3])
  sin, cos = sin[:, :, None], cos[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x where there is no cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


@jax.custom_vjp
def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax over the keys that a query may see.

  Autodiff would keep its result twice, and the mask.

  Args:
    logits: [B, K, L * G, S].
    mask: [B, L, S] bool.
  """
  chex.assert_rank([logits, mask], [4, 3])
  b, heads, _, s = logits.shape
  shown = logits.reshape(b, heads, mask.shape[1], -1, s)
  shown = jnp.where(mask[:, None, :, None], shown, MASKED)
  return jax.nn.softmax(shown.reshape(logits.shape), axis=-1)


def _masked_softmax_fwd(logits, mask):
  probs = masked_softmax(logits, mask)
  return probs, probs


def _masked_softmax_bwd(probs, g):
  return probs * (g - jnp.sum(probs * g, -1, keepdims=True)), None


masked_softmax.defvjp(_masked_softmax_fwd, _masked_softmax_bwd)


def attend(
  cfg: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """Grouped-query attention.

  Args:
    q: [B, L, H, A], already scaled.
    k, v: [B, S, K, A].
    mask: [B, L, S] bool.

  Returns:
    [B, L, H * A] in the dtype of `v`.
  """
  chex.assert_rank([q, k, v, mask], [4, 4, 4, 3])
  (b, l, h, a), heads = q.shape, cfg.num_kv_heads
  group = h // heads
  # r = (l, g), the queries of a key head: where there is one such head, as in
  # the smallest models, no operand of a product is copied or turned round.
  q = q.reshape(b, l, heads, group, a).swapaxes(1, 2)
  q = q.reshape(b, heads, l * group, a)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  logits = jnp.einsum(
    'bkra,bksa->bkrs', q, k, preferred_element_type=jnp.float32
  )
  logits = softcap(logits, cfg.attn_softcap)
  probs = masked_softmax(logits, mask).astype(v.dtype)
  out = jnp.einsum('bkrs,bksa->bkra', probs, v)
  out = out.reshape(b, heads, l, group, a).swapaxes(1, 2)
  return out.reshape(b, l, h * a)


def causal_attend(
  cfg: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """`attend` for queries and keys of the same places, where none looks ahead.

  A block of queries at a time. Keys after it, all hidden, are left out of its
  products: with two blocks a quarter of the work, with four three eighths.

  Args:
    q: [B, L, H, A], already scaled.
    k, v: [B, L, K, A].
    mask: [B, L, L] bool, False for places after the query's.

  Returns:
    [B, L, H * A] in the dtype of `v`.
  """
  chex.assert_rank([q, k, v, mask], [4, 4, 4, 3])
  chex.assert_equal_shape_prefix([q, k, v, mask], 2)
  length = q.shape[1]
  block = max(_QUERIES, -(-length // _MOST_BLOCKS))
  return jnp.concatenate(
    [
      attend(cfg, q[:, at:end], k[:, :end], v[:, :end], mask[:, at:end, :end])
      for at in range(0, length, block)
      for end in [min(at + block, length)]
    ],
    axis=1,
  )
