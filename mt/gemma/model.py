"""Gemma 1 to 4 text models as pure functions over a plain pytree.

The parameters are those of the table in mt/gemma/parameters.py, the letters of
all shapes those of mt/gemma/sizes.py. The layers are stacked and go through one
`lax.scan`, so that the compile time does not grow with depth. The tests compare
values and gradients with the modules of the `gemma` package, and those of
Gemma 4 with transformers.
"""

from collections.abc import Callable
import functools
from typing import Any

import chex
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import numpy as np

from mt.gemma import attention
from mt.gemma import fused
from mt.gemma import sharding
from mt.gemma.parameters import Params
from mt.gemma.sizes import ModelConfig

# What of a layer's forward pass is kept for the backward pass: everything; the
# results of products with weights; what goes into the layer and the result of
# `down`; only the former.
REMAT = {
  'none': lambda layer: layer,
  'dots': functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    prevent_cse=False,  # Not needed inside a scan.
  ),
  'narrow': functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names('narrow'),
    prevent_cse=False,
  ),
  'full': functools.partial(jax.checkpoint, prevent_cse=False),
}

# Under `none` too, norms and GeGLU are computed again from their arguments: no
# slower, and 1.0 GB less for four rows of the 270M (docs/measurements.md).
_from_arguments = functools.partial(jax.checkpoint, prevent_cse=False)

_ACTIVATIONS = ('rows', 'length', 'width')


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array | None, offset: float) -> jax.Array:
  """x / rms(x) * (offset + scale) over the last axis, computed in float32.

  Args:
    x: [..., D].
    scale: [D], or None for a factor of 1.
    offset: ModelConfig.norm_offset.
  """
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
  if scale is not None:
    chex.assert_equal_shape_suffix([x, scale], 1)
    y = y * (offset + scale.astype(jnp.float32))
  return y.astype(x.dtype)


@_from_arguments
def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """gelu(gate) * up, the tanh form of GELU (arXiv 1606.08415, 2002.05202)."""
  chex.assert_equal_shape([gate, up])
  return jax.nn.gelu(gate) * up


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """x @ w: [B, L, in], [in, out] -> [B, L, out].

  Autodiff would form the gradient of `w` as [out, in] and transpose it: with
  `x` transposed instead, the layers of a step of all weights take a third less
  time on a CPU (docs/measurements.md).
  """
  return x @ w


def _matmul_fwd(x, w):
  kept = x.value if w.perturbed else None, w.value if x.perturbed else None
  return x.value @ w.value, kept


def _matmul_bwd(kept, g):
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  d_w = None if x is None else jnp.einsum('bli,blo->io', x, g)
  return None if w is None else g @ w.T, d_w


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def dense(layer: Params, name: str, x: jax.Array) -> jax.Array:
  """x @ matrix, plus its low-rank partner if there is one.

  Args:
    layer: the parameters of a layer.
    name: of the matrix [in, out].
    x: [B, L, in].
  """
  chex.assert_rank([x, layer[name]], [3, 2])
  y = matmul(x, layer[name].astype(x.dtype))
  if name + '_lora_a' in layer:
    a, b = layer[name + '_lora_a'], layer[name + '_lora_b']
    low = matmul(x, a.astype(x.dtype))
    y = y + matmul(low, b.astype(x.dtype))
  return y


def block(
  cfg: ModelConfig,
  layer: Params,
  x: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
  attend: Callable[..., tuple[jax.Array, Any]],
  layer_input: jax.Array | None = None,
  dense: Callable[[Params, str, jax.Array], jax.Array] = dense,
) -> tuple[jax.Array, Any]:
  """One transformer layer.

  Args:
    cfg: the shape of the layers of its stack.
    layer: the parameters of this layer, without the leading axis N.
    x: [B, L, D].
    sin, cos: [B, L, A / 2] float32, of this layer's kind.
    attend: (q [B, L, H, A], k, v [B, L, K, A]) -> ([B, L, H * A], extra); where
      training masks, and decoding reads and writes its cache. Of a layer that
      has no keys and values, (q).
    layer_input: [B, L, E], its own, if cfg.layer_input_dim.
    dense: (layer, name of a matrix, [B, L, in]) -> [B, L, out].

  Returns:
    [B, L, D] and the `extra` of `attend`.
  """
  dims = cfg.dims()
  dims['BL'] = x.shape[:2]
  chex.assert_shape(x, dims['BLD'])

  def norm(name, x):
    return rms_norm(x, layer[name], cfg.norm_offset)

  y = norm('attn_norm', x)
  q = dense(layer, 'q', y).reshape(dims['BLHA'])
  if cfg.qk_norm:
    q = norm('q_norm', q)
  qkv = [attention.apply_rope(q, sin, cos) * cfg.query_scale]
  if not cfg.sharing_layers:
    k = v = dense(layer, 'k', y).reshape(dims['BLKA'])
    if not cfg.keys_are_values:
      v = dense(layer, 'v', y).reshape(dims['BLKA'])
    if cfg.qk_norm:
      k = norm('k_norm', k)
    if cfg.value_norm:
      v = rms_norm(v, None, 0.0)
    qkv += attention.apply_rope(k, sin, cos), v
  y, extra = attend(*qkv)
  y = dense(layer, 'o', y)
  if cfg.post_norms:
    y = norm('post_attn_norm', y)
  x = x + y
  y = norm('ffw_norm', x)
  y = geglu(dense(layer, 'gate', y), dense(layer, 'up', y))
  y = checkpoint_name(dense(layer, 'down', y), 'narrow')
  if cfg.post_norms:
    y = norm('post_ffw_norm', y)
  x = x + y
  if cfg.layer_input_dim:
    y = geglu(dense(layer, 'input_gate', x), layer_input)
    x = x + norm('post_input_norm', dense(layer, 'input_proj', y))
  if cfg.layer_scale:
    x = x * layer['scale'].astype(x.dtype)
  return x, extra


def embed(
  table: jax.Array,
  tokens: jax.Array,
  dtype: jnp.dtype,
  mesh: Mesh | None = None,
  width: int | None = None,
) -> jax.Array:
  """Token vectors times sqrt(D): [V, D], [B, L] int32 -> [B, L, D].

  `width` is of the vectors, where a row of the table has several.
  """
  chex.assert_rank([table, tokens], 2)
  scale = jnp.sqrt(float(width or table.shape[-1])).astype(dtype)
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


def add_embed_grad(
  d_table: jax.Array, tokens: jax.Array, d_x: jax.Array, mesh: Mesh | None
) -> jax.Array:
  """Adds the gradient of `embed` to one that is there, in its memory.

  Args:
    d_table: [V, D], so far.
    tokens: [B, L] int32.
    d_x: [B, L, D], gradient of the token vectors.
    mesh: as in `embed`.

  Returns:
    [V, D].
  """
  dims = chex.Dimensions()
  dims['VD'], dims['BL'] = d_table.shape, tokens.shape
  chex.assert_shape(d_x, dims['BLD'])
  d_x = d_x * jnp.sqrt(float(dims.D)).astype(d_x.dtype)
  vocab = sharding.split_over(mesh, 'vocab', dims.V)
  rows = sharding.split_over(mesh, 'rows', dims.B)

  def add(part, tokens, d_x):
    if rows:
      tokens = lax.all_gather(tokens, rows, tiled=True)
      d_x = lax.all_gather(d_x, rows, tiled=True)
    at = tokens - (lax.axis_index(vocab) * len(part) if vocab else 0)
    at = jnp.where((at >= 0) & (at < len(part)), at, len(part))
    return part.at[at].add(d_x.astype(part.dtype), mode='drop')

  if mesh is None:
    return add(d_table, tokens, d_x)
  by_rows, by_vocab = PartitionSpec(rows or None), PartitionSpec(vocab or None)
  return jax.shard_map(
    add,
    mesh=mesh,
    in_specs=(by_vocab, by_rows, by_rows),
    out_specs=by_vocab,
    check_vma=False,  # Nothing is differentiated through it.
  )(d_table, tokens, d_x)


def layer_inputs(
  cfg: ModelConfig,
  params: Params,
  tokens: jax.Array,
  x: jax.Array,
  mesh: Mesh | None = None,
) -> jax.Array | None:
  """What each layer gets of its own, if cfg.layer_input_dim: [N, B, L, E].

  Args:
    cfg, params, tokens, mesh: see `forward`.
    x: [B, L, D], `embed` of the tokens.
  """
  if not cfg.layer_input_dim:
    return None
  dims = cfg.dims()
  dims['BL'] = tokens.shape
  chex.assert_shape(x, dims['BLD'])
  y = dense(params, 'layer_input_proj', x) * dims.D**-0.5
  y = rms_norm(
    y.reshape(dims['BLNE']), params['layer_input_norm'], cfg.norm_offset
  )
  table = params['layer_input_embedding']
  own = embed(table, tokens, x.dtype, mesh, dims.E).reshape(dims['BLNE'])
  return jnp.moveaxis((y + own) * 2**-0.5, 2, 0)


def forward(
  cfg: ModelConfig,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  *,
  dtype: jnp.dtype = jnp.float32,
  remat: str = 'none',
  implementation: str = 'xla',
  mesh: Mesh | None = None,
  embedded: jax.Array | None = None,
) -> jax.Array:
  """Tokens to final hidden states; logits are left to mt/gemma/loss.py.

  Args:
    cfg: the model's shape.
    params: see mt/gemma/parameters.py.
    tokens: [B, L] int32.
    positions: [B, L] int32, from 0 in each segment.
    segment_ids: [B, L] int32, 0 for padding, 1, 2, … for packed examples.
    dtype: of the activations.
    remat: what the backward pass recomputes, a key of REMAT.
    implementation: of attention, a name in mt/gemma/fused.py.
    mesh: of several devices, see mt/gemma/sharding.py.
    embedded: [B, L, D], `embed` of the tokens, if it is there already.

  Returns:
    [B, L, D], after the final norm.
  """
  dims = cfg.dims()
  dims['BL'] = tokens.shape
  chex.assert_shape([tokens, positions, segment_ids], dims['BL'])
  chex.assert_type([tokens, positions, segment_ids], int)
  chex.assert_shape(params['embedding'], dims['VD'])
  x = embedded
  if x is None:
    x = embed(params['embedding'], tokens, dtype, mesh)
  chex.assert_shape(x, dims['BLD'])
  x = sharding.constrain(x, mesh, _ACTIVATIONS)
  inputs = layer_inputs(cfg, params, tokens, x, mesh)
  shared = {}  # Kind of layer -> keys and values of the last that has any.
  for group in cfg.groups():
    turns, layers = [], []
    for stack in group:
      scanned = params[stack.name], attention.layer_kinds(stack.cfg)[1], inputs
      if inputs is not None:
        scanned = *scanned[:2], inputs[np.array(stack.layers)]
      if stack.turn > 1:
        split = functools.partial(_split_leading, stack.turn)
        scanned = jax.tree.map(split, scanned)
      layers.append(scanned)
      attend = fused.make_attend(stack.cfg, implementation, segment_ids, mesh)
      rope = attention.rope_tables(stack.cfg, positions)
      layer_fn = _make_layer(stack.cfg, attend, rope, shared, mesh)
      turns.append((stack.turn, REMAT[remat](layer_fn)))
    kept = {}
    if cfg.sharing_layers and not shared:
      kept = {s.cfg.attention: _no_kv(s.cfg, x) for s in group}

    def period(carry, layers, turns=turns):
      for (turn, layer_fn), scanned in zip(turns, layers, strict=True):
        if turn > 1:
          carry, _ = lax.scan(layer_fn, carry, scanned)
        else:
          carry, _ = layer_fn(carry, scanned)
      return carry, None

    (x, shared), _ = lax.scan(period, (x, kept), layers)
  return rms_norm(x, params['final_norm'], cfg.norm_offset)


def _make_layer(cfg, attend, rope, shared, mesh):
  """A step of the scan over the layers of a stack.

  It carries x and, by the kind of layer, the keys and values that later layers
  share: none in most models.
  """

  def layer_fn(carry, per_layer):
    (x, kept), (layer, kind, layer_input) = carry, per_layer
    if len(cfg.attention) == 1:
      kind = 'LG'.index(cfg.attention)  # Nothing is computed for the other.
    sin, cos = (table[kind] for table in rope)

    def attend_to(q, *kv):
      kv = kv or shared[cfg.attention]
      return attend(q, *kv, kind), kv

    x, kv = block(cfg, layer, x, sin, cos, attend_to, layer_input)
    kept = {k: kv if k == cfg.attention else old for k, old in kept.items()}
    return (sharding.constrain(x, mesh, _ACTIVATIONS), kept), None

  return layer_fn


def _no_kv(cfg, x):
  zeros = jnp.zeros((*x.shape[:2], cfg.num_kv_heads, cfg.head_dim), x.dtype)
  return zeros, zeros


def _split_leading(size, x):
  return x.reshape(-1, size, *x.shape[1:])
