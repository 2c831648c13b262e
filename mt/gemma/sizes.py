"""The published sizes of Gemma, as data.

Dimension letters, used in every shape and every assertion of this project:
  B batch rows, L tokens in a row, S cache slots, D model width, H query heads,
  K key/value heads, G = H / K query heads per key/value head, A head width,
  F feed-forward width, V vocabulary, N layers, R LoRA rank, T targets.

Sources: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786)
and the configurations published with their checkpoints.
"""

import dataclasses

import chex


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shape of one Gemma text model.

  Attributes:
    vocab_size: V, rows of the embedding (tied with the output layer).
    num_layers: N.
    embed_dim: D.
    hidden_dim: F.
    num_heads: H.
    num_kv_heads: K; 1 is multi-query, H is multi-head attention.
    head_dim: A.
    query_scale: factor on the queries before the attention product.
    attention: pattern of 'L' (sliding window) and 'G' (global), repeated over
      the layers.
    window: tokens a local layer sees, the current one included.
    rope_base_local: RoPE wavelength base of local layers.
    rope_base_global: RoPE wavelength base of global layers.
    rope_scale_global: positions are divided by it in global layers.
    attn_softcap: attention logits become cap * tanh(logits / cap).
    final_softcap: the same for the output logits.
    qk_norm: RMSNorm on queries and keys (Gemma 3).
    post_norms: RMSNorm after attention and feed-forward (Gemma 2 and 3).
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  hidden_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  query_scale: float
  attention: str = 'G'
  window: int | None = None
  rope_base_local: float = 10_000.0
  rope_base_global: float = 10_000.0
  rope_scale_global: float = 1.0
  attn_softcap: float | None = None
  final_softcap: float | None = None
  qk_norm: bool = False
  post_norms: bool = False

  def dims(self) -> chex.Dimensions:
    """The sizes that the model fixes, by letter; others are set on the way.

    For example `dims['BL'] = tokens.shape`, then `dims['BLD']`; (HA) stands for
    H * A in one axis: `dims['ND(HA)']`.
    """
    return chex.Dimensions(
      V=self.vocab_size,
      N=self.num_layers,
      D=self.embed_dim,
      F=self.hidden_dim,
      H=self.num_heads,
      K=self.num_kv_heads,
      A=self.head_dim,
    )


def _gemma1(layers, width, hidden, heads, kv_heads):
  return ModelConfig(
    256_128, layers, width, hidden, heads, kv_heads, 256, 256**-0.5
  )


def _gemma2(layers, width, hidden, heads, kv_heads, head_dim, query_dim):
  return ModelConfig(
    256_128,
    layers,
    width,
    hidden,
    heads,
    kv_heads,
    head_dim,
    query_dim**-0.5,
    attention='LG',
    window=4096,
    attn_softcap=50.0,
    final_softcap=30.0,
    post_norms=True,
  )


def _gemma3(
  layers, width, hidden, heads, kv_heads, head_dim, query_dim, window, scale
):
  return ModelConfig(
    262_144,
    layers,
    width,
    hidden,
    heads,
    kv_heads,
    head_dim,
    query_dim**-0.5,
    attention='LLLLLG',
    window=window,
    rope_base_global=1_000_000.0,
    rope_scale_global=scale,
    qk_norm=True,
    post_norms=True,
  )


SIZES: dict[str, ModelConfig] = {
  'gemma1_2b': _gemma1(18, 2048, 16_384, 8, 1),
  'gemma1_7b': _gemma1(28, 3072, 24_576, 16, 16),
  'gemma2_2b': _gemma2(26, 2304, 9216, 8, 4, 256, 256),
  'gemma2_9b': _gemma2(42, 3584, 14_336, 16, 8, 256, 256),
  'gemma2_27b': _gemma2(46, 4608, 36_864, 32, 16, 128, 144),
  'gemma3_270m': _gemma3(18, 640, 2048, 4, 1, 256, 256, 512, 1.0),
  'gemma3_1b': _gemma3(26, 1152, 6912, 4, 1, 256, 256, 512, 1.0),
  'gemma3_4b': _gemma3(34, 2560, 10_240, 8, 4, 256, 256, 1024, 8.0),
  'gemma3_12b': _gemma3(48, 3840, 15_360, 16, 8, 256, 256, 1024, 8.0),
  'gemma3_27b': _gemma3(62, 5376, 21_504, 32, 16, 128, 168, 1024, 8.0),
  # Random weights only: for tests and configs/debug.py.
  'debug': ModelConfig(
    512,
    3,
    64,
    128,
    4,
    1,
    16,
    16**-0.5,
    attention='LLG',
    window=16,
    rope_base_global=1_000_000.0,
    qk_norm=True,
    post_norms=True,
  ),
}
