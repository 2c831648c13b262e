"""The table of parameters, and that all else follows from a row of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mt.gemma import embedding
from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from tests.fixtures import gemma_oracle

FAMILIES = gemma_oracle.FAMILIES
_CFG = FAMILIES['gemma3']
_NEW = parameters.Parameter(
  'layers/gate_of_heads',
  'ND(HA)',
  ('layers', 'embed', 'heads'),
  'attn_gate',
  'self_attn.gate_proj',
  lora=True,
  published=False,
)


@functools.cache
def _init(cfg):
  init = functools.partial(parameters.init, cfg)
  return jax.jit(init)(jax.random.key(0))


@pytest.mark.parametrize('name', [*FAMILIES, 'debug', 'gemma3_270m'])
def test_rows_of_the_table_agree_with_themselves(name):
  cfg = FAMILIES.get(name) or sizes.SIZES[name]
  rows, shapes = parameters.table(cfg), parameters.shapes(cfg)
  assert [p.path for p in rows] == list(shapes)
  by_letter = {
    'V': cfg.vocab_size,
    'N': cfg.num_layers,
    'D': cfg.embed_dim,
    'F': cfg.hidden_dim,
    'A': cfg.head_dim,
    '(HA)': cfg.num_heads * cfg.head_dim,
    '(KA)': cfg.num_kv_heads * cfg.head_dim,
  }
  for p in rows:
    letters = p.shape.replace('(HA)', 'h').replace('(KA)', 'k')
    letters = [{'h': '(HA)', 'k': '(KA)'}.get(x, x) for x in letters]
    assert shapes[p.path] == tuple(by_letter[x] for x in letters)
    assert len(p.axes) == len(letters)
    assert p.stacked == (letters[0] == 'N') == (p.axes[0] == 'layers')
    assert p.norm == ('norm' in p.name) == (p.init == 'zeros')
    assert p.published and p.lora == (p.stacked and not p.norm)
  for names in ([p.path for p in rows], [p.gguf for p in rows]):
    assert len(set(names)) == len(rows)
  assert len({p.hf for p in rows}) == len(rows)
  assert len({p.name for p in rows}) == len(rows)


@pytest.mark.parametrize('name', FAMILIES)
def test_names_of_files_are_those_of_the_family(name):
  """Gemma 1 has no norm after attention, nor any of queries and keys."""
  cfg = FAMILIES[name]
  rows = {p.path: p for p in parameters.table(cfg)}
  assert ('layers/q_norm' in rows) == ('layers/k_norm' in rows) == cfg.qk_norm
  assert ('layers/post_attn_norm' in rows) == cfg.post_norms
  before = rows['layers/ffw_norm'].hf
  after = 'post_attention_layernorm'
  assert before == ('pre_feedforward_layernorm' if cfg.post_norms else after)


def test_flat_and_nested_are_the_same():
  params = _init(_CFG)
  flat = parameters.flatten(params)
  assert flat.keys() == parameters.shapes(_CFG).keys()
  back = parameters.unflatten(flat)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_init_has_unit_gain():
  params = _init(_CFG)
  assert {
    k: v.shape for k, v in parameters.flatten(params).items()
  } == parameters.shapes(_CFG)
  fan_in = dict.fromkeys(('q', 'k', 'v', 'gate', 'up'), _CFG.embed_dim)
  fan_in |= {'o': _CFG.num_heads * _CFG.head_dim, 'down': _CFG.hidden_dim}
  for key, leaf in params['layers'].items():
    std = 0 if 'norm' in key else fan_in[key] ** -0.5
    assert np.std(leaf) == pytest.approx(std, rel=0.1), key
  # No two layers, and no two matrices, may start out the same.
  q, k, v = (np.asarray(params['layers'][m]) for m in 'qkv')
  assert not np.array_equal(k, v) and not np.array_equal(q[0], q[1])
  # Times sqrt(D) in `embed`, that is token vectors of variance 1.
  tokens = np.arange(_CFG.vocab_size)[None]
  x = embedding.embed(params['embedding'], tokens, jnp.float32)
  assert np.std(x) == pytest.approx(1.0, rel=0.1)


def test_a_new_row_is_all_that_a_new_matrix_needs(monkeypatch):
  cfg = dataclasses.replace(_CFG, vocab_size=64)
  published = parameters.table
  monkeypatch.setattr(parameters, 'table', lambda cfg: (*published(cfg), _NEW))
  n, d, ha = cfg.num_layers, cfg.embed_dim, cfg.num_heads * cfg.head_dim
  assert parameters.shapes(cfg)[_NEW.path] == (n, d, ha)
  init = jax.jit(functools.partial(parameters.init, cfg))
  params = init(jax.random.key(0))
  leaf = params['layers'][_NEW.name]
  assert leaf.shape == (n, d, ha)
  assert np.std(leaf) == pytest.approx(d**-0.5, rel=0.1)

  axes = ml_collections.ConfigDict({'data': 1, 'fsdp': 2, 'tensor': 4})
  mesh = sharding.make_mesh(axes)
  spec = jax.sharding.PartitionSpec
  place = sharding.of_parameter(cfg, mesh, _NEW.path, leaf.shape)
  assert place.spec == spec(None, ('fsdp',), ('tensor',))
  assert place.shard_shape(leaf.shape) == (n, d // 2, ha // 4)

  assert _NEW.name in lora.targets(cfg)
  key = jax.random.key(1)
  factors, frozen = lora.partition(cfg, params, 'lora', rank=3, key=key)
  assert factors[f'{_NEW.path}_lora_a'].shape == (n, d, 3)
  assert factors[f'{_NEW.path}_lora_b'].shape == (n, 3, ha)
  assert frozen[_NEW.path] is leaf
  place = sharding.of_parameter(cfg, mesh, f'{_NEW.path}_lora_b', (n, 3, ha))
  assert place.spec == spec(None, None, ('tensor',))
  factors[f'{_NEW.path}_lora_b'] += 1
  folded = lora.fold(lora.merge(factors, frozen, lora_scale=1.0))
  assert not np.array_equal(folded['layers'][_NEW.name], leaf)
  trained, _ = lora.partition(cfg, params, _NEW.path, rank=3, key=key)
  assert set(trained) == {_NEW.path}
