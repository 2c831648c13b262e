"""Parameters in the layout of Google's Flax checkpoints."""

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.base import files
from mt.data import tokenizer
from mt.gemma import sizes
from mt.weights import flax_out
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures.refusal import refusal


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The tiny sizes count as published ones."""
  for name, cfg in flax_fixture.FAMILIES.items():
    monkeypatch.setitem(sizes.SIZES, f'tiny_{name}', cfg)


@pytest.fixture(scope='module')
def tok():
  return tokenizer.from_proto(gguf_fixture.train_proto(), 'test')


def _write(folder, *args):
  with files.new_folder(folder) as part:
    flax_out.write(part, *args)


@pytest.mark.parametrize(
  'name, dtype',
  [
    ('gemma1_multi_query', 'float32'),
    ('gemma1_multi_head', 'bfloat16'),
    ('gemma2', 'float32'),
    ('gemma3', 'bfloat16'),
  ],
)
def test_gemma_params_reads_what_is_written(tmp_path, name, dtype, tok):
  cfg = flax_fixture.FAMILIES[name]
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
    if not name.startswith(('tiny', 'gemma4')):
      assert flax_out.is_transposed(cfg) == (name not in plain), name


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, tok):
  cfg = flax_fixture.FAMILIES['gemma3']

  def full(*_, **__):
    raise ValueError('RESOURCE_EXHAUSTED: No space left on device')

  monkeypatch.setattr(flax_out.ocp.PyTreeCheckpointer, 'save', full)
  refusal(
    lambda: _write(tmp_path / 'out', cfg, flax_fixture.tiny_params(cfg), tok),
    'cannot write',
    'No space left',
  )
  assert not list(tmp_path.iterdir())
