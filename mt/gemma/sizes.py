"""The published sizes of Gemma, as data.

Dimension letters, used in every shape and every assertion of this project:
  B batch rows, L tokens in a row, S cache slots, D model width, H query heads,
  K key/value heads, G = H / K query heads per key/value head, A head width,
  F feed-forward width, V vocabulary, N layers, R LoRA rank, T targets,
  E width of a layer's own input.

Sources: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786)
and the configurations published with their checkpoints; for Gemma 4 also
google-deepmind/gemma, gemma/gm/nn/gemma4.
"""

from collections.abc import Iterator
import dataclasses
import functools

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
    qk_norm: RMSNorm on queries and keys (from Gemma 3 on).
    post_norms: RMSNorm after attention and feed-forward (from Gemma 2 on).
    norm_offset: the factor of a norm is its weight plus this.

  Gemma 4 has besides:
    value_norm: RMSNorm without a weight on values.
    layer_scale: what leaves a layer is multiplied by a weight of the layer.
    global_head_dim: A of global layers, whose shape is then another; None where
      all layers have one shape.
    global_kv_heads: K of global layers.
    keys_are_values: values are the keys before their norm, in global layers.
    rope_part_global: of a head in global layers, how much RoPE turns.
    sharing_layers: so many of the last layers have no keys and values: they see
      those of the last layer of their kind that has.
    sharing_hidden_dim: F of these.
    layer_input_dim: E; 0 where layers have no input of their own.
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
  norm_offset: float = 1.0
  value_norm: bool = False
  layer_scale: bool = False
  global_head_dim: int | None = None
  global_kv_heads: int | None = None
  keys_are_values: bool = False
  rope_part_global: float = 1.0
  sharing_layers: int = 0
  sharing_hidden_dim: int | None = None
  layer_input_dim: int = 0

  def groups(self) -> tuple[tuple['Stack', ...], ...]:
    """The layers in order: of each group, its stacks take turns.

    Gemma 1 to 3 are one stack. Gemma 4 is periods of local layers and a global
    one; those that share keys and values are a group of their own.
    """
    if self.global_head_dim is None:
      return ((Stack('layers', tuple(range(self.num_layers)), 1, self),),)
    own = self.num_layers - self.sharing_layers
    groups = [self._group('', range(own))]
    if self.sharing_layers:
      groups.append(self._group('_sharing', range(own, self.num_layers)))
    return tuple(groups)

  def _group(self, suffix, numbers):
    """The local layers among these numbers, and the global ones."""
    hidden_dim = self.sharing_hidden_dim if suffix else None
    local = {'keys_are_values': False}
    global_ = {
      'head_dim': self.global_head_dim,
      'num_kv_heads': self.global_kv_heads or self.num_kv_heads,
    }
    stacks = []
    for kind, name, own in ('L', 'local', local), ('G', 'global', global_):
      layers = tuple(n for n in numbers if self.kind(n) == kind)
      cfg = dataclasses.replace(
        self,
        num_layers=len(layers),
        hidden_dim=hidden_dim or self.hidden_dim,
        attention=kind,
        global_head_dim=None,
        global_kv_heads=None,
        sharing_layers=len(layers) if suffix else 0,
        **own,
      )
      turn = self.attention.count(kind)
      stacks.append(Stack(name + suffix, layers, turn, cfg))
    return tuple(stacks)

  def stacks(self) -> Iterator['Stack']:
    """All stacks, one after the other."""
    return (stack for group in self.groups() for stack in group)

  def kind(self, layer: int) -> str:
    """'L' or 'G'."""
    return self.attention[layer % len(self.attention)]

  def kv_layer(self, layer: int) -> int:
    """The layer whose keys and values a layer sees."""
    own = self.num_layers - self.sharing_layers
    same = (n for n in range(own)[::-1] if self.kind(n) == self.kind(layer))
    return layer if layer < own else next(same)

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
      E=self.layer_input_dim,
    )


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers of one shape: their parameters have a common leading axis.

  Attributes:
    name: where they lie in the tree of parameters.
    layers: their numbers in the model.
    turn: how many of them follow each other, before the next stack's turn.
    cfg: the shape of a model of these layers alone.
  """

  name: str
  layers: tuple[int, ...]
  turn: int
  cfg: ModelConfig


# What the models of a generation have in common. The table below adds, in the
# order of ModelConfig: N, D, F, H, K, A, query_scale.
_gemma1 = functools.partial(ModelConfig, 256_128)
_gemma2 = functools.partial(
  ModelConfig,
  256_128,
  attention='LG',
  window=4096,
  attn_softcap=50.0,
  final_softcap=30.0,
  post_norms=True,
)
_gemma3 = functools.partial(
  ModelConfig,
  262_144,
  attention='LLLLLG',
  rope_base_global=1_000_000.0,
  qk_norm=True,
  post_norms=True,
)
_gemma4 = functools.partial(
  _gemma3,
  final_softcap=30.0,
  norm_offset=0.0,
  value_norm=True,
  layer_scale=True,
  global_head_dim=512,
  rope_part_global=0.25,
)
_LONG = {'window': 1024, 'rope_scale_global': 8.0}

# fmt: off
SIZES: dict[str, ModelConfig] = {
  'gemma1_2b': _gemma1(18, 2048, 16_384, 8, 1, 256, 256**-0.5),
  'gemma1_7b': _gemma1(28, 3072, 24_576, 16, 16, 256, 256**-0.5),
  'gemma2_2b': _gemma2(26, 2304, 9216, 8, 4, 256, 256**-0.5),
  'gemma2_9b': _gemma2(42, 3584, 14_336, 16, 8, 256, 256**-0.5),
  'gemma2_27b': _gemma2(46, 4608, 36_864, 32, 16, 128, 144**-0.5),
  'gemma3_270m': _gemma3(18, 640, 2048, 4, 1, 256, 256**-0.5, window=512),
  'gemma3_1b': _gemma3(26, 1152, 6912, 4, 1, 256, 256**-0.5, window=512),
  'gemma3_4b': _gemma3(34, 2560, 10_240, 8, 4, 256, 256**-0.5, **_LONG),
  'gemma3_12b': _gemma3(48, 3840, 15_360, 16, 8, 256, 256**-0.5, **_LONG),
  'gemma3_27b': _gemma3(62, 5376, 21_504, 32, 16, 128, 168**-0.5, **_LONG),
  'gemma4_e2b': _gemma4(35, 1536, 6144, 8, 1, 256, 1.0,
    attention='LLLLG', window=512, sharing_layers=20,
    sharing_hidden_dim=12_288, layer_input_dim=256),
  'gemma4_e4b': _gemma4(42, 2560, 10_240, 8, 2, 256, 1.0,
    window=512, sharing_layers=18, layer_input_dim=256),
  'gemma4_12b': _gemma4(48, 3840, 15_360, 16, 8, 256, 1.0,
    window=1024, global_kv_heads=1, keys_are_values=True),
  'gemma4_31b': _gemma4(60, 5376, 21_504, 32, 16, 256, 1.0,
    window=1024, global_kv_heads=4, keys_are_values=True),
  # Random weights only: for tests and configs/debug.py.
  'debug': ModelConfig(512, 3, 64, 128, 4, 1, 16, 16**-0.5,
    attention='LLG', window=16, rope_base_global=1_000_000.0, qk_norm=True,
    post_norms=True),
}
# fmt: on
