"""Gemma 1 to 4 text models as pure functions over a plain pytree.

The parameters are those of the table in mt/gemma/parameters.py, the letters of
all shapes those of mt/gemma/sizes.py. One `lax.scan` goes through the layers,
so that the compile time does not grow with their number. Tests compare values
and gradients with the modules of the `gemma` package, and those of Gemma 4 with
transformers.
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

from mt.gemma import attention
from mt.gemma import embedding
from mt.gemma import fused
from mt.gemma import products
from mt.gemma import quantize
from mt.gemma import sharding
from mt.gemma import stacks
from mt.gemma.parameters import Params
from mt.gemma.sizes import ModelConfig

# Inside a scan `prevent_cse` is not needed.
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
_policies = jax.checkpoint_policies
# What is kept of a layer's forward pass for the backward pass, by train.remat.
REMAT = {
  # All.
  'none': lambda layer: layer,
  # The results of products with weights.
  'dots': functools.partial(
    _checkpoint, policy=_policies.dots_with_no_batch_dims_saveable
  ),
  # What goes into the layer, and the result of `down`.
  'narrow': functools.partial(
    _checkpoint, policy=_policies.save_only_these_names('narrow')
  ),
  # What goes into the layer.
  'full': _checkpoint,
}

_ACTIVATIONS = ('rows', 'length', 'width')


# Norms and GeGLU are computed again in the backward pass, also under `none`: it
# takes no longer, and much less memory (docs/measurements.md).
@functools.partial(_checkpoint, static_argnums=2)
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


@_checkpoint
def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """gelu(gate) * up, the tanh form of GELU (arXiv 1606.08415, 2002.05202)."""
  chex.assert_equal_shape([gate, up])
  return jax.nn.gelu(gate) * up


def dense(
  layer: Params, name: str, x: jax.Array, heads: tuple[int, int] | None = None
) -> jax.Array:
  """x @ matrix, plus its low-rank partner if there is one.

  Args:
    layer: the parameters of a layer.
    name: of the matrix [in, out], which may be quantised.
    x: [B, L, in], or [B, H, L, A] if `in` is heads and their width.
    heads: (H, A), if `out` is heads and their width.

  Returns:
    [B, L, out], or [B, H, L, A].
  """
  x, w = join_heads(x), layer[name]
  if isinstance(w, quantize.Quantized):
    y = quantize.matmul(x, w)
  else:
    chex.assert_rank([x, w], [3, 2])
    y = products.matmul(x, w.astype(x.dtype))
  if name + '_lora_a' in layer:
    a, b = layer[name + '_lora_a'], layer[name + '_lora_b']
    low = products.matmul(x, a.astype(x.dtype))
    y = y + products.matmul(low, b.astype(x.dtype))
  return split_heads(y, heads)


def join_heads(x: jax.Array) -> jax.Array:
  """[B, H, L, A] -> [B, L, H * A]; what has no heads stays as it is."""
  if x.ndim == 3:
    return x
  chex.assert_rank(x, 4)
  return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def split_heads(x: jax.Array, heads: tuple[int, int] | None) -> jax.Array:
  """[B, L, H * A] -> [B, H, L, A], if there are heads (H, A)."""
  chex.assert_rank(x, 3)
  return x if heads is None else x.reshape(*x.shape[:2], *heads).swapaxes(1, 2)


def block(
  cfg: ModelConfig,
  layer: Params,
  x: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
  attend: Callable[..., tuple[jax.Array, Any]],
  layer_input: jax.Array | None = None,
  dense: Callable[..., jax.Array] = dense,
) -> tuple[jax.Array, Any]:
  """One transformer layer.

  Args:
    cfg: the shape of the layers of its stack.
    layer: the parameters of this layer, without the leading axis N.
    x: [B, L, D].
    sin, cos: [B, L, A / 2] float32, of this layer's kind.
    attend: (q [B, H, L, A], k, v [B, K, L, A]) -> ([B, H, L, A], extra). In
      training it masks, in decoding it reads and writes the cache. In layers
      without keys and values of their own it gets q alone.
    layer_input: [B, L, E], if cfg.layer_input_dim.
    dense: `dense`, or what takes its place, such as `dense_of_heads`.

  Returns:
    [B, L, D], and `extra`.
  """
  dims = cfg.dims()
  dims['BL'] = x.shape[:2]
  chex.assert_shape(x, dims['BLD'])

  def norm(name, x):
    return rms_norm(x, layer[name], cfg.norm_offset)

  y = norm('attn_norm', x)
  qkv = _queries_keys_values(cfg, layer, y, sin, cos, dense)
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


def _queries_keys_values(cfg, layer, y, sin, cos, dense):
  """Of [B, L, D]: q [B, H, L, A] and, where the layer has them, k, v."""
  q = dense(layer, 'q', y, (cfg.num_heads, cfg.head_dim))
  if cfg.qk_norm:
    q = rms_norm(q, layer['q_norm'], cfg.norm_offset)
  q = attention.apply_rope(q, sin, cos) * cfg.query_scale
  if cfg.sharing_layers:
    return (q,)
  kv_heads = cfg.num_kv_heads, cfg.head_dim
  k = v = dense(layer, 'k', y, kv_heads)
  if not cfg.keys_are_values:
    v = dense(layer, 'v', y, kv_heads)
  if cfg.qk_norm:
    k = rms_norm(k, layer['k_norm'], cfg.norm_offset)
  if cfg.value_norm:
    v = rms_norm(v, None, 0.0)
  return q, attention.apply_rope(k, sin, cos), v


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
    params: see mt/gemma/parameters.py.
    tokens: [B, L] int32.
    positions: [B, L] int32, from 0 in each segment.
    segment_ids: [B, L] int32, 0 for padding, 1, 2, … for packed examples.
    dtype: of the activations.
    remat: what the backward pass recomputes, a key of REMAT.
    implementation: of attention, a name in mt/gemma/fused.py.
    mesh: of several devices, see mt/gemma/sharding.py.
    embedded: [B, L, D], embedding.embed of the tokens, if it is there already.

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
    x = embedding.embed(params['embedding'], tokens, dtype, mesh)
  chex.assert_shape(x, dims['BLD'])
  x = sharding.constrain(x, mesh, _ACTIVATIONS)
  inputs = layer_inputs(cfg, params, tokens, x, mesh)

  def make_layer(cfg, shared):
    attend = fused.make_attend(cfg, implementation, segment_ids, mesh)
    rope = attention.rope_tables(cfg, positions)
    product = dense_of_heads if implementation == 'splash' else dense
    layer = _make_layer(cfg, attend, rope, shared, mesh, product)
    return REMAT[remat](layer)

  x = stacks.scan(cfg, params, x, inputs, make_layer)
  return rms_norm(x, params['final_norm'], cfg.norm_offset)


def _make_layer(cfg, attend, rope, shared, mesh, dense):
  """The step of a scan over the layers of a stack, see stacks.scan."""

  def layer(carry, per_layer):
    (x, kept), (params, kind, layer_input) = carry, per_layer
    if len(cfg.attention) == 1:  # A constant: the other kind's tables go.
      kind = 'LG'.index(cfg.attention)
    sin, cos = (table[kind] for table in rope)

    def attend_to(q, *kv):
      kv = kv or shared[cfg.attention]
      return attend(q, *kv, kind), kv

    x, kv = block(cfg, params, x, sin, cos, attend_to, layer_input, dense)
    kept = {k: kv if k == cfg.attention else old for k, old in kept.items()}
    return (sharding.constrain(x, mesh, _ACTIVATIONS), kept), None

  return layer


def layer_inputs(
  cfg: ModelConfig,
  params: Params,
  tokens: jax.Array,
  x: jax.Array,
  mesh: Mesh | None = None,
) -> jax.Array | None:
  """Gemma 4's input of each layer, or None in other models: [N, B, L, E].

  `x` is `embedding.embed` of the tokens; for the other arguments see `forward`.
  """
  if not cfg.layer_input_dim:
    return None
  dims = cfg.dims()
  dims['BL'] = tokens.shape
  chex.assert_shape(x, dims['BLD'])
  y = dense(params, 'layer_input_proj', x) * dims.D**-0.5
  y = y.reshape(dims['BLNE'])
  y = rms_norm(y, params['layer_input_norm'], cfg.norm_offset)
  table = params['layer_input_embedding']
  own = embedding.embed(table, tokens, x.dtype, mesh, dims.E)
  own = own.reshape(dims['BLNE'])
  return jnp.moveaxis((y + own) * 2**-0.5, 2, 0)


def dense_of_heads(
  layer: Params, name: str, x: jax.Array, heads: tuple[int, int] | None = None
) -> jax.Array:
  """`dense` for a TPU: see `dense` for the arguments, products.of_heads why."""
  chex.assert_rank(x, {3, 4})
  w, has_heads = layer[name], x.ndim == 4 or heads
  if isinstance(w, quantize.Quantized) or not has_heads:
    return dense(layer, name, x, heads)
  y = products.of_heads(x, w, heads)
  if name + '_lora_a' in layer:
    low = products.of_heads(x, layer[name + '_lora_a'])
    y = y + products.of_heads(low, layer[name + '_lora_b'], heads)
  return y
