"""Lines that cannot be used, or are long: counted, and how many may be."""

import itertools
import os
import tracemalloc

import pytest

from mt.base import errors
from mt.data import bitext
from mt.data import lines
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text
from tests.fixtures.bitext_files import tuples
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal


def _row(n, content):
  return f'{n}\ta{n}\t'.encode() + content


BAD_ROWS = [
  (b'', 'an empty line'),
  (b' \t\t ', 'an empty line'),
  (b'2\ta', 'fewer than 3 columns'),
  (b'no columns', 'fewer than 3 columns'),
  (b'2\ta\tb\t', 'more than 3 columns'),
  (b'2\ta\tb\tc', 'more than 3 columns'),
  (b'2\t \tb', 'an empty source'),
  (b'2\ta\t', 'an empty target'),
  (b'2\ta\tb\0', 'a NUL character'),
  (b'2\tcaf\xe9\tb', 'not UTF-8'),
  (b'2\ta\xe2\x80\t\xa8b', 'not UTF-8'),
]


@pytest.mark.parametrize('start', [b'', BOM], ids=['', 'BOM'])
@pytest.mark.parametrize('ending', [b'\n', b'\r\n'], ids=['LF', 'CRLF'])
@pytest.mark.parametrize(('row', 'reason'), BAD_ROWS)
def test_a_bad_line_is_counted(tmp_path, row, reason, ending, start):
  rows = [b'1\ta\tb', row, b'3\tc\td', b'4\te\tf', row]
  for last in (ending, b''):
    text = open_text(tmp_path, start + ending.join(rows) + last)
    ids = ['1', '3', '4']
    assert [p.id for p in text.read()] == ids
    seen = 5 if row or last else 4  # An empty line needs an end.
    assert text.num_lines == seen and len(text) == 3
    assert text.unusable == {reason: (seen - 3, 2)}
    assert f'{seen} lines, 3 pairs' in bitext.describe(text)
    assert f'{seen - 3} {reason} (the first in line 2)' in bitext.describe(text)


@pytest.mark.parametrize('start', [b'', BOM], ids=['', 'BOM'])
def test_line_numbers_count_the_header(tmp_path, start):
  rows = [b'en\tfr', b'a\tb', b'', b'c\t', b'\xff\td', b'e\tf', b'', b'\tf']
  content = start + b''.join(row + b'\n' for row in rows)
  text = open_text(tmp_path, content, columns=('en', 'fr'))
  assert tuples(text) == [('2', 'a', 'b'), ('6', 'e', 'f')]
  assert text.num_lines == 7
  assert text.unusable == {
    'an empty line': (2, 3),
    'an empty target': (1, 4),
    'not UTF-8': (1, 5),
    'an empty source': (1, 8),
  }
  rows = [b'fr\tx\ten\r', *(b'%d\t\ta%d' % (n, n) for n in range(3)), b'b']
  text = open_text(tmp_path, start + b'\n'.join(rows), columns=('en', 'fr'))
  assert text.unusable == {'fewer than 3 columns': (1, 5)}
  assert tuples(text)[2] == ('4', 'a2', '2')


@pytest.mark.parametrize('marks', [*itertools.product([b'', BOM], repeat=2)])
def test_bad_aligned_lines_are_counted(tmp_path, marks):
  sources = [b'a', b'', b'', b'd', b'e\xff', b'f', b'g']
  targets = [b'A', b'B', b'', b' ', b'E', b'\0', b'G']
  contents = [
    mark + b''.join(x + b'\n' for x in side)
    for mark, side in zip(marks, (sources, targets), strict=True)
  ]
  text = open_text(tmp_path, *contents, suffix='.txt')
  assert tuples(text) == [('1', 'a', 'A'), ('7', 'g', 'G')]
  assert text.num_lines == 7
  assert text.unusable == {
    'an empty source': (1, 2),
    'an empty line': (1, 3),
    'an empty target': (1, 4),
    'not UTF-8': (1, 5),
    'a NUL character': (1, 6),
  }
  noted = [n.split(':')[0][-6:] for n in text.notes]
  assert noted == [f'x{n}.txt' for n in (0, 1) if marks[n]]


def test_bad_json_lines_are_counted(tmp_path):
  rows = [
    '{"en": "a", "fr": "b"}',
    '{"en": "a", "fr": 3}',
    '[' * 50_000,
    '{"en": "\\ud800", "fr": "b"}',
    '',
    '{"en": "a\\nb", "fr": "b"}',
    '{"en": "a", "fr": "b", "n": ' + '1' * 10_000 + '}',
    '{"en": "", "fr": "b"}',
    '{"en": "c", "fr": "d"}',
  ]
  text = open_text(tmp_path, '\n'.join(rows), suffix='.jsonl')
  assert tuples(text) == [('1', 'a', 'b'), ('9', 'c', 'd')]
  assert text.unusable == {
    "no text under 'fr'": (1, 2),
    'not JSON': (2, 3),
    'half a surrogate pair': (1, 4),
    'an empty line': (1, 5),
    'a line break in a text': (1, 6),
    'an empty source': (1, 8),
  }


def test_the_most_frequent_reason_comes_first(tmp_path):
  content = '1\ta\tb\n\n2\ta\n2\ta\n' + '3\ta\t\n' * 1200
  text = bitext.describe(open_text(tmp_path, content))
  assert text.endswith(
    ': 1,204 lines, 1 pairs; not used: '
    '1,200 an empty target (the first in line 5), '
    '2 fewer than 3 columns (the first in line 3), '
    '1 an empty line (the first in line 2)'
  )


def test_a_byte_order_mark_is_left_out_and_noted(tmp_path):
  text = open_text(tmp_path, BOM + b'1\ta\tb\n', bad=0)
  assert tuples(text) == [('1', 'a', 'b')]
  (note,) = text.notes
  assert 'byte-order mark' in note and note in bitext.describe(text)
  # Anywhere else it is a character.
  text = open_text(tmp_path, BOM * 2 + b'1\ta\tb\n' + BOM + b'2\tc\td\n', bad=0)
  assert [p.id for p in text.read()] == ['\ufeff1', '\ufeff2']


def test_ids_that_occur_again_are_kept_and_noted(tmp_path):
  ids = ['7', 'x', '', 'bad', 'x', '7', '', '7']
  rows = [f'{n}\ta{k}\tb' for k, n in enumerate(ids)]
  rows[3] = 'x\t\tb'  # Not used, so it does not count.
  text = open_text(tmp_path, '\n'.join(rows))
  kept = [p.source for p in text.read()]
  assert kept == ['a0', 'a1', 'a2', 'a4', 'a5', 'a6', 'a7']
  (note,) = text.notes
  assert note == '4 ids occur again, the first in line 5; kept'
  assert note in bitext.describe(text)
  # Columns that are chosen have no id among them.
  assert open_text(tmp_path, None, columns=(2, 3)).notes == ()


# Long lines.


def test_a_line_may_be_so_long(tmp_path):
  head = b'1\ta\t'
  long = head + b'x' * (lines.LONGEST - len(head) - 1)
  rows = [long, long + b'xx', b'2\ta\tb', long + b'x' * (2 << 20)]
  for last in (b'', b'\n'):
    text = open_text(tmp_path, b'\n'.join(rows) + last)
    assert [p.id for p in text.read()] == ['1', '2']
    assert len(text.read([0])[0].target) == lines.LONGEST - len(head) - 1
    assert text.num_lines == 4
    assert text.unusable == {'longer than 1,048,576 bytes': (2, 2)}


def _with_a_long_line(path, before, after):
  """64 MB of NULs between; they take no room on most disks."""
  with open(path, 'wb') as f:
    f.write(before)
    f.seek(64 << 20, os.SEEK_CUR)
    f.write(after)


def _peak(call):
  tracemalloc.start()
  try:
    call()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_a_long_line_is_not_held_in_memory(tmp_path):
  x, y = tmp_path / 'x.tsv', tmp_path / 'y.tsv'
  texts = []

  def look(*paths, **options):
    texts.append(
      bitext.open_bitext(paths, 'en-fr', max_bad_fraction=1.0, **options)
    )

  _with_a_long_line(x, b'a\tb\n', b'\nc\td\n')
  assert _peak(lambda: look(x)) < 16 << 20
  write(y, b'a\nb\nc\n')
  assert _peak(lambda: look(x, y)) < 16 << 20
  for text in texts:
    assert text.numbers.tolist() == [1, 3]
    assert text.unusable == {'longer than 1,048,576 bytes': (1, 2)}


def test_a_long_header_is_not_held_in_memory(tmp_path):
  path = tmp_path / 'x.tsv'
  _with_a_long_line(path, b'en\tfr\t', b'\na\tb\tc\n')

  def look():
    text = bitext.open_bitext([path], 'en-fr', ('en', 'fr'))
    assert tuples(text) == [('2', 'a', 'b')]

  assert _peak(look) < 16 << 20


def test_a_long_line_beyond_the_other_file_is_not_held(tmp_path):
  x, y = tmp_path / 'x.en', tmp_path / 'x.fr'
  write(x, b'a\n')
  _with_a_long_line(y, b'b\n', b'\nc\n')
  call = lambda: bitext.open_bitext([x, y], 'en-fr')  # noqa: E731
  peak = _peak(lambda: refusal(call, f'{y} has 3 lines and {x} 1'))
  assert peak < 16 << 20


# How much is put up with.


def test_too_many_bad_lines_stop(tmp_path):
  content = b'1\ta\tb\n' * 6 + b'1\ta\n\n\xff\n1\ta\n'
  refusal(
    lambda: open_text(tmp_path, content, bad=0.25),
    tmp_path / 'x0.tsv',
    '4 of its 10 lines cannot be used',
    '2 fewer than 3 columns (the first in line 7)',
    '1 an empty line (the first in line 8)',
    '1 not UTF-8 (the first in line 9)',
    'data.max_bad_fraction=0.25',
  )
  assert len(open_text(tmp_path, content, bad=0.4)) == 6


def test_without_a_fraction_one_bad_line_stops(tmp_path):
  path = write(tmp_path / 'x.tsv', '1\ta\tb\n' * 999 + '\n')
  refusal(
    lambda: bitext.open_bitext([path], 'en-fr'),
    '1 of its 1,000 lines',
    'data.max_bad_fraction=0;',
  )


@pytest.mark.parametrize('total', [100, 300])
def test_exactly_the_fraction_does_not_stop(tmp_path, total):
  for percent in range(1, 100):  # 0.29 * 100 is a little less than 29.
    bad = percent * total // 100
    content = 'a\tb\n' * (total - bad) + '\n' * bad
    assert len(open_text(tmp_path, content, bad=percent / 100)) == total - bad
    with pytest.raises(errors.UserError):
      open_text(tmp_path, content + '\n', bad=percent / 100)
