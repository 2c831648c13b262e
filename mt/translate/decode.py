"""Gemma with a key/value cache: all that a search needs of a model.

The key and the value of the token at position p stand in slot p of its row.
What a slot beyond a row's position holds is never seen: it is written before
the row gets there. So prompts of any length share a batch, and a row can be
given to another sentence at any time.
"""

import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mt.gemma import attention
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sizes

Cache = dict[str, tuple[jax.Array, ...]]  # k, v per layer: [B, S, K, A].


def unstack(
  params: parameters.Params, dtype: jnp.dtype | None = None
) -> parameters.Params:
  """Layers as a tuple of dicts, their matrices [out, in] and of this dtype.

  A decoding step is bound by reading the weights: it would copy slices of
  stacked arrays, and convert matrices that are not of the activations' dtype.
  With `out` first the products of a few rows are 1.4 times as fast on a CPU
  (BUILD_NOTES.md).

  Raises:
    ValueError: there are low-rank factors, see lora.fold.
  """
  if any('_lora_' in name for name in params['layers']):
    raise ValueError('low-rank factors are folded in first: lora.fold')
  embedding = params['embedding']
  return params | {
    'embedding': embedding.astype(dtype or embedding.dtype),
    'layers': _split(params['layers'], dtype),
  }


@functools.partial(jax.jit, static_argnums=1)
def _split(layers, dtype):
  def matrix(x):  # Norms are vectors, and computed in float32.
    return x if x.ndim == 1 else x.T.astype(dtype or x.dtype)

  numbers = range(len(layers['attn_norm']))
  return tuple({k: matrix(v[n]) for k, v in layers.items()} for n in numbers)


def _dense(layer, name, x):
  """model.dense with the matrices of `unstack`."""
  y = jnp.einsum('oi,bli->obl', layer[name].astype(x.dtype), x)
  return jnp.moveaxis(y, 0, -1)


def empty_cache(
  cfg: sizes.ModelConfig, rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
  """A cache of zeros, S slots for each of B rows."""
  shape, layers = cfg.dims()['KA'], range(cfg.num_layers)
  zeros = functools.partial(jnp.zeros, (rows, slots, *shape), dtype)
  return {x: tuple(zeros() for _ in layers) for x in 'kv'}


def extend(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  cache: Cache,
  tokens: jax.Array,
  start: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads L more tokens of each row, in the dtype of the cache.

  `params` are as `unstack` returns them, tokens [B, L] int32, `start` [B] int32
  is the position of the first one; start + L is at most S. Returns hidden
  states [B, L, D], after the final norm, and the cache.
  """
  dims = cfg.dims()
  dims['BL'], dims['_S__'] = tokens.shape, cache['k'][0].shape
  chex.assert_shape(start, dims['B'])
  chex.assert_shape(jax.tree.leaves(cache), dims['BSKA'])
  at = start[:, None] + jnp.arange(dims.L, dtype=jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(dims.S, dtype=jnp.int32), dims['BS'])
  windows, kinds = attention.layer_kinds(cfg)
  sin, cos = attention.rope_tables(cfg, at)
  keys, values = list(cache['k']), list(cache['v'])
  write = jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=0))
  x = model.embed(params['embedding'], tokens, keys[0].dtype)
  one_text = jnp.ones_like(at), jnp.ones_like(slot)
  for n, layer in enumerate(params['layers']):

    def attend(q, k, v, n=n):
      keys[n] = write(keys[n], k, start)
      values[n] = write(values[n], v, start)
      mask = attention.make_mask(at, slot, *one_text, windows[n])
      return attention.attend(cfg, q, keys[n], values[n], mask), None

    kind = kinds[n]
    x, _ = model.block(cfg, layer, x, sin[kind], cos[kind], attend, _dense)
  cache = {'k': tuple(keys), 'v': tuple(values)}
  return model.rms_norm(x, params['final_norm']), cache


@functools.partial(jax.jit, static_argnames=('cfg', 'dtype', 'chunk'))
def prefill(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tokens: jax.Array,
  dtype: jnp.dtype,
  chunk: int = 512,
) -> Cache:
  """The cache of prompts [B, P] int32, left-aligned, with P slots.

  What fills up a row is read as well, into slots that nothing sees. `chunk`
  tokens are read at once, as attention takes B * H * chunk * P numbers; P is
  less, or a multiple of it.
  """
  chex.assert_rank(tokens, 2)
  b, p = tokens.shape
  chunk = min(p, chunk)
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
  params: parameters.Params,
  cache: Cache,
  tokens: jax.Array,
  positions: jax.Array,
) -> tuple[jax.Array, Cache]:
  """`extend` by one token, at its position: [B] int32 each.

  Returns logits [V, B] float32 of what may follow, and the cache.
  """
  chex.assert_equal_shape([tokens, positions])
  hidden, cache = extend(cfg, params, cache, tokens[:, None], positions)
  # With V first, the product is 1.7 times as fast on a CPU (BUILD_NOTES.md).
  logits = jnp.einsum(
    'vd,bd->vb',
    params['embedding'].astype(hidden.dtype),
    hidden[:, 0],
    preferred_element_type=jnp.float32,
  )
  return attention.softcap(logits, cfg.final_softcap), cache
