"""Where lines begin, against a naive loop; what is kept of a large file."""

import hashlib
import itertools
import os

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from mt.base import errors
from mt.data import bitext
from mt.data import line_index
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import write


def _lines(path):
  made = line_index.index(str(path), 'x')
  content, at = path.read_bytes(), made.starts.tolist()
  assert made.digest == hashlib.sha256(content).hexdigest()
  return [content[a:b] for a, b in itertools.pairwise(at)]


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.sampled_from([b'\n', b'\r\n', b'a', b'bcd', '\u2028'.encode()])),
  st.sampled_from([1, 2, 3, 7, 1 << 22]),
)
def test_as_a_loop_finds_them(tmp_path_factory, parts, chunk):
  path = tmp_path_factory.getbasetemp() / 'lines'
  for mark in (b'', BOM):
    write(path, mark + b''.join(parts))
    with pytest.MonkeyPatch.context() as m:
      m.setattr(line_index, '_CHUNK', chunk)
      with open(path, 'rb') as f:
        f.seek(len(mark))
        assert _lines(path) == list(f)


@pytest.fixture
def large(tmp_path, monkeypatch):
  """All files are large and old; what was written into the cache."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(line_index, '_SMALL', 0)
  return lambda: sorted((tmp_path / 'cache/mt/texts').glob('*'))


def _rewrite(path, content, time):
  path.write_bytes(content)
  os.utime(path, ns=(time, time))


def test_the_index_of_a_large_file_is_kept(tmp_path, monkeypatch, large):
  path = tmp_path / 'x.tsv'
  _rewrite(path, b'a\tb\nc\td\n', 10**18)
  text = bitext.open_bitext([path], 'en-fr')
  kept = large()
  assert len(kept) == 1 and len(text) == 2
  with monkeypatch.context() as m:
    m.setattr(line_index, '_write', None)  # Nobody looks for lines again.
    again = bitext.open_bitext([path], 'en-fr')
  assert again.digest == text.digest and again.read() == text.read()
  # The same size, another time; and a file that is just being written.
  _rewrite(path, b'a\tb\tc\nd\n', 10**18 + 1)
  with pytest.raises(errors.UserError, match='holds no ids'):
    bitext.open_bitext([path], 'en-fr')
  assert len(large()) == 2
  path.write_bytes(b'a\tb\ne\tf\n')
  assert bitext.open_bitext([path], 'en-fr').read()[1].source == 'e'
  assert len(large()) == 2


def test_of_a_large_text_a_sample_is_looked_at(tmp_path, monkeypatch):
  path = write(
    tmp_path / 'x.tsv', ''.join(f'a {n}\tb {n}\n' for n in range(99))
  )
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 98)
  monkeypatch.setattr(bitext, '_SAMPLE', 8)
  text = bitext.open_bitext([path], 'en-fr')
  assert [p.source for p in text.sample.pairs][::7] == ['a 0', 'a 98']
  assert bitext.describe(text) == (
    f'{path}: 99 lines, 8 of them looked at: 8 pairs'
  )
