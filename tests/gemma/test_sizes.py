"""The table of sizes against what was published, from shapes alone.

Widths, heads, windows, caps and bases: the `gemma` package, or the config.json
on the Hugging Face Hub. Parameters of Gemma 1 and 2: table 2 of arXiv
2403.08295 and of 2408.00118, which count an embedding of 256,128 rows; of Gemma
3: table 1 of 2503.19786, in millions, and the Hub's exact count of each.
"""

import dataclasses
import importlib
import math
import sys
import types
from unittest import mock

import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import parameters
from mt.gemma import sizes
from tests.fixtures import gemma_oracle

_NAMES = [name for name in sizes.SIZES if name != 'debug']
_V3 = 262_144
# What the `gemma` package (3.0.2) is too old for.
# name: rows, layers, width, feed-forward, heads, KV heads, head, query dim,
#   window, RoPE bases (local, global), RoPE factor, caps (attention, final)
_PUBLISHED = {
  'gemma3_270m': (
    (_V3, 18, 640, 2048, 4, 1, 256, 256),
    (512, 10_000, 1_000_000, 1, None, None),
  ),
  'gemma4_e2b': (
    (_V3, 35, 1536, 6144, 8, 1, 256, 1),
    (512, 10_000, 1_000_000, 1, None, 30),
  ),
  'gemma4_e4b': (
    (_V3, 42, 2560, 10240, 8, 2, 256, 1),
    (512, 10_000, 1_000_000, 1, None, 30),
  ),
  'gemma4_12b': (
    (_V3, 48, 3840, 15360, 16, 8, 256, 1),
    (1024, 10_000, 1_000_000, 1, None, 30),
  ),
  'gemma4_31b': (
    (_V3, 60, 5376, 21504, 32, 16, 256, 1),
    (1024, 10_000, 1_000_000, 1, None, 30),
  ),
}
# name: embedding, the rest.
_PAPER_EXACT = {
  'gemma1_2b': (524_550_144, 1_981_884_416),
  'gemma1_7b': (786_825_216, 7_751_248_896),
  'gemma2_2b': (590_118_912, 2_024_517_888),
  'gemma2_9b': (917_962_752, 8_324_201_984),
  'gemma2_27b': (1_180_237_824, 26_047_480_320),
}
_PAPER_MILLIONS = {
  'gemma3_1b': (302, 698),
  'gemma3_4b': (675, 3209),
  'gemma3_12b': (1012, 10_759),
  'gemma3_27b': (1416, 25_600),
}
# name: rows of the embedding there, all parameters. From 4B up 64 rows more
# than the vocabulary has, and a vision tower with its projection.
_HUB = {
  'gemma1_2b': (256_000, 2_506_172_416),
  'gemma1_7b': (256_000, 8_537_680_896),
  'gemma2_2b': (256_000, 2_614_341_888),
  'gemma2_9b': (256_000, 9_241_705_984),
  'gemma2_27b': (256_000, 27_227_128_320),
  'gemma3_270m': (262_144, 268_098_176),
  'gemma3_1b': (262_144, 999_885_952),
  'gemma3_4b': (262_208, 4_300_079_472),
  'gemma3_12b': (262_208, 12_187_325_040),
  'gemma3_27b': (262_208, 27_432_406_640),
}
_SIGLIP = 416_866_032  # The 417M of table 1; its width is 1152.


def _count(cfg):
  """(embedding, the rest)."""
  shapes = parameters.shapes(cfg)
  embedding = math.prod(shapes['embedding'])
  return embedding, sum(map(math.prod, shapes.values())) - embedding


@pytest.mark.parametrize('name', _PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
  cfg = sizes.SIZES[name]
  shape, rest = _PUBLISHED[name]
  assert shape[:-1] == (
    cfg.vocab_size,
    cfg.num_layers,
    cfg.embed_dim,
    cfg.hidden_dim,
    cfg.num_heads,
    cfg.num_kv_heads,
    cfg.head_dim,
  )
  assert math.isclose(cfg.query_scale, shape[-1] ** -0.5)
  assert rest == (
    cfg.window,
    cfg.rope_base_local,
    cfg.rope_base_global,
    cfg.rope_scale_global,
    cfg.attn_softcap,
    cfg.final_softcap,
  )
  generation = int(name[5])
  assert cfg.post_norms == (generation > 1)
  assert cfg.qk_norm == (generation >= 3)


@pytest.mark.parametrize('name', _NAMES)
def test_global_layers_stand_where_they_should(name):
  # Gemma 2 begins with a local layer, and every second one is global; from
  # Gemma 3 on every sixth is, in the E2B every fifth.
  cfg = sizes.SIZES[name]
  every = {'1': 1, '2': 2, '3': 6, '4': 6}[name[5]]
  every = 5 if name == 'gemma4_e2b' else every
  expected = [(i + 1) % every == 0 for i in range(cfg.num_layers)]
  np.testing.assert_array_equal(attention.layer_kinds(cfg), expected)
  assert attention.windows(cfg)['G'] > 100_000
  if every > 1:
    assert attention.windows(cfg)['L'] == cfg.window < 100_000


@pytest.mark.parametrize('name', _PAPER_EXACT)
def test_parameters_are_those_of_the_paper(name):
  assert _count(sizes.SIZES[name]) == _PAPER_EXACT[name]


@pytest.mark.parametrize('name', _PAPER_MILLIONS)
def test_parameters_are_those_of_the_paper_in_millions(name):
  # From 4B up the paper's embedding is 0.6 % larger than 262,144 rows are.
  embedding, rest = (x / 1e6 for x in _count(sizes.SIZES[name]))
  paper_embedding, paper_rest = _PAPER_MILLIONS[name]
  assert math.isclose(embedding, paper_embedding, rel_tol=0.01)
  assert round(rest) == paper_rest


@pytest.mark.parametrize('name', _HUB)
def test_parameters_are_those_of_the_checkpoint(name):
  cfg = sizes.SIZES[name]
  rows, total = _HUB[name]
  count = sum(_count(dataclasses.replace(cfg, vocab_size=rows)))
  if rows == 262_208:
    count += _SIGLIP + 1152 * (cfg.embed_dim + 1)
  assert count == total


# In billions; ai.google.dev/gemma/docs/core/model_card_4 counts the towers of
# vision and audio, 0.45, and calls those that are no look-up effective.
@pytest.mark.parametrize(
  ('name', 'effective', 'everything'),
  [('gemma4_e2b', 2.3, 5.1), ('gemma4_e4b', 4.5, 8.0)],
)
def test_parameters_of_gemma_4(name, effective, everything):
  cfg = sizes.SIZES[name]
  total = sum(_count(cfg)) / 1e9
  looked_up = math.prod(parameters.shapes(cfg)['layer_input_embedding']) / 1e9
  assert total + 0.45 == pytest.approx(everything, abs=0.1)
  assert total - looked_up == pytest.approx(effective, abs=0.15)


@pytest.fixture(scope='module')
def package_configs():
  """TransformerConfig of the `gemma` package, behind imports it never uses."""
  vision = types.ModuleType('gemma.multimodal.vision')
  vision.SigLiPFromPatches = type('SigLiPFromPatches', (), {})
  stubs = {'einops': types.ModuleType('einops'), vision.__name__: vision}
  with mock.patch.dict(sys.modules, stubs):
    transformer = importlib.import_module('gemma.transformer')
    yield transformer.TransformerConfig


@pytest.mark.parametrize(
  'name', [name for name in _NAMES if name not in _PUBLISHED]
)
def test_sizes_are_the_packages(name, package_configs):
  """Counts do not tell a wrong window, scale, base or cap."""
  cfg = sizes.SIZES[name]
  make = getattr(package_configs, name.replace('gemma1', 'gemma'))
  if name in ('gemma3_4b', 'gemma3_12b', 'gemma3_27b'):
    want = make(text_only=True)
  else:
    want = make() if name == 'gemma3_1b' else make(cache_size=None)
  kinds = ''.join(
    'L' if 'LOCAL' in t.name else 'G' for t in want.attention_types
  )
  theirs = sizes.ModelConfig(
    vocab_size=want.num_embed,
    num_layers=want.num_layers,
    embed_dim=want.embed_dim,
    hidden_dim=want.hidden_dim,
    num_heads=want.num_heads,
    num_kv_heads=want.num_kv_heads,
    head_dim=want.head_dim,
    query_scale=want.query_pre_attn_scalar(),
    attention=kinds,
    window=want.sliding_window_size,
    rope_base_local=want.local_base_frequency,
    rope_base_global=want.global_base_frequency,
    rope_scale_global=want.global_scale_factor,
    attn_softcap=want.attn_logits_soft_cap,
    final_softcap=want.final_logit_softcap,
    qk_norm=want.use_qk_norm,
    post_norms=want.use_post_attn_norm and want.use_post_ffw_norm,
  )
  assert want.local_scale_factor == 1.0
  assert (
    dataclasses.replace(cfg, attention=gemma_oracle.layer_kinds(cfg)) == theirs
  )
