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
  """The shape of one Gemma text model."""

  vocab_size: int  # V, rows of the embedding, which is the output layer too.
  num_layers: int  # N.
  embed_dim: int  # D.
  hidden_dim: int  # F.
  num_heads: int  # H.
  num_kv_heads: int  # K; 1 is multi-query, H is multi-head attention.
  head_dim: int  # A.
  query_scale: float  # Factor on the queries before the attention product.
  # 'L' is a local layer (sliding window), 'G' a global one; this pattern is
  # repeated over the layers.
  attention: str = 'G'
  window: int | None = None  # Tokens a local layer sees, the current one too.
  rope_base_local: float = 10_000.0  # Base of RoPE's wavelengths.
  rope_base_global: float = 10_000.0
  rope_scale_global: float = 1.0  # Global layers divide positions by it.
  attn_softcap: float | None = None  # Logits become cap * tanh(logits / cap).
  final_softcap: float | None = None  # The same for the output logits.
  qk_norm: bool = False  # RMSNorm on queries and keys (from Gemma 3 on).
  post_norms: bool = (
    False  # RMSNorm after attention and feed-forward (Gemma 2).
  )
  norm_offset: float = 1.0  # The factor of a norm is its weight plus this.

  # Gemma 4 alone.
  value_norm: bool = False  # RMSNorm without a weight on values.
  layer_scale: bool = False  # What leaves a layer is multiplied by a weight.
  # A and K of global layers; None for A where all layers have one shape, for K
  # where it is that of local layers.
  global_head_dim: int | None = None
  global_kv_heads: int | None = None
  keys_are_values: bool = False  # In global layers, the keys before their norm.
  rope_part_global: float = 1.0  # How much of a head RoPE turns there.
  # So many of the last layers have no keys and values of their own: they see
  # those of the last layer of their kind ('L' or 'G') that has.
  sharing_layers: int = 0
  sharing_hidden_dim: int | None = None  # F of these, if it is another.
  layer_input_dim: int = 0  # E; 0 where layers have no input of their own.

  def groups(self) -> tuple[tuple['Stack', ...], ...]:
    """The layers in order: of each group, its stacks take turns.

    Gemma 1 to 3 are one group of one stack. In Gemma 4 some local layers and a
    global one take turns; layers that share keys and values are a second group.
    """
    if self.global_head_dim is None:
      return ((Stack('layers', tuple(range(self.num_layers)), 1, self),),)
    own = self.num_layers - self.sharing_layers
    groups = [self._group(range(own), sharing=False)]
    if self.sharing_layers:
      groups.append(self._group(range(own, self.num_layers), sharing=True))
    return tuple(groups)

  def _group(self, numbers, sharing):
    """A stack of the local layers among these, and one of the global ones."""
    of_kind = {
      'L': {'keys_are_values': False},
      'G': {
        'head_dim': self.global_head_dim,
        'num_kv_heads': self.global_kv_heads or self.num_kv_heads,
      },
    }
    stacks = []
    for kind, name in ('L', 'local'), ('G', 'global'):
      layers = tuple(n for n in numbers if self.kind(n) == kind)
      cfg = dataclasses.replace(
        self,
        num_layers=len(layers),
        hidden_dim=(sharing and self.sharing_hidden_dim) or self.hidden_dim,
        attention=kind,
        global_head_dim=None,
        global_kv_heads=None,
        sharing_layers=len(layers) if sharing else 0,
        **of_kind[kind],
      )
      name += '_sharing' if sharing else ''
      stacks.append(Stack(name, layers, self.attention.count(kind), cfg))
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
  """Layers of one shape: their parameters have a common leading axis."""

  name: str  # Where they are in the tree of parameters.
  layers: tuple[int, ...]  # Their numbers in the model.
  turn: int  # So many of them follow each other, before the next stack's turn.
  cfg: ModelConfig  # The shape of a model of these layers alone.


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
