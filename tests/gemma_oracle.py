"""The `gemma` package's model with our parameters: the oracle.

`gemma.modules`, `gemma.layers` and `gemma.positional_embeddings` (3.0.2) import
without TensorFlow; `gemma.transformer` does not, so that the blocks are put
together here the way its `Transformer.__call__` does it.
"""

import functools

from gemma import layers as gemma_layers
from gemma import modules as gemma_modules
import jax
import jax.numpy as jnp

# Compiling is most of what these tests take: without optimising, half of it.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


def layer_kinds(cfg):
  pattern = cfg.attention * cfg.num_layers
  return pattern[: cfg.num_layers]


def layer(cfg, stacked, n):
  """Layer n of our parameters in the layout of gemma.modules.Block."""
  ours = {k: v[n] for k, v in stacked.items()}
  h, k, a = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

  def heads(name, count):  # [D, count * A] -> [count, D, A]
    return ours[name].reshape(-1, count, a).swapaxes(0, 1)

  attn = {'attn_vec_einsum': {'w': ours['o'].reshape(h, a, -1)}}
  if h == k:
    w = jnp.stack([heads('q', h), heads('k', h), heads('v', h)])
    attn['qkv_einsum'] = {'w': w}
  else:
    attn['q_einsum'] = {'w': heads('q', h)}
    attn['kv_einsum'] = {'w': jnp.stack([heads('k', k), heads('v', k)])}
  if cfg.qk_norm:
    attn['_query_norm'] = {'scale': ours['q_norm']}
    attn['_key_norm'] = {'scale': ours['k_norm']}
  out = {
    'pre_attention_norm': {'scale': ours['attn_norm']},
    'attn': attn,
    'pre_ffw_norm': {'scale': ours['ffw_norm']},
    'mlp': {
      'gating_einsum': jnp.stack([ours['gate'], ours['up']]),
      'linear': ours['down'],
    },
  }
  if cfg.post_norms:
    out['post_attention_norm'] = {'scale': ours['post_attn_norm']}
    out['post_ffw_norm'] = {'scale': ours['post_ffw_norm']}
  return out


def block(cfg, kind):
  """The oracle's layer of a kind, L or G."""
  types = gemma_modules.AttentionType
  local = kind == 'L'
  return gemma_modules.Block(
    num_heads=cfg.num_heads,
    num_kv_heads=cfg.num_kv_heads,
    embed_dim=cfg.embed_dim,
    head_dim=cfg.head_dim,
    hidden_dim=cfg.hidden_dim,
    use_post_attn_norm=cfg.post_norms,
    use_post_ffw_norm=cfg.post_norms,
    attn_type=types.LOCAL_SLIDING if local else types.GLOBAL,
    query_pre_attn_scalar=cfg.query_scale,
    transpose_gating_einsum=False,
    rope_base_frequency=(
      cfg.rope_base_local if local else cfg.rope_base_global
    ),
    rope_scale_factor=1.0 if local else cfg.rope_scale_global,
    attn_logits_soft_cap=cfg.attn_softcap,
    sliding_window_size=cfg.window,
    use_qk_norm=cfg.qk_norm,
  )


def logits(cfg, params, tokens, positions, mask):
  """What gemma.transformer.Transformer computes, with our parameters.

  The mask [B, L, L] says what is causal and not padding; the oracle adds the
  sliding windows. It counts a key's slot there and not its position, so that
  packed rows would come out wrong.
  """
  embedder = gemma_modules.Embedder(cfg.vocab_size, cfg.embed_dim)
  table = {'params': {'input_embedding': params['embedding']}}
  x = embedder.apply(table, tokens, method='encode')
  for n, kind in enumerate(layer_kinds(cfg)):
    weights = {'params': layer(cfg, params['layers'], n)}
    _, x = block(cfg, kind).apply(weights, x, positions, None, mask)
  norm = {'params': {'scale': params['final_norm']}}
  x = gemma_layers.RMSNorm().apply(norm, x)
  out = embedder.apply(table, x, method='decode')
  if cfg.final_softcap is not None:
    out = jnp.tanh(out / cfg.final_softcap) * cfg.final_softcap
  return out
