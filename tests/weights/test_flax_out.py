"""Flax checkpoints as this project writes them, against gemma.params."""

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from mt.base import files
from mt.data import tokenizer
from mt.gemma import sizes
from mt.weights import flax_out
from mt.weights import flax_store
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures.refusal import refusal

FAMILIES = flax_fixture.FAMILIES


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The tiny sizes count as published ones."""
  for name, cfg in FAMILIES.items():
    monkeypatch.setitem(sizes.SIZES, f'tiny_{name}', cfg)


@pytest.fixture(scope='module')
def tok():
  return tokenizer.from_proto(gguf_fixture.train_proto(), 'test')


def _write(folder, *args):
  with files.new_folder(folder) as part:
    flax_out.write(part, *args)


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gemma_params_reads_what_is_written(tmp_path, name, dtype, tok):
  cfg = FAMILIES[name]
  params = flax_fixture.tiny_params(cfg)
  folder = tmp_path / 'out'
  on_device = jax.tree.map(jnp.asarray, params)
  _write(folder, cfg, on_device, tok, dtype)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out']
  transposed = name in ('gemma2', 'gemma3')
  want = flax_fixture.nested_tree(cfg, params, transposed=transposed)
  path = str(folder / 'checkpoint')
  read = gemma_params.load_and_format_params(path)['transformer']
  assert jax.tree.structure(read) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(want), strict=True):
    assert x.dtype == dtype
    np.testing.assert_array_equal(x.astype(jnp.float32), y)
  # What the library itself would have saved has the same names.
  flat = gemma_params.load_params(path)
  again = gemma_params.flatten_and_remap_params({'transformer': want})
  assert jax.tree.structure(flat) == jax.tree.structure(again)
  source = flax_fixture.open_weights(folder)
  assert source.config == cfg
  assert source.tokenizer.proto == tok.proto
  flax_fixture.assert_same(source.read(), params)


def test_gating_is_transposed_as_the_library_has_it():
  """gemma/transformer.py 3.0.2, transpose_gating_einsum."""
  plain = {'gemma1_2b', 'gemma1_7b', 'gemma2_2b'}
  for name, cfg in sizes.SIZES.items():
    if not name.startswith('tiny'):
      assert flax_out.is_transposed(cfg) == (name not in plain), name


def test_an_array_in_several_chunks(tmp_path, monkeypatch, tok):
  monkeypatch.setattr(flax_store, '_CHUNK', 1000)
  cfg = FAMILIES['gemma2']
  params = flax_fixture.tiny_params(cfg)
  _write(tmp_path / 'out', cfg, params, tok)
  store = flax_store.open_store(tmp_path / 'out' / 'checkpoint')
  name = 'transformer.embedder.input_embedding'
  array = flax_store.open_array(store, name)
  assert array.chunk_layout.read_chunk.shape == (7, 32)
  flax_fixture.assert_same(
    flax_fixture.open_weights(tmp_path / 'out').read(), params
  )


def test_what_is_there_stays(tmp_path, tok):
  cfg = FAMILIES['gemma3']
  params = flax_fixture.tiny_params(cfg)
  (tmp_path / 'out').mkdir()
  _write(tmp_path / 'out', cfg, params, tok)  # Empty: it may go.
  before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  refusal(
    lambda: _write(tmp_path / 'out', cfg, params, tok),
    tmp_path / 'out',
    'there already',
  )
  assert before == {
    p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()
  }


def test_writing_that_fails_leaves_nothing(tmp_path, monkeypatch, tok):
  cfg = FAMILIES['gemma3']
  params = flax_fixture.tiny_params(cfg)
  (tmp_path / 'file').write_text('')
  refusal(
    lambda: _write(tmp_path / 'file' / 'out', cfg, params, tok),
    'cannot write',
  )
  calls = []
  real = ts.open

  def full(spec, **kwargs):
    calls.append(spec)
    if len(calls) == 5:
      raise ValueError('RESOURCE_EXHAUSTED: No space left on device')
    return real(spec, **kwargs)

  monkeypatch.setattr(ts, 'open', full)
  refusal(
    lambda: _write(tmp_path / 'out', cfg, params, tok),
    'cannot write',
    'No space left',
  )
  assert [p.name for p in tmp_path.iterdir()] == ['file']
