"""A quantised file is dequantised once, and its copy is worth as much."""

import chex
import gguf
import jax
import numpy as np
import pytest

from mt.base import cache
from mt.gemma import parameters
from mt.gemma import sharding
from mt.weights import gguf_file
from mt.weights import kept
from mt.weights import mapped
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gguf
from tests.fixtures.hf_fixture import assert_same

_Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(mapped, '_WORTH', range(2**31))


@pytest.fixture
def dequantised(monkeypatch):
  """The names of the tensors that are read from the GGUF file."""
  names, read = [], gguf_file.read_tensor
  monkeypatch.setattr(
    gguf_file,
    'read_tensor',
    lambda file, name, *rows: names.append(name) or read(file, name, *rows),
  )
  return names


def _read(path, keep=kept.FLOAT32):
  return hf_fixture.open_folder(path).read_kept(keep)


def _copies():
  return list((cache.cache_dir() / 'float32').glob('*'))


def test_the_second_time_nothing_is_dequantised(
  tmp_path, monkeypatch, dequantised
):
  path = tmp_path / 'a.gguf'
  tiny_gguf.write(path, quant=_Q8)
  with monkeypatch.context() as m:
    m.setattr(mapped, '_WORTH', range(0))
    wanted = _read(path)
  assert not _copies()
  first = _read(path)
  del dequantised[:]
  second = _read(path)
  assert not dequantised
  for params, crc in first, second:
    assert_same(params, wanted[0])
    assert crc == wanted[1]
  # A step may consume what is mapped; the copy stays what it is.
  embedding = second[0]['embedding']
  jax.jit(lambda x: x * 2, donate_argnums=0)(embedding).block_until_ready()
  assert_same(_read(path)[0], wanted[0])
  keep = kept.Keep(dict.fromkeys(parameters.flatten(wanted[0]), 'bfloat16'))
  found, crc = _read(path, keep)
  assert not dequantised
  rounded = jax.tree.map(lambda x: x.astype('bfloat16'), wanted[0])
  chex.assert_trees_all_equal(found, rounded)
  chex.assert_trees_all_equal_dtypes(found, rounded)
  assert crc == wanted[1]


def test_what_a_step_takes_is_no_mapped_file(tmp_path):
  """It would be copied when the step itself holds the most."""
  path = tmp_path / 'a.gguf'
  tiny_gguf.write(path, quant=_Q8)
  wanted, _ = _read(path)
  # Only a CPU computes from the map.
  mapped_in, _ = sharding.on_host(lambda: _read(path))
  own, _ = _read(path, kept.Keep(donated=True))
  (copy,) = _copies()
  with copy.open('r+b') as f:  # In place, which a map shows.
    f.write(bytes(copy.stat().st_size))
  assert not mapped_in['embedding'].any()
  assert_same(own, wanted)


def test_another_file_and_a_copy_that_is_not_whole_are_read_anew(
  tmp_path, dequantised
):
  path = tmp_path / 'a.gguf'
  _, params = tiny_gguf.write(path, quant=_Q8)
  _read(path)
  double = jax.tree.map(lambda x: 2 * np.asarray(x), params)
  tiny_gguf.write(path, quant=_Q8, change=lambda params: double)
  wanted = np.asarray(_read(path)[0]['embedding'])
  np.testing.assert_allclose(wanted, double['embedding'], atol=0.1)
  (copy,) = _copies()  # In place of the one before.
  for damaged in (copy.read_bytes()[:-1], b''):
    copy.write_bytes(damaged)
    del dequantised[:]
    np.testing.assert_array_equal(_read(path)[0]['embedding'], wanted)
    assert dequantised


@pytest.mark.parametrize('full', [False, True])
def test_a_disk_without_room_ends_no_run(tmp_path, monkeypatch, full):
  path = tmp_path / 'a.gguf'
  tiny_gguf.write(path, quant=_Q8)
  wanted = _read(path)
  (copy,) = _copies()
  copy.unlink()
  if full:
    monkeypatch.setattr(mapped, '_SPARE', 2**60)
  else:
    copy.parent.rmdir()
    copy.parent.write_text('a file, where a folder is to be')
  found = _read(path)
  assert_same(found[0], wanted[0])
  assert found[1] == wanted[1]
  assert full or copy.parent.is_file()


def test_what_is_not_quantised_is_not_kept_twice(tmp_path):
  tiny_gguf.write(tmp_path / 'a.gguf')
  _read(tmp_path / 'a.gguf')
  assert not _copies()
