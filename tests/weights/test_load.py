"""What is the same for all formats: what a fork has added, and what is gone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import hf
from mt.weights import load
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal

_CFG = flax_fixture.FAMILIES['gemma3']
_KEY = jax.random.key(0)  # Of the seed that all fixtures open with.


def _add_rows(monkeypatch, published=False):
  """As a fork would: a gate that begins with zeros, a matrix that does not."""
  gate = parameters.Parameter(
    'layers/attn_gate',
    'ND(HA)',
    ('layers', 'embed', 'heads'),
    'attn_gate',
    'self_attn.gate_proj',
    init='zeros',
    published=published,
  )
  extra = dataclasses.replace(
    gate,
    path='layers/extra',
    gguf='extra',
    hf='mlp.extra',
    init='normal',
  )
  table = parameters.table
  monkeypatch.setattr(parameters, 'table', lambda c: (*table(c), gate, extra))


def _write(kind, tmp_path):
  """The file of an unchanged Gemma; (how to open it, its parameters)."""
  if kind == 'gguf':
    _, params = tiny_gguf.write(tmp_path / 'a.gguf')
    return lambda: hf_fixture.load(tmp_path / 'a.gguf')[1], params
  if kind == 'hf':
    _, params = hf_fixture.write_folder(tmp_path)
    return lambda: hf_fixture.load(tmp_path)[1], params
  params = flax_fixture.tiny_params(_CFG)
  flax_fixture.save(tmp_path / 'a', _CFG, params)
  (tmp_path / 'tokenizer.model').write_bytes(gguf_fixture.train_proto())
  return lambda: flax_fixture.open_weights(tmp_path / 'a').read(), params


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The tiny size counts as a published one."""
  monkeypatch.setitem(sizes.SIZES, 'tiny', _CFG)


@pytest.mark.parametrize('kind', ('gguf', 'hf', 'flax'))
def test_what_a_fork_has_added_begins_with_its_initial_values(
  tmp_path, monkeypatch, kind
):
  read, params = _write(kind, tmp_path)
  _add_rows(monkeypatch)
  found = read()
  gate, extra = (found['layers'].pop(n) for n in ('attn_gate', 'extra'))
  assert gate.shape == extra.shape == (2, 32, 64)
  assert not np.any(gate)
  # Variance 1 / fan-in, another one in each layer, the same in each run.
  assert 0.9 < jnp.std(extra) * 32**0.5 < 1.1
  assert not np.array_equal(extra[0], extra[1])
  np.testing.assert_array_equal(extra, read()['layers']['extra'])
  hf_fixture.assert_same(found, params)


@pytest.mark.parametrize('kind', ('gguf', 'hf', 'flax'))
def test_what_is_published_must_be_there(tmp_path, monkeypatch, kind):
  read, _ = _write(kind, tmp_path)
  _add_rows(monkeypatch, published=True)
  refusal(read, tmp_path, 'attn_gate' if kind != 'hf' else 'gate_proj')


def test_what_a_fork_has_written_is_read(tmp_path, monkeypatch):
  _add_rows(monkeypatch)
  params = gguf_fixture.tiny_params(_CFG)
  assert params['layers'].keys() >= {'attn_gate', 'extra'}
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  hf.write(tmp_path, _CFG, params, tok)
  hf_fixture.assert_same(load.read(hf.open_folder(tmp_path), _KEY)[0], params)
  # In one layer and not in the other it is damage, and no new parameter.
  path = tmp_path / 'model.safetensors'
  tensors = load_file(path)
  del tensors['model.layers.1.self_attn.gate_proj.weight']
  save_file(tensors, path)
  refusal(lambda: hf_fixture.load(tmp_path), 'layers.1.self_attn.gate_proj')
