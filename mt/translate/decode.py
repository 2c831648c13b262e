"""The model with a key/value cache: all that a search needs of it."""

from collections.abc import Mapping
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mt.gemma import attention
from mt.gemma import embedding
from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import quantize
from mt.gemma import sharding
from mt.gemma import sizes
from mt.translate import kv_cache


def unstack(
  params: parameters.Params, dtype: jnp.dtype | None = None
) -> parameters.Params:
  """Stacks as tuples of layers, their matrices [out, in] and of this dtype.

  A decoding step is bound by reading the weights: it would copy slices of
  stacked arrays, and convert matrices that are not of the activations' dtype.
  With `out` first the products of a few rows are 1.4 times as fast on a CPU
  (BUILD_NOTES.md). Low-rank products are added in. Beside its argument and its
  result this takes the memory of less than a layer.

  Quantised matrices stay what they are, [in, out], with their factors.
  """
  out = {}
  for name, x in params.items():
    if isinstance(x, dict):
      numbers = np.arange(len(x['attn_norm']), dtype=np.int32)
      out[name] = tuple(split_layer(x, n, dtype) for n in numbers)
    else:  # Norms are vectors, and computed in float32.
      out[name] = x.astype(dtype or x.dtype) if x.ndim > 1 else x
  return out


@functools.partial(jax.jit, static_argnums=2)
def split_layer(
  layers: dict[str, jax.Array], n: int, dtype: jnp.dtype | None
) -> dict[str, jax.Array]:
  """Layer n of `unstack`, out of the stacked ones: [N, …]."""
  chex.assert_equal_shape_prefix(jax.tree.leaves(layers), 1)
  quantized = {
    k for k, v in layers.items() if isinstance(v, quantize.Quantized)
  }

  def matrix(name):
    if name.partition('_lora_')[0] in quantized:
      return jax.tree.map(lambda x: x[n], layers[name])
    x, to = layers[name][n], dtype or layers[name].dtype
    if x.ndim == 1:  # Norms are vectors, and computed in float32.
      return x
    if name + '_lora_a' in layers:
      a, b = layers[name + '_lora_a'][n], layers[name + '_lora_b'][n]
      x = lora.add_product(x, a, b, to)
    return x.T.astype(to)

  made = [k for k in layers if k.partition('_lora_')[0] in {k} | quantized]
  return {k: matrix(k) for k in made}


def _dense(layer, name, x):
  """model.dense with the matrices of `unstack`.

  Outputs come last but on a CPU: on an H100 a step of 256 rows then has 62
  kernels fewer, as sums over parts of a product merge with what follows.
  """
  if isinstance(layer[name], quantize.Quantized):
    return model.dense(layer, name, x)
  return lax.platform_dependent(
    layer[name].astype(x.dtype),
    x,
    cpu=lambda w, x: jnp.moveaxis(jnp.einsum('oi,bli->obl', w, x), 0, -1),
    default=lambda w, x: jnp.einsum('oi,bli->blo', w, x),
  )


def _dense_on_mesh(cfg, mesh, layer, name, x):
  """`_dense` of activations that are split as the matrix is.

  Split by rows, as the cache is, a few of them would have each device gather
  all weights: 12.6 GB for a token of a 12B on eight GPUs, instead of 0.1.
  """
  path = f'layers/{name}'
  axes = next(p.axes for p in parameters.table(cfg) if p.path == path)
  heads = {'heads': cfg.num_heads, 'kv_heads': cfg.num_kv_heads}

  def split(x, axis):
    units = 1, 1, heads.get(axis, x.shape[2])
    place = sharding.place(mesh, ('all', 'all', axis), units)
    return lax.with_sharding_constraint(x, place)

  return split(_dense(layer, name, split(x, axes[1])), axes[2])


def extend(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  cache: kv_cache.Cache,
  tokens: jax.Array,
  positions: jax.Array,
  seen: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> tuple[jax.Array, kv_cache.Cache]:
  """Reads L more tokens of each row, in the dtype of the cache.

  Args:
    cfg: the model's shape.
    params: as `unstack` returns them.
    cache: of B rows, whose time is a multiple of L.
    tokens, positions: [B, L] int32.
    seen: kind of layer, see ModelConfig.kind -> [B, L, S] bool, the slots that
      each token sees, once all are written.
    mesh: over which the cache and the weights are split.

  Returns:
    Hidden states [B, L, D], after the final norm, and the cache.
  """
  dims = cfg.dims()
  dims['BL'] = tokens.shape
  chex.assert_shape([tokens, positions], dims['BL'])
  x = embedding.embed(params['embedding'], tokens, cache['k'][0].dtype)
  k, v, time = list(cache['k']), list(cache['v']), cache['time']
  layers = {}
  for stack in cfg.stacks():
    sin, cos = attention.rope_tables(stack.cfg, positions)
    for n, layer in zip(stack.layers, params[stack.name], strict=True):
      kind = 'LG'.index(cfg.kind(n))
      layers[n] = stack.cfg, layer, (sin[kind], cos[kind])
  inputs = model.layer_inputs(cfg, params, tokens, x)
  for n in range(dims.N):
    layer_cfg, layer, rope = layers[n]
    at = cfg.kv_layer(n)
    x, (k[at], v[at]) = _block(
      layer_cfg,
      mesh,
      layer,
      x,
      rope,
      None if inputs is None else inputs[n],
      (k[at], v[at]),
      time,
      seen[cfg.kind(n)],
    )
  x = model.rms_norm(x, params['final_norm'], cfg.norm_offset)
  return x, {'k': tuple(k), 'v': tuple(v), 'time': time + dims.L}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(cfg, mesh, layer, x, rope, layer_input, cache, time, mask):
  """A layer, and the keys and values that it reads, with its own if it has any.

  Jitted, as layers that are alike are traced and lowered once then.
  """

  def attend(q, *new):
    kv = kv_cache.write(cache, new, time, mesh) if new else cache
    return attention.attend(cfg, q, *kv, mask), kv

  product = _dense
  if mesh is not None:
    product = functools.partial(_dense_on_mesh, cfg, mesh)

  def dense(layer, name, x, heads=None):
    y = product(layer, name, model.join_heads(x))
    return model.split_heads(y, heads)

  return model.block(cfg, layer, x, *rope, attend, layer_input, dense)


@functools.partial(jax.jit, static_argnames=('cfg', 'dtype', 'chunk'))
def prefill(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tokens: jax.Array,
  lengths: jax.Array,
  dtype: jnp.dtype,
  chunk: int = 512,
) -> kv_cache.Cache:
  """The cache of the beginnings of texts, with P slots.

  Args:
    cfg: the model's shape.
    params: as `unstack` returns them.
    tokens: [B, P] int32, right-aligned: what fills up a row comes first and is
      read as well, into slots that nothing sees.
    lengths: [B] int32, tokens of each, 0 or more.
    dtype: of the cache and the activations.
    chunk: so many tokens are read at once, as attention takes B * H * chunk * P
      numbers; P is less, or a multiple of it.
  """
  dims = cfg.dims()
  dims['BP'] = tokens.shape
  chex.assert_shape(lengths, dims['B'])
  chunk = min(dims.P, chunk)
  chex.assert_is_divisible(dims.P, chunk)
  first = dims.P - lengths[:, None]
  slots = jnp.arange(dims.P)

  def read(i, cache):
    part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
    at = i * chunk + slots[:chunk]
    distance = at[:, None] - slots
    text = slots >= first[..., None]
    seen = {
      kind: text & (distance >= 0) & (distance < window)
      for kind, window in attention.windows(cfg).items()
    }
    return extend(cfg, params, cache, part, at - first, seen)[1]

  cache = kv_cache.empty(cfg, dims.B, dims.P, dtype)
  if chunk == dims.P:
    return read(0, cache)
  return lax.fori_loop(0, dims.P // chunk, read, cache)


def step(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  cache: kv_cache.Cache,
  tokens: jax.Array,
  start: jax.Array,
  made: jax.Array,
  ancestors: jax.Array,
  *,
  mesh: Mesh | None = None,
  pieces: int | None = None,
  never: tuple[int, ...] = (),
) -> tuple[jax.Array, kv_cache.Cache]:
  """Reads a token of each of W hypotheses that go on from one prompt.

  Each sees the prompt and what its ancestors have read.

  Args:
    cfg, params, cache, mesh: see `extend`.
    tokens: [B, W] int32.
    start: [B] int32, position of the token that was read first.
    made: [B] int32, tokens read so far; these have position start + made.
    ancestors: [B, W, T] int32, whose n-th token each hypothesis has as its own;
      its own number where n = made.
    pieces: of the tokenizer; the rows of the embedding after them stand for
      nothing. All rows are pieces if None.
    never: pieces that no text has.

  Returns:
    Logits [V, B * W] float32 of what may follow, -inf where there is no piece,
    and the cache.
  """
  dims = cfg.dims()
  dims['BW'], dims['__T'] = tokens.shape, ancestors.shape
  chex.assert_shape([start, made], dims['B'])
  chex.assert_shape(ancestors, dims['BWT'])
  positions = jnp.broadcast_to((start + made)[:, None], tokens.shape)
  seen = kv_cache.seen(cfg, cache, start, made, ancestors)
  hidden, cache = extend(cfg, params, cache, tokens, positions, seen, mesh)
  # With V first, the product is 1.7 times as fast on a CPU (BUILD_NOTES.md).
  logits = jnp.einsum(
    'vd,bd->vb',
    params['embedding'].astype(hidden.dtype),
    hidden.reshape(dims['(BW)D']),
    preferred_element_type=jnp.float32,
  )
  logits = attention.softcap(logits, cfg.final_softcap)
  if pieces is not None and pieces < len(logits):
    none = jnp.arange(len(logits)) >= pieces
    logits = jnp.where(none[:, None], -jnp.inf, logits)
  if never:
    logits = logits.at[jnp.array(never)].set(-jnp.inf)
  return logits, cache
