"""Gemma 1, 2 and 3 text models as pure functions over a plain pytree.

Dimension letters, used in every shape of this project:
  B batch rows, L tokens in a row, S cache slots, D model width, H query heads,
  K key/value heads, G = H / K query heads per key/value head, A head width,
  F feed-forward width, V vocabulary, N layers, R LoRA rank, T targets.

Parameters are a nested dict; everything under `layers` is stacked on a leading
axis N and consumed by one `lax.scan`, so that the compile time does not grow
with depth:

  embedding [V, D]          final_norm [D]
  layers/attn_norm [N, D]   layers/q [N, D, H*A]   layers/k, v [N, D, K*A]
  layers/o [N, H*A, D]      layers/ffw_norm [N, D]
  layers/gate, up [N, D, F] layers/down [N, F, D]
  Gemma 2 and 3 add layers/post_attn_norm, post_ffw_norm [N, D];
  Gemma 3 adds layers/q_norm, k_norm [N, A].

Norm weights are stored as the published checkpoints do: the factor is 1 + w.
Any matrix `m` may have low-rank partners `m_lora_a` [N, in, R] and `m_lora_b`
[N, R, out], whose product is added to it (see mt/gemma/lora.py).

The published sizes stand in mt/gemma/sizes.py. The tests compare values and
gradients with the modules of the `gemma` package.
"""

from collections.abc import Callable
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt.gemma import attention
from mt.gemma import sharding
from mt.gemma.sizes import ModelConfig

Params = dict[str, Any]

# What of a layer's forward pass is kept for the backward pass: all that takes
# long to compute; the results of products with weights; what goes into it.
REMAT = {
  'none': lambda body: body,
  'dots': functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    prevent_cse=False,  # Not needed inside a scan.
  ),
  'full': functools.partial(jax.checkpoint, prevent_cse=False),
}

_GLOBAL_WINDOW = 2**30  # Wider than any sequence.
_ACTIVATIONS = ('rows', 'length', 'width')
_GAP = 16  # Numbers between rows that are kept apart: a cache line of float32.


def param_shapes(cfg: ModelConfig) -> Params:
  """The parameter tree with a shape tuple for each leaf."""
  n, d, f = cfg.num_layers, cfg.embed_dim, cfg.hidden_dim
  q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  layers = {
    'attn_norm': (n, d),
    'q': (n, d, q),
    'k': (n, d, kv),
    'v': (n, d, kv),
    'o': (n, q, d),
    'ffw_norm': (n, d),
    'gate': (n, d, f),
    'up': (n, d, f),
    'down': (n, f, d),
  }
  if cfg.post_norms:
    layers |= {'post_attn_norm': (n, d), 'post_ffw_norm': (n, d)}
  if cfg.qk_norm:
    layers |= {'q_norm': (n, cfg.head_dim), 'k_norm': (n, cfg.head_dim)}
  return {
    'embedding': (cfg.vocab_size, d),
    'layers': layers,
    'final_norm': (d,),
  }


def init_params(
  cfg: ModelConfig, key: chex.PRNGKey, dtype: jnp.dtype = jnp.float32
) -> Params:
  """Random parameters: normal with variance 1 / fan-in, norms at zero."""
  shapes = param_shapes(cfg)
  leaves, treedef = jax.tree.flatten_with_path(
    shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  keys = jax.random.split(key, len(leaves))
  out = []
  for k, (path, shape) in zip(keys, leaves, strict=True):
    if 'norm' in path[-1].key:
      out.append(jnp.zeros(shape, dtype))
    else:
      fan_in = shape[-1] if path[-1].key == 'embedding' else shape[-2]
      out.append(jax.random.normal(k, shape, dtype) * fan_in**-0.5)
  return jax.tree.unflatten(treedef, out)


@functools.partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """x / rms(x) * (1 + scale) over the last axis, computed in float32.

  Args:
    x: [..., D].
    scale: [D].
  """
  chex.assert_equal_shape_suffix([x, scale], 1)
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
  return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


# Kept for the backward pass are the arguments alone: [B, L, F] is large.
@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """gelu(gate) * up, the tanh form of GELU (arXiv 1606.08415)."""
  chex.assert_equal_shape([gate, up])
  return jax.nn.gelu(gate) * up


def layer_constants(cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """What differs between layers: windows, tables of RoPE; [N] int32 each."""
  kinds = [cfg.attention[i % len(cfg.attention)] for i in range(cfg.num_layers)]
  window = {'L': cfg.window or _GLOBAL_WINDOW, 'G': _GLOBAL_WINDOW}
  return (
    jnp.array([window[k] for k in kinds], jnp.int32),
    jnp.array(['LG'.index(k) for k in kinds], jnp.int32),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, apart: bool = False) -> jax.Array:
  """x @ w: [B, L, in], [in, out] -> [B, L, out].

  Autodiff would form the gradient of `w` as [out, in] and turn it round. Here
  `x` is turned round. With `apart`, its rows are kept a cache line apart until
  then: those of a multiple of 4 KiB all fall into the same few places of a
  CPU's cache when a column is read.
  """
  del apart
  return x @ w


def _matmul_fwd(x, w, apart):
  kept = None
  if w.perturbed:
    kept = x.value
    if apart:
      kept = jnp.pad(kept, ((0, 0), (0, 0), (0, _GAP)))
  return x.value @ w.value, (kept, w.value if x.perturbed else None)


def _matmul_bwd(apart, kept, g):
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  if apart and x is not None:
    x = x[..., :-_GAP]
  d_w = None if x is None else jnp.einsum('bli,blo->io', x, g)
  return None if w is None else g @ w.T, d_w


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def dense(
  layer: Params, name: str, x: jax.Array, apart: bool = False
) -> jax.Array:
  """x @ matrix, plus its low-rank partner if there is one.

  Args:
    layer: the parameters of a layer.
    name: of the matrix [in, out].
    x: [B, L, in].
    apart: see `matmul`; where `in` is no multiple of 1,024, it is nothing.
  """
  apart = apart and x.shape[-1] % 1024 == 0
  y = matmul(x, layer[name].astype(x.dtype), apart)
  if name + '_lora_a' in layer:
    a, b = layer[name + '_lora_a'], layer[name + '_lora_b']
    low = matmul(x, a.astype(x.dtype), apart)
    y = y + matmul(low, b.astype(x.dtype))
  return y


def block(
  cfg: ModelConfig,
  layer: Params,
  x: jax.Array,
  rotate: Callable[[jax.Array], jax.Array],
  attend_fn: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
  dense: Callable[[Params, str, jax.Array], jax.Array] = dense,
) -> tuple[jax.Array, Any]:
  """One transformer layer.

  Args:
    layer: the parameters of this layer, without the leading axis N.
    x: [B, L, D].
    rotate: attention.apply_rope by this layer's angles, of [B, L, heads, A].
    attend_fn: (q [B, L, H, A], k, v [B, L, K, A]) -> ([B, L, H * A], extra);
      where training masks and decoding reads and writes its cache.
    dense: (layer, name of a matrix, [B, L, in]) -> [B, L, out].

  Returns:
    [B, L, D] and the `extra` of `attend_fn`.
  """
  chex.assert_rank(x, 3)
  b, l, _ = x.shape

  # Kept for the backward pass is `x`, not what the norm makes of it.
  @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
  def normed(layer, x, norm, names):
    y = rms_norm(x, layer[norm])
    return [dense(layer, name, y) for name in names]

  q, k, v = normed(layer, x, 'attn_norm', ('q', 'k', 'v'))
  q = q.reshape(b, l, cfg.num_heads, cfg.head_dim)
  k = k.reshape(b, l, cfg.num_kv_heads, cfg.head_dim)
  v = v.reshape(b, l, cfg.num_kv_heads, cfg.head_dim)
  if cfg.qk_norm:
    q, k = rms_norm(q, layer['q_norm']), rms_norm(k, layer['k_norm'])
  q = rotate(q) * cfg.query_scale
  y, extra = attend_fn(q, rotate(k), v)
  y = dense(layer, 'o', y)
  if cfg.post_norms:
    y = rms_norm(y, layer['post_attn_norm'])
  x = x + y
  y = gated(*normed(layer, x, 'ffw_norm', ('gate', 'up')))
  y = dense(layer, 'down', y)
  if cfg.post_norms:
    y = rms_norm(y, layer['post_ffw_norm'])
  return x + y, extra


def embed(
  params: Params,
  tokens: jax.Array,
  dtype: jnp.dtype,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Token vectors times sqrt(D): [B, L] int32 -> [B, L, D]."""
  chex.assert_rank(tokens, 2)
  table = params['embedding']
  scale = jnp.sqrt(float(table.shape[-1])).astype(dtype)
  vocab = sharding.split_over(mesh, 'vocab', table.shape[0])
  if not vocab:
    return table[tokens].astype(dtype) * scale
  rows = sharding.split_over(mesh, 'rows', tokens.shape[0])
  shared = tuple(a for a in vocab if a in rows)
  others = tuple(a for a in vocab if a not in rows)

  def look_up(part, tokens):
    # The table stays where it is. Each device looks for the tokens of all who
    # share its rows; one of them finds a token, all others add zeros.
    if shared:
      tokens = lax.all_gather(tokens, shared, tiled=True)
    at = tokens - lax.axis_index(vocab) * part.shape[0]
    here = (at >= 0) & (at < part.shape[0])
    x = part[jnp.where(here, at, 0)].astype(dtype)
    x = jnp.where(here[..., None], x, 0)
    if shared:
      x = lax.psum_scatter(x, shared, tiled=True)
    return lax.psum(x, others)

  look_up = jax.shard_map(
    look_up,
    mesh=mesh,
    in_specs=(PartitionSpec(vocab), PartitionSpec(rows)),
    out_specs=PartitionSpec(rows),
  )
  return look_up(table, tokens) * scale


def embed_vjp(
  table: jax.Array, tokens: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
  """`embed`, and a function that adds its gradient to one that is there.

  Args:
    table: [V, D].
    tokens: [B, L] int32.
    dtype: of the vectors.

  Returns:
    [B, L, D] and (gradient of the table [V, D], of the vectors [B, L, D]) ->
    the table's whole gradient.
  """
  chex.assert_rank([table, tokens], 2)

  def pull(d_table, d_x):
    scale = jnp.sqrt(float(table.shape[-1])).astype(dtype)
    return d_table.at[tokens].add((d_x * scale).astype(d_table.dtype))

  return embed({'embedding': table}, tokens, dtype), pull


def forward(
  cfg: ModelConfig,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  *,
  dtype: jnp.dtype = jnp.float32,
  remat: str = 'none',
  mesh: Mesh | None = None,
  embedded: jax.Array | None = None,
) -> jax.Array:
  """Tokens to final hidden states; logits are left to mt/gemma/loss.py.

  Args:
    cfg: the model's shape.
    params: see the module's docstring.
    tokens: [B, L] int32.
    positions: [B, L] int32, from 0 in each segment.
    segment_ids: [B, L] int32, 0 for padding, 1, 2, … for packed examples.
    dtype: of the activations.
    remat: what the backward pass recomputes, a key of REMAT.
    mesh: of several devices, see mt/gemma/sharding.py.
    embedded: [B, L, D], `embed` of the tokens, if it is there already.

  Returns:
    [B, L, D], after the final norm.
  """
  chex.assert_rank(tokens, 2)
  chex.assert_equal_shape([tokens, positions, segment_ids])
  chex.assert_type([tokens, positions, segment_ids], int)

  # A wider sharded axis would move data between devices.
  apart = mesh is None and jax.default_backend() == 'cpu'

  tables = attention.rope_tables(cfg, positions)

  # Kept for the backward pass is the number of the layer's kind alone.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def rotate(x, tables, kind):
    return attention.apply_rope(x, *(t[kind] for t in tables))

  def body(x, per_layer):
    layer, window, kind = per_layer
    mask = attention.make_mask(
      positions, positions, segment_ids, segment_ids, window
    )
    x, _ = block(
      cfg,
      layer,
      x,
      lambda x: rotate(x, tables, kind),
      lambda q, k, v: (attention.causal_attend(cfg, q, k, v, mask), None),
      functools.partial(dense, apart=apart),
    )
    return sharding.constrain(x, mesh, _ACTIVATIONS), None

  x = embed(params, tokens, dtype, mesh) if embedded is None else embedded
  x = sharding.constrain(x, mesh, _ACTIVATIONS)
  per_layer = params['layers'], *layer_constants(cfg)
  x, _ = lax.scan(REMAT[remat](body), x, per_layer)
  return rms_norm(x, params['final_norm'])
