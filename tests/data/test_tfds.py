"""MTNT's lines as TFDS reads them, whose quotes swallow lines."""

import csv
import io

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from configs import default
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal

LINES = '1\tso "close" lol\tsi près\n2\t"hi\tsalut\n3\tyo\t"yo\n'


def _train_text(folder, pair, content):
  path = folder / 'train' / f'train.{pair}.tsv'
  path.parent.mkdir()
  write(path, content)
  data = default.get_config().data
  data.update(source=str(folder), tfds_quoting=True)
  (text,) = corpus.read_splits(data, ['train'])['train']
  return text


def _read_as_tfds(path, **knobs):
  return bitext.open_bitext(
    [path], 'en-fr', quotes='tfds', max_bad_fraction=1, **knobs
  )


def test_quotes_swallow_lines(tmp_path):
  text = _train_text(tmp_path, 'en-fr', LINES + 'short\trow\n')
  # The quote before `hi` ends before `yo`; the row is one column short.
  pair = lines.Pair('1', 'so "close" lol', 'si près')
  assert text.read() == [pair]
  assert bitext.describe(text).endswith(
    '3 lines, 1 pairs; not used: 2 fewer than 3 columns (the first in record '
    '2); rows as TFDS counts them'
  )
  content = '\ufeff1\t"a\tb\n2\tc"\td\n3\t\t"e ""f"" g"\n'
  text = _read_as_tfds(write(tmp_path / 'x.tsv', content))
  pairs = [
    lines.Pair('\ufeff1', 'a\tb\n2\tc', 'd'),
    lines.Pair('3', '', 'e "f" g'),
  ]
  assert text.read() == pairs
  assert text.read([1, 0, 1]) == [pairs[i] for i in (1, 0, 1)]


def test_the_other_direction_is_reversed(tmp_path):
  text = _train_text(tmp_path, 'fr-en', LINES)
  assert text.read() == [lines.Pair('1', 'si près', 'so "close" lol')]


def test_a_digest_of_what_tfds_reads(tmp_path):
  path = write(tmp_path / 'x.tsv', '1\ta\tb\n2\tc\td\n')
  other = write(tmp_path / 'y.tsv', '1\ta\tb\n2\tc\td\n')
  digest = _read_as_tfds(path).digest
  assert _read_as_tfds(other).digest == digest
  assert _read_as_tfds(path, reversed_pair=True).digest != digest
  assert bitext.open_bitext([path], 'en-fr').digest != digest
  write(other, '1\ta\tb\n2\tc\tD\n')
  assert _read_as_tfds(other).digest != digest


_bits = st.sampled_from(
  list('"\'aé\\\r\u2028\ufeff') + ['""', '"""', ' "', '" ']
)
_text = st.lists(_bits, max_size=4).map(''.join)
_row = st.lists(_text, max_size=3).map(lambda x: '\t'.join(['1', *x]))


@settings(max_examples=60, deadline=None)  # Disks are slow at times.
@given(
  rows=st.lists(_row, max_size=12),
  ending=st.sampled_from(['\n', '\r\n']),
  last=st.booleans(),
)
def test_as_csv_reader(tmp_path_factory, rows, ending, last):
  text = ending.join(rows) + (ending if last else '')
  path = write(tmp_path_factory.getbasetemp() / 'quotes.tsv', text)
  # A text file as Python opens it: each CR is a LF.
  plain = text.replace('\r\n', '\n').replace('\r', '\n')
  rows = list(csv.reader(io.StringIO(plain), delimiter='\t'))
  expected = [tuple(r[:3]) for r in rows if len(r) > 2]
  if not expected:
    refusal(lambda: _read_as_tfds(path), 'no pair')
    return
  read = _read_as_tfds(path)
  assert read.read() == expected
  short = len(rows) - len(expected)
  assert sum(n for n, _ in read.sample.unusable.values()) == short


@pytest.mark.parametrize(
  'content, words',
  [
    (b'1\ta\tb\n2\t' + b'x' * 200_000 + b'\tc\n', ('line 2', 'field limit')),
    ('1\ta\tb\n'.encode('utf-16'), ('UTF-16',)),
    (b'1\ta\n', ('no pair',)),
    (None, ('cannot read',)),
  ],
)
def test_what_csv_cannot_read(tmp_path, content, words):
  path = tmp_path / 'x.tsv'
  if content is not None:
    write(path, content)
  refusal(lambda: _read_as_tfds(path), path, *words)
