"""Gemma with a key/value cache: all that a search needs of a model.

The key and the value of the token at position p stand in slot p of its row.
What a slot beyond a row's position holds is never seen: it is written before
the row gets there. So prompts of any length share a batch, and a row can be
given to another sentence at any time.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mt.gemma import attention
from mt.gemma import model
from mt.gemma import sizes

Cache = dict[str, tuple[jax.Array, ...]]  # k, v per layer: [B, S, K, A].

_CHUNK = 512  # Tokens of a prompt read at once: attention takes B*H*chunk*S.


def unstack(params: model.Params) -> model.Params:
  """Layers as a tuple of dicts, their matrices [out, in].

  A decoding step is bound by reading the weights: slices of stacked arrays
  would be copied at every step, and with `out` first the products of a few rows
  are 1.4 times as fast on a CPU (BUILD_NOTES.md).

  Raises:
    ValueError: there are low-rank factors, see trainable.fold.
  """
  layers = params['layers']
  if any('_lora_' in name for name in layers):
    raise ValueError('low-rank factors are folded in first: trainable.fold')
  n = layers['attn_norm'].shape[0]
  split = tuple({k: v[i].T for k, v in layers.items()} for i in range(n))
  return params | {'layers': split}


def _dense(layer, name, x):
  """model.dense with the matrices of `unstack`."""
  y = jnp.einsum('oi,bli->obl', layer[name].astype(x.dtype), x)
  return jnp.moveaxis(y, 0, -1)


def empty_cache(
  cfg: sizes.ModelConfig, rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
  """A cache of zeros: `k` and `v` per layer [rows, slots, K, A]."""
  chex.assert_scalar_positive(rows)
  chex.assert_scalar_positive(slots)
  shape = (rows, slots, cfg.num_kv_heads, cfg.head_dim)
  layers = range(cfg.num_layers)
  return {x: tuple(jnp.zeros(shape, dtype) for _ in layers) for x in 'kv'}


def extend(
  cfg: sizes.ModelConfig,
  params: model.Params,
  cache: Cache,
  tokens: jax.Array,
  start: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads L more tokens of each row.

  Args:
    params: as `unstack` returns them.
    cache: its dtype is that of the activations.
    tokens: [B, L] int32.
    start: [B] int32, position of each row's first token; start + L may not go
      beyond the slots.

  Returns:
    Hidden states [B, L, D], after the final norm, and the cache.
  """
  chex.assert_rank([tokens, start], [2, 1])
  chex.assert_equal_shape_prefix([tokens, start, cache['k'][0]], 1)
  b, l = tokens.shape
  slots, dtype = cache['k'][0].shape[1], cache['k'][0].dtype
  at = start[:, None] + jnp.arange(l, dtype=jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (b, slots))
  windows, kinds = attention.layer_kinds(cfg)
  sin, cos = attention.rope_tables(cfg, at)
  keys, values = list(cache['k']), list(cache['v'])
  write = jax.vmap(
    lambda old, new, i: lax.dynamic_update_slice_in_dim(old, new, i, 0)
  )
  x = model.embed(params['embedding'], tokens, dtype)
  for n, layer in enumerate(params['layers']):
    mask = attention.make_mask(
      at, slot, jnp.ones_like(at), jnp.ones_like(slot), windows[n]
    )

    def attend(q, k, v, n=n, mask=mask):
      keys[n] = write(keys[n], k, start)
      values[n] = write(values[n], v, start)
      return attention.attend(cfg, q, keys[n], values[n], mask), None

    kind = kinds[n]
    x, _ = model.block(cfg, layer, x, sin[kind], cos[kind], attend, _dense)
  cache = {'k': tuple(keys), 'v': tuple(values)}
  return model.rms_norm(x, params['final_norm']), cache


def prefill(
  cfg: sizes.ModelConfig,
  params: model.Params,
  tokens: jax.Array,
  dtype: jnp.dtype,
) -> Cache:
  """The cache of some prompts, with as many slots as they are wide.

  Args:
    params: as `unstack` returns them.
    tokens: [B, P] int32, left-aligned; P up to 512, or a multiple of it. What
      fills up a row is read as well, into slots that nothing sees.
    dtype: of the activations and the cache.
  """
  chex.assert_rank(tokens, 2)
  b, p = tokens.shape
  chunk = min(p, _CHUNK)
  chex.assert_is_divisible(p, chunk)

  def read(i, cache):
    part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
    start = jnp.full(b, i * chunk, jnp.int32)
    return extend(cfg, params, cache, part, start)[1]

  cache = empty_cache(cfg, b, p, dtype)
  if p == chunk:
    return read(0, cache)
  return lax.fori_loop(0, p // chunk, read, cache)


def step(
  cfg: sizes.ModelConfig,
  params: model.Params,
  cache: Cache,
  tokens: jax.Array,
  positions: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads one token of each row and says what may follow it.

  Args:
    params: as `unstack` returns them.
    cache: see `extend`.
    tokens, positions: [B] int32.

  Returns:
    Logits [V, B] float32 and the cache.
  """
  chex.assert_rank([tokens, positions], 1)
  hidden, cache = extend(cfg, params, cache, tokens[:, None], positions)
  # With V first, the product is 1.7 times as fast on a CPU (BUILD_NOTES.md).
  logits = jnp.einsum(
    'vd,bd->vb',
    params['embedding'].astype(hidden.dtype),
    hidden[:, 0],
    preferred_element_type=jnp.float32,
  )
  return attention.softcap(logits, cfg.final_softcap), cache
