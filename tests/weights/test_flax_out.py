"""Parameters in the layout of Google's Flax checkpoints."""

import dataclasses

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import files
from mt.data import tokenizer
from mt.gemma import parameters
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


def test_what_a_fork_adds_keeps_its_axes(tmp_path, monkeypatch, tok):
  axes = 'layers', 'heads', 'embed', None
  mix = parameters.Parameter('mix', 'NHDA', axes, 'mix', 'mix')
  own = parameters._layer_rows
  monkeypatch.setattr(parameters, '_layer_rows', lambda cfg: [*own(cfg), mix])
  cfg = flax_fixture.FAMILIES['gemma3']
  params = parameters.init(cfg, jax.random.key(0))
  _write(tmp_path / 'out', cfg, params, tok, 'float32')
  source = flax_fixture.open_weights(tmp_path / 'out')
  flax_fixture.assert_same(source.read(), params)


@pytest.mark.parametrize(
  ('name', 'field', 'value'),
  [
    ('gemma3', 'rope_scale_global', 4.0),
    ('gemma3', 'window', 12),
    ('gemma3', 'attention', 'LG'),
    ('gemma3', 'final_softcap', 30.0),
    ('gemma3', 'hidden_dim', 64),
    ('gemma2', 'query_scale', 0.5),
    ('gemma1_multi_head', 'rope_base_global', 5e5),
    ('gemma1_multi_head', 'vocab_size', 200),
  ],
)
def test_what_the_layout_cannot_say_is_refused(tok, name, field, value):
  """A checkpoint has shapes alone: all else would be another model's."""
  cfg = flax_fixture.FAMILIES[name]
  assert flax_out.published(cfg, tok) == cfg
  cfg = dataclasses.replace(cfg, **{field: value})
  there = getattr(flax_fixture.FAMILIES[name], field)
  refusal(
    lambda: flax_out.published(cfg, tok),
    f'--to=gemma: {field} is {value!r}, in tiny_{name} {there!r};',
    '--to=hf',
  )


def _with_pieces(tok, stop, *names):
  """The tokenizer's first pieces, and more."""
  model = sp_pb2.ModelProto.FromString(tok.proto)
  del model.pieces[stop:]
  for name in names:
    model.pieces.add(piece=name, score=0.0, type=tokenizer.USER_DEFINED)
  return tokenizer.from_proto(model.SerializeToString(), 'test')


@pytest.mark.parametrize(
  ('rows', 'more'), [(464, [tokenizer.IMAGE]), (464, []), (390, [])]
)
def test_the_embedding_has_the_published_rows(tmp_path, tok, rows, more):
  """Hugging Face's Gemma 3 have more, Gemma 1 and 2 fewer; gemma takes none."""
  published = sizes.SIZES['tiny_gemma3']
  cfg = dataclasses.replace(published, vocab_size=rows)
  params = flax_fixture.tiny_params(cfg)
  _write(tmp_path / 'o', cfg, params, _with_pieces(tok, rows, *more))
  source, n = flax_fixture.open_weights(tmp_path / 'o'), min(rows, 400)
  assert source.config == published
  assert source.tokenizer.vocab_size == n
  assert source.tokenizer.encode('the village') == tok.encode('the village')
  found, ours = source.read(), params['embedding']
  np.testing.assert_array_equal(found['embedding'][:n], ours[:n])
  for row in found['embedding'][n:]:
    np.testing.assert_array_equal(row, ours[tok.pad_id])
  assert found['embedding'].shape == (400, 32)


def test_pieces_without_a_published_row_are_refused(tok):
  cfg = dataclasses.replace(sizes.SIZES['tiny_gemma3'], vocab_size=464)
  tok = _with_pieces(tok, 400, tokenizer.IMAGE, '<fr>')
  refusal(lambda: flax_out.published(cfg, tok), '1 pieces more', "'<fr>'")


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
