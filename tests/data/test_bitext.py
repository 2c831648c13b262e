"""Parallel text on disk: what is read of it."""

import json

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text
from tests.fixtures.bitext_files import tuples


@pytest.mark.parametrize('last', [True, False])
@pytest.mark.parametrize('ending', ['\n', '\r\n'])
def test_three_columns(tmp_path, ending, last):
  content = f'1\tHi!\tSalut !{ending}7b\tlol no\tmdr non'
  text = open_text(tmp_path, content + (ending if last else ''), bad=0)
  assert tuples(text) == [('1', 'Hi!', 'Salut !'), ('7b', 'lol no', 'mdr non')]
  assert (len(text), text.num_lines, text.unusable) == (2, 2, {})
  assert text.notes == ()


def test_two_columns(tmp_path):
  text = open_text(tmp_path, 'Hi!\tSalut !\nno\tnon\n', bad=0)
  assert tuples(text) == [('1', 'Hi!', 'Salut !'), ('2', 'no', 'non')]


def test_line_endings_may_be_mixed(tmp_path):
  text = open_text(tmp_path, '1\ta\tb\r\n2\tc\td\n3\te\tf\r\n4\tg\th\r', bad=0)
  assert [p.target for p in text.read()] == ['b', 'd', 'f', 'h']
  text = open_text(tmp_path, 'a\r\nb\n', 'c\nd\r\n', suffix='.txt', bad=0)
  assert tuples(text) == [('1', 'a', 'c'), ('2', 'b', 'd')]


@pytest.mark.parametrize('columns', [(3, 1), ('English', 'français')])
def test_chosen_columns(tmp_path, columns):
  content = 'français\tn\tEnglish\nb\t1\ta\nd\t2\tc\n'
  text = open_text(tmp_path, content, columns=columns, bad=0)
  header = isinstance(columns[0], str)
  rows = [('1', 'English', 'français'), ('2', 'a', 'b'), ('3', 'c', 'd')]
  assert tuples(text) == rows[header:]  # A header is no pair, but a line.
  assert text.num_lines == len(text) == 3 - header


def test_turned_round(tmp_path):
  text = open_text(tmp_path, '1\ta\tb\n2\tc\td\n', turned=True, bad=0)
  assert tuples(text) == [('1', 'b', 'a'), ('2', 'd', 'c')]


@pytest.mark.parametrize('columns', [(), ('x.src', 'x.tgt')])
def test_json_lines(tmp_path, columns):
  content = ''.join(
    json.dumps({'en': s, 'x': {'src': t, 'tgt': s}, 'fr': t}) + '\n'
    for s, t in [('a "b"', 'é\u2028'), ('c', '\U0001f600')]
  )
  text = open_text(tmp_path, content, suffix='.jsonl', columns=columns, bad=0)
  rows = [('1', 'a "b"', 'é\u2028'), ('2', 'c', '\U0001f600')]
  if columns:
    rows = [(n, t, s) for n, s, t in rows]
  assert tuples(text) == rows


def test_aligned_files(tmp_path):
  # A tab and a quote are characters there.
  text = open_text(tmp_path, 'a\tb\n"c\n', 'é\n d\t \n', suffix='.txt', bad=0)
  assert tuples(text) == [('1', 'a\tb', 'é'), ('2', '"c', ' d\t ')]
  assert text.where == f'{tmp_path}/x0.txt + {tmp_path}/x1.txt'


_any_text = st.text(
  # A surrogate has no UTF-8, a NUL is refused, the others are layout.
  st.characters(exclude_categories=['Cs'], exclude_characters='\0\t\n\r'),
).filter(str.strip)


@settings(deadline=None)  # Disks are slow at times.
@given(
  pairs=st.lists(st.tuples(_any_text, _any_text), min_size=1, max_size=8),
  kind=st.sampled_from(['two', 'three', 'jsonl', 'aligned']),
  ending=st.sampled_from(['\n', '\r\n']),
  mark=st.booleans(),
  data=st.data(),
)
def test_what_is_written_is_read_back(
  tmp_path_factory, pairs, kind, ending, mark, data
):
  def whole(column):
    return (BOM if mark else b'') + ''.join(x + ending for x in column).encode()

  ids = [str(n + 1) for n in range(len(pairs))]
  if kind == 'aligned':
    columns = [whole(c) for c in zip(*pairs, strict=True)]
  elif kind == 'jsonl':
    columns = [whole(json.dumps({'en': s, 'fr': t}) for s, t in pairs)]
  elif kind == 'two':
    columns = [whole('\t'.join(row) for row in pairs)]
  else:
    ids = [f'é{n}' for n in ids]
    columns = [
      whole('\t'.join((n, *row)) for n, row in zip(ids, pairs, strict=True))
    ]
  suffix = '.jsonl' if kind == 'jsonl' else '.tsv'
  # A text may begin with the character that a mark is made of.
  assume(mark or not any(c.startswith(BOM) for c in columns))
  text = open_text(
    tmp_path_factory.getbasetemp(), *columns, suffix=suffix, bad=0
  )
  rows = [(n, *row) for n, row in zip(ids, pairs, strict=True)]
  assert tuples(text) == rows
  which = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
  assert text.read(which) == [rows[i] for i in which]
  assert text.read(np.array(which, np.int64)) == [rows[i] for i in which]
