"""MTNT's lines as TFDS reads them, whose quotes swallow lines."""

import csv

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from configs import default
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import mtnt
from tests.data import test_mtnt
from tests.fixtures.refusal import refusal


def _train_texts(source):
  data = default.get_config().data
  data.update(source=str(source), tfds_quoting=True)
  return corpus.read_splits(data, ['train'])['train']


def test_quotes_swallow_lines(tmp_path):
  path = tmp_path / 'train' / 'train.en-fr.tsv'
  path.parent.mkdir()
  path.write_text(test_mtnt.LINES + 'short\trow\n', encoding='utf-8')
  (text,) = _train_texts(tmp_path)
  # The quote before `hi` ends before `yo`; the row is one column short.
  pair = lines.Pair('1', 'so "close" lol', 'si près')
  assert text.read() == [pair] and len(text) == 1
  assert text.num_lines == 3  # A row ends where its quote does: in line 3.
  assert text.unusable == {'fewer than 3 columns': (2, 3)}
  assert 'as TFDS counts them' in bitext.describe(text)
  content = '\ufeff1\t"a\tb\n2\tc"\td\n3\t\t"e ""f"" g"\n'
  path.write_text(content, encoding='utf-8')
  pairs = [
    lines.Pair('\ufeff1', 'a\tb\n2\tc', 'd'),
    lines.Pair('3', '', 'e "f" g'),
  ]
  text = mtnt.read_as_tfds(path)
  assert text.read() == pairs
  assert text.read([1, 0, 1]) == [pairs[i] for i in (1, 0, 1)]


def test_turned_round_as_tfds_reads_it(tmp_path):
  path = tmp_path / 'train' / 'train.fr-en.tsv'
  path.parent.mkdir()
  path.write_text(test_mtnt.LINES, encoding='utf-8')
  (text,) = _train_texts(tmp_path)
  assert text.read() == [lines.Pair('1', 'si près', 'so "close" lol')]


def test_a_digest_of_what_tfds_reads(tmp_path):
  path, other = tmp_path / 'x.tsv', tmp_path / 'y.tsv'
  for p in (path, other):
    p.write_text('1\ta\tb\n2\tc\td\n')
  digest = mtnt.read_as_tfds(path).digest
  assert mtnt.read_as_tfds(other).digest == digest
  assert mtnt.read_as_tfds(path, turned=True).digest != digest
  assert bitext.open_bitext([path], 'en-fr').digest != digest
  other.write_text('1\ta\tb\n2\tc\tD\n')
  assert mtnt.read_as_tfds(other).digest != digest


_bits = st.sampled_from(
  list('"\'aé\\\r\u2028\x00\ufeff') + ['""', '"""', ' "', '" ']
)
_text = st.lists(_bits, max_size=4).map(''.join)
_row = st.lists(_text, min_size=1, max_size=4).map('\t'.join)


@settings(deadline=None)  # Disks are slow at times.
@given(
  rows=st.lists(_row, max_size=12),
  ending=st.sampled_from(['\n', '\r\n']),
  last=st.booleans(),
)
def test_as_csv_reader(tmp_path_factory, rows, ending, last):
  text = ending.join(rows) + (ending if last else '')
  path = tmp_path_factory.getbasetemp() / 'quotes.tsv'
  path.unlink(missing_ok=True)  # To cut a file is slow on ext4.
  path.write_bytes(text.encode())
  # A text file as Python opens it: each CR is a LF.
  plain = text.replace('\r\n', '\n').replace('\r', '\n')
  raws = [line + '\n' for line in plain.split('\n')]
  raws = raws[:-1] + ([raws[-1][:-1]] if raws[-1] != '\n' else [])
  rows = list(csv.reader(raws, delimiter='\t'))
  expected = [tuple(r[:3]) for r in rows if len(r) > 2]
  if expected:
    read = mtnt.read_as_tfds(path)
    assert read.read() == expected
    assert read.num_lines == len(rows)
    bad = sum(count for count, _ in read.unusable.values())
    assert len(read) + bad == len(rows)
  else:
    refusal(lambda: mtnt.read_as_tfds(path), 'no pair')


@settings(deadline=None)
@given(rows=st.lists(st.tuples(_text, _text), min_size=1, max_size=12))
def test_without_it_every_line_is_a_pair(tmp_path_factory, rows):
  # A NUL is refused.
  rows = [(f'{a}x', f'{b}y') for a, b in rows if '\0' not in a + b]
  assume(rows)
  path = tmp_path_factory.getbasetemp() / 'no_quotes.tsv'
  path.unlink(missing_ok=True)  # To cut a file is slow on ext4.
  path.write_bytes(''.join(f'1\t{a}\t{b}\n' for a, b in rows).encode())
  pairs = bitext.open_bitext([path], 'en-fr').read()
  assert [(p.source, p.target) for p in pairs] == rows


@pytest.mark.parametrize(
  'content, words',
  [
    (b'1\ta\tb\n2\t' + b'x' * 200_000 + b'\tc\n', (':2: ', 'field limit')),
    ('1\ta\tb\n'.encode('utf-16'), ('not UTF-8',)),
    (b'1\ta\n', ('no pair',)),
    (None, ('cannot read',)),
  ],
)
def test_what_csv_cannot_read(tmp_path, content, words):
  path = tmp_path / 'x.tsv'
  if content is not None:
    path.write_bytes(content)
  refusal(lambda: mtnt.read_as_tfds(path), path, *words)
