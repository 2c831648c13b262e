"""Attention over packed rows: who sees whom, RoPE, softmax, products.

Dimension letters are those of mt/gemma/sizes.py.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mt.gemma.sizes import ModelConfig

MASKED = -2.3819763e38  # Gemma's own "minus infinity" for attention logits.
_GLOBAL_WINDOW = 2**30  # Wider than any sequence.
_BLOCK, _MOST_BLOCKS = 128, 4  # Queries in a block of causal_attend; blocks.


def windows(cfg: ModelConfig) -> dict[str, int]:
  """Kind of layer -> how many tokens it sees, the current one included."""
  return {'L': cfg.window or _GLOBAL_WINDOW, 'G': _GLOBAL_WINDOW}


def layer_kinds(cfg: ModelConfig) -> jax.Array:
  """Of each layer, an index into the tables of `rope_tables`: [N] int32."""
  kinds = [cfg.kind(n) for n in range(cfg.num_layers)]
  return jnp.array(['LG'.index(k) for k in kinds], jnp.int32)


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
  turned = exponent < int(cfg.rope_part_global * cfg.head_dim // 2)
  exponent = exponent * 2 / cfg.head_dim
  rates = cfg.rope_base_global**-exponent / cfg.rope_scale_global
  if cfg.rope_part_global < 1.0:
    rates = jnp.where(turned, rates, 0.0)
  rates = jnp.stack([cfg.rope_base_local**-exponent, rates])
  angles = positions[..., None].astype(jnp.float32) * rates[:, None, None]
  return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates the halves of each head (RoFormer, arXiv 2104.09864).

  Args:
    x: [B, heads, L, A].
    sin, cos: [B, L, A / 2] of the angles, float32.
  """
  chex.assert_rank(x, 4)
  chex.assert_shape([sin, cos], (len(x), x.shape[2], x.shape[3] // 2))
  sin, cos = sin[:, None], cos[:, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x where there is no cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  cfg: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """Grouped-query attention.

  Args:
    q: [B, H, L, A], already scaled.
    k, v: [B, K, S, A].
    mask: [B, L, S] bool.

  Returns:
    [B, H, L, A] in the dtype of `v`.
  """
  dims = cfg.dims()
  dims['B_L'], dims['__S'] = q.shape[:3], k.shape[:3]
  chex.assert_shape(q, dims['BHLA'])
  chex.assert_shape([k, v], dims['BKSA'])
  chex.assert_shape(mask, dims['BLS'])
  dims.G = dims.H // dims.K
  # The G * L queries of a key head are one axis: no operand of a product is
  # copied or transposed.
  q = q.reshape(dims['BK(GL)A'])
  logits = jnp.einsum(
    'bkra,bksa->bkrs', q, k, preferred_element_type=jnp.float32
  )
  logits = softcap(logits, cfg.attn_softcap).reshape(dims['BKGLS'])
  logits = jnp.where(mask[:, None, None], logits, MASKED)
  probs = jax.nn.softmax(logits.reshape(dims['BK(GL)S']), -1).astype(v.dtype)
  out = jnp.einsum('bkrs,bksa->bkra', probs, v)
  return out.reshape(dims['BHLA'])


def first_keys(cfg: ModelConfig, segment_ids: jax.Array) -> jax.Array:
  """The first place that each place of a packed row may see.

  It may see all from there to itself: a segment is one piece of its row. So
  padding sees padding, lest its softmax be empty, and nothing else sees it.

  Args:
    cfg: the model's shape.
    segment_ids: [B, L] int32; 0, padding, is a segment like the others.

  Returns:
    [2, B, L] int32, for layers with a window and for those without.
  """
  chex.assert_rank(segment_ids, 2)
  place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  begins = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
  segment = lax.cummax(jnp.where(begins, place, 0), axis=1)
  window = jnp.maximum(segment, place - windows(cfg)['L'] + 1)
  return jnp.stack([window, segment])


def causal_attend(
  cfg: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array
) -> jax.Array:
  """`attend` for queries and keys of the same places, where none looks ahead.

  A block of queries at a time. Keys after it, all hidden, are left out of its
  products: with two blocks a quarter of the work, with four three eighths.

  Args:
    q: [B, H, L, A], already scaled.
    k, v: [B, K, L, A].
    first: [B, L] int32, see `first_keys`.

  Returns:
    [B, H, L, A] in the dtype of `v`.
  """
  dims = cfg.dims()
  dims['B_L'] = q.shape[:3]
  chex.assert_shape(q, dims['BHLA'])
  chex.assert_shape([k, v], dims['BKLA'])
  chex.assert_shape(first, dims['BL'])
  place = jnp.arange(dims.L)
  mask = (place >= first[..., None]) & (place <= place[:, None])
  block, outs = max(_BLOCK, -(-dims.L // _MOST_BLOCKS)), []
  for at in range(0, dims.L, block):
    end = at + block  # Slices stop at L.
    seen = mask[:, at:end, :end]
    outs.append(
      attend(cfg, q[:, :, at:end], k[:, :, :end], v[:, :, :end], seen)
    )
  return jnp.concatenate(outs, axis=2)
