"""Parallel text on disk: what is counted, what is read, what is refused."""

import itertools
import json
import os
import random
import re
import tracemalloc

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mt import bitext
from mt import errors
from mt import lines
from tests.refusal import refusal

BOM = b'\xef\xbb\xbf'


def _write(path, content):
  path.unlink(missing_ok=True)  # To cut a file is slow on ext4.
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _open(tmp_path, *contents, suffix='.tsv', columns=(), bad=1.0, **options):
  """The bitext of one file, or of two aligned ones; bad lines are put up with.

  None as a content leaves the file as it is.
  """
  paths = [tmp_path / f'x{n}{suffix}' for n in range(len(contents))]
  for path, content in zip(paths, contents, strict=True):
    if content is not None:
      _write(path, content)
  return bitext.open_bitext(
    paths, 'en-fr', columns, max_bad_fraction=bad, **options
  )


def _tuples(text):
  return [tuple(p) for p in text.read()]


# Reading.


@pytest.mark.parametrize('last', [True, False])
@pytest.mark.parametrize('ending', ['\n', '\r\n'])
def test_three_columns(tmp_path, ending, last):
  content = f'1\tHi!\tSalut !{ending}7b\tlol no\tmdr non'
  text = _open(tmp_path, content + (ending if last else ''), bad=0)
  assert _tuples(text) == [('1', 'Hi!', 'Salut !'), ('7b', 'lol no', 'mdr non')]
  assert (len(text), text.num_lines, text.unusable) == (2, 2, {})
  assert text.notes == ()


def test_two_columns(tmp_path):
  text = _open(tmp_path, 'Hi!\tSalut !\nno\tnon\n', bad=0)
  assert _tuples(text) == [('1', 'Hi!', 'Salut !'), ('2', 'no', 'non')]


def test_line_endings_may_be_mixed(tmp_path):
  text = _open(tmp_path, '1\ta\tb\r\n2\tc\td\n3\te\tf\r\n4\tg\th\r', bad=0)
  assert [p.target for p in text.read()] == ['b', 'd', 'f', 'h']
  text = _open(tmp_path, 'a\r\nb\n', 'c\nd\r\n', suffix='.txt', bad=0)
  assert _tuples(text) == [('1', 'a', 'c'), ('2', 'b', 'd')]


@pytest.mark.parametrize('columns', [(3, 1), ('English', 'français')])
def test_chosen_columns(tmp_path, columns):
  content = 'français\tn\tEnglish\nb\t1\ta\nd\t2\tc\n'
  text = _open(tmp_path, content, columns=columns, bad=0)
  header = isinstance(columns[0], str)
  rows = [('1', 'English', 'français'), ('2', 'a', 'b'), ('3', 'c', 'd')]
  assert _tuples(text) == rows[header:]  # A header is no pair, but a line.
  assert text.num_lines == len(text) == 3 - header


def test_turned_round(tmp_path):
  text = _open(tmp_path, '1\ta\tb\n2\tc\td\n', turned=True, bad=0)
  assert _tuples(text) == [('1', 'b', 'a'), ('2', 'd', 'c')]


@pytest.mark.parametrize('columns', [(), ('x.src', 'x.tgt')])
def test_json_lines(tmp_path, columns):
  content = ''.join(
    json.dumps({'en': s, 'x': {'src': t, 'tgt': s}, 'fr': t}) + '\n'
    for s, t in [('a "b"', 'é\u2028'), ('c', '\U0001f600')]
  )
  text = _open(tmp_path, content, suffix='.jsonl', columns=columns, bad=0)
  rows = [('1', 'a "b"', 'é\u2028'), ('2', 'c', '\U0001f600')]
  if columns:
    rows = [(n, t, s) for n, s, t in rows]
  assert _tuples(text) == rows


def test_aligned_files(tmp_path):
  # A tab and a quote are characters there.
  text = _open(tmp_path, 'a\tb\n"c\n', 'é\n d\t \n', suffix='.txt', bad=0)
  assert _tuples(text) == [('1', 'a\tb', 'é'), ('2', '"c', ' d\t ')]
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
  text = _open(tmp_path_factory.getbasetemp(), *columns, suffix=suffix, bad=0)
  rows = [(n, *row) for n, row in zip(ids, pairs, strict=True)]
  assert _tuples(text) == rows
  which = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
  assert text.read(which) == [rows[i] for i in which]
  assert text.read(np.array(which, np.int64)) == [rows[i] for i in which]


# What is left out is counted.


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
    text = _open(tmp_path, start + ending.join(rows) + last)
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
  text = _open(tmp_path, content, columns=('en', 'fr'))
  assert _tuples(text) == [('2', 'a', 'b'), ('6', 'e', 'f')]
  assert text.num_lines == 7
  assert text.unusable == {
    'an empty line': (2, 3),
    'an empty target': (1, 4),
    'not UTF-8': (1, 5),
    'an empty source': (1, 8),
  }
  rows = [b'fr\tx\ten\r', *(b'%d\t\ta%d' % (n, n) for n in range(3)), b'b']
  text = _open(tmp_path, start + b'\n'.join(rows), columns=('en', 'fr'))
  assert text.unusable == {'fewer than 3 columns': (1, 5)}
  assert _tuples(text)[2] == ('4', 'a2', '2')


@pytest.mark.parametrize('marks', [*itertools.product([b'', BOM], repeat=2)])
def test_bad_aligned_lines_are_counted(tmp_path, marks):
  sources = [b'a', b'', b'', b'd', b'e\xff', b'f', b'g']
  targets = [b'A', b'B', b'', b' ', b'E', b'\0', b'G']
  contents = [
    mark + b''.join(x + b'\n' for x in side)
    for mark, side in zip(marks, (sources, targets), strict=True)
  ]
  text = _open(tmp_path, *contents, suffix='.txt')
  assert _tuples(text) == [('1', 'a', 'A'), ('7', 'g', 'G')]
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
  text = _open(tmp_path, '\n'.join(rows), suffix='.jsonl')
  assert _tuples(text) == [('1', 'a', 'b'), ('9', 'c', 'd')]
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
  text = bitext.describe(_open(tmp_path, content))
  assert text.endswith(
    ': 1,204 lines, 1 pairs; not used: '
    '1,200 an empty target (the first in line 5), '
    '2 fewer than 3 columns (the first in line 3), '
    '1 an empty line (the first in line 2)'
  )


def test_a_byte_order_mark_is_left_out_and_noted(tmp_path):
  text = _open(tmp_path, BOM + b'1\ta\tb\n', bad=0)
  assert _tuples(text) == [('1', 'a', 'b')]
  (note,) = text.notes
  assert 'byte-order mark' in note and note in bitext.describe(text)
  # Anywhere else it is a character.
  text = _open(tmp_path, BOM * 2 + b'1\ta\tb\n' + BOM + b'2\tc\td\n', bad=0)
  assert [p.id for p in text.read()] == ['\ufeff1', '\ufeff2']


def test_ids_that_occur_again_are_kept_and_noted(tmp_path):
  ids = ['7', 'x', '', 'bad', 'x', '7', '', '7']
  rows = [f'{n}\ta{k}\tb' for k, n in enumerate(ids)]
  rows[3] = 'x\t\tb'  # Not used, so it does not count.
  text = _open(tmp_path, '\n'.join(rows))
  kept = [p.source for p in text.read()]
  assert kept == ['a0', 'a1', 'a2', 'a4', 'a5', 'a6', 'a7']
  (note,) = text.notes
  assert note == '4 ids occur again, the first in line 5; kept'
  assert note in bitext.describe(text)
  # Columns that are chosen have no id among them.
  assert _open(tmp_path, None, columns=(2, 3)).notes == ()


# Long lines.


def test_a_line_may_be_so_long(tmp_path):
  head = b'1\ta\t'
  long = head + b'x' * (lines.LONGEST - len(head) - 1)
  rows = [long, long + b'xx', b'2\ta\tb', long + b'x' * (2 << 20)]
  for last in (b'', b'\n'):
    text = _open(tmp_path, b'\n'.join(rows) + last)
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
  _write(y, b'a\nb\nc\n')
  assert _peak(lambda: look(x, y)) < 16 << 20
  for text in texts:
    assert text.numbers.tolist() == [1, 3]
    assert text.unusable == {'longer than 1,048,576 bytes': (1, 2)}


def test_a_long_header_is_not_held_in_memory(tmp_path):
  path = tmp_path / 'x.tsv'
  _with_a_long_line(path, b'en\tfr\t', b'\na\tb\tc\n')

  def look():
    text = bitext.open_bitext([path], 'en-fr', ('en', 'fr'))
    assert _tuples(text) == [('2', 'a', 'b')]

  assert _peak(look) < 16 << 20


def test_a_long_line_beyond_the_other_file_is_not_held(tmp_path):
  x, y = tmp_path / 'x.en', tmp_path / 'x.fr'
  _write(x, b'a\n')
  _with_a_long_line(y, b'b\n', b'\nc\n')
  call = lambda: bitext.open_bitext([x, y], 'en-fr')  # noqa: E731
  peak = _peak(lambda: refusal(call, f'{y} has 3 lines and {x} 1'))
  assert peak < 16 << 20


# How much is put up with.


def test_too_many_bad_lines_stop(tmp_path):
  content = b'1\ta\tb\n' * 6 + b'1\ta\n\n\xff\n1\ta\n'
  refusal(
    lambda: _open(tmp_path, content, bad=0.25),
    tmp_path / 'x0.tsv',
    '4 of its 10 lines cannot be used',
    '2 fewer than 3 columns (the first in line 7)',
    '1 an empty line (the first in line 8)',
    '1 not UTF-8 (the first in line 9)',
    'data.max_bad_fraction=0.25',
  )
  assert len(_open(tmp_path, content, bad=0.4)) == 6


def test_without_a_fraction_one_bad_line_stops(tmp_path):
  path = _write(tmp_path / 'x.tsv', '1\ta\tb\n' * 999 + '\n')
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
    assert len(_open(tmp_path, content, bad=percent / 100)) == total - bad
    with pytest.raises(errors.UserError):
      _open(tmp_path, content + '\n', bad=percent / 100)


# Refusals.


@pytest.mark.parametrize('suffix', ['.tsv', '.jsonl'])
@pytest.mark.parametrize('content', [b'', BOM, b'\n', b'\r\n \n', b'\r'])
def test_a_file_without_pairs(tmp_path, content, suffix):
  path = tmp_path / f'x0{suffix}'
  call = lambda: _open(tmp_path, content, suffix=suffix)  # noqa: E731
  refusal(call, path, 'no pair in it')


def test_aligned_files_without_pairs(tmp_path):
  for content in (b'', BOM, b'\n\n'):
    call = lambda c=content: _open(tmp_path, c, c)  # noqa: E731
    refusal(call, tmp_path / 'x0.tsv', tmp_path / 'x1.tsv', 'no pair in it')


@pytest.mark.parametrize('what', ['missing', 'a folder', 'under a file'])
@pytest.mark.parametrize('other', [(), ('x.tsv',)])
def test_a_file_that_cannot_be_read(tmp_path, what, other):
  file = _write(tmp_path / 'x.tsv', 'a\tb\n')
  path, reason = {
    'missing': (tmp_path / 'y.tsv', 'No such file'),
    'a folder': (tmp_path, 'Is a directory'),
    'under a file': (file / 'y.tsv', 'Not a directory'),
  }[what]
  paths = [*(tmp_path / name for name in other), path]
  refusal(
    lambda: bitext.open_bitext(paths, 'en-fr'),
    f'{path}: cannot read',
    reason,
    'data.source',
  )


@pytest.mark.parametrize('codec', ['utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('suffix', ['.tsv', '.jsonl', '.txt'])
def test_utf16_is_refused(tmp_path, codec, suffix):
  content = '\ufeff1\ta\tb\n'.encode(codec)
  contents = [b'a\n', content] if suffix == '.txt' else [content]
  refusal(
    lambda: _open(tmp_path, *contents, suffix=suffix),
    tmp_path / f'x{len(contents) - 1}{suffix}',
    'UTF-16 found, UTF-8 expected',
    'iconv',
  )


LONG = 'x' * (3 * lines.LONGEST)


@pytest.mark.parametrize(
  ('x', 'y', 'counts'),
  [
    ('a\nb\nc\n', 'a\nb\n', (3, 2)),
    ('a\nb', 'a\nb\nc', (2, 3)),
    ('a\n', '', (1, 0)),
    ('', '\n\n\n', (0, 3)),
    ('a\n\n', 'a\n', (2, 1)),
    ('a\r\nb\r\n', 'a\u2028b\x0cc\rd\r\n', (2, 1)),
    ('a\n', 'a\n' + 'b\n' * 1999, (1, 2000)),
    # Of a long line only a part is read at a time.
    ('a\n', f'a\n{LONG}\nc\n', (1, 3)),
    ('a\n', f'a\n{LONG}', (1, 2)),
    ('a\n', f'a\nb\n{LONG}\nc', (1, 4)),
    (f'{LONG}\nb', LONG, (2, 1)),
  ],
)
def test_aligned_files_of_different_length(tmp_path, x, y, counts):
  names = [tmp_path / 'x0.txt', tmp_path / 'x1.txt']
  more, less = sorted((0, 1), key=lambda n: -counts[n])
  refusal(
    lambda: _open(tmp_path, x, y, suffix='.txt'),
    f'{names[more]} has {counts[more]:,} lines and {names[less]} '
    f'{counts[less]:,};',
  )


# Between a look at a file and a read.


def _gone(path):
  path.unlink()
  return 'No such file'


def _a_folder(path):
  path.unlink()
  path.mkdir()
  return 'Is a directory'


def _longer(path):
  with open(path, 'a') as f:
    f.write('x')
  return 'another size or time'


def _shorter(path):
  os.truncate(path, 5)
  return 'another size or time'


def _same_size_later(path):
  path.write_bytes(path.read_bytes()[::-1])
  os.utime(path, ns=(0, 1))  # A clock may be too coarse to tell.
  return 'another size or time'


def _another_file(path):
  stat = path.stat()
  copy = path.with_name('copy')
  copy.write_bytes(path.read_bytes())
  os.replace(copy, path)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  return 'another size or time'


def _no_longer_utf8(path):
  stat = path.stat()
  with open(path, 'r+b') as f:
    f.write(b'\xff' * 8)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  return "can't decode"


@pytest.mark.parametrize(
  'change',
  [
    _gone,
    _a_folder,
    _longer,
    _shorter,
    _same_size_later,
    _another_file,
    _no_longer_utf8,
  ],
  ids=lambda f: f.__name__.strip('_'),
)
@pytest.mark.parametrize('file', [None, 0, 1])
def test_a_file_that_changes_is_refused(tmp_path, file, change):
  sides = ['a\tb\nc\td\ne\tf\n'] if file is None else ['a1\nb2\nc3\nd4\n'] * 2
  text = _open(tmp_path, *sides, bad=0)
  path = tmp_path / f'x{file or 0}.tsv'
  text.read([0])
  reason = change(path)
  for which in ([0], None):
    refusal(lambda w=which: text.read(w), f'{path}: changed or gone', reason)


def test_a_file_that_is_touched_only_by_reading_is_no_other(tmp_path):
  text = _open(tmp_path, 'a\tb\n', bad=0)
  path = tmp_path / 'x0.tsv'
  os.utime(path, ns=(0, path.stat().st_mtime_ns))
  assert len(text.read()) == 1


# The digest.


def test_the_digest_is_of_the_content(tmp_path):
  content = '1\ta\tb\n2\tc\td\n'
  text = _open(tmp_path, content)
  (tmp_path / 'other').mkdir()
  again = _open(tmp_path / 'other', content, suffix='.csv')
  os.utime(tmp_path / 'other' / 'x0.csv', ns=(0, 0))
  later = _open(tmp_path / 'other', None, suffix='.csv')
  assert text.digest == again.digest == later.digest
  assert len({text.stats, again.stats, later.stats}) == 3
  for other in (content.replace('d', 'D'), content + '\n', content[:-1]):
    assert _open(tmp_path, other).digest != text.digest


def test_the_digest_is_of_every_file(tmp_path):
  a, b = 'a\nb\n', 'c\nd\n'
  made = [
    _open(tmp_path, *sides).digest
    for sides in ((a, b), (b, a), (a, a), (b, b), ('a\nB\n', b))
  ]
  assert len({*made}) == len(made)


def test_the_digest_is_of_the_way_of_reading(tmp_path):
  content = 'en\tfr\tfr\na\tb\tc\n'
  _open(tmp_path, content)
  made = [
    _open(tmp_path, None, columns=columns, turned=turned).digest
    for columns in ((), (1, 2), (1, 3), (3, 1), ('en', 'fr'))
    for turned in (False, True)
  ]
  # (1, 2) and ('en', 'fr') differ in whether the first line is a pair; only the
  # usual columns can be turned round.
  assert made[0] != made[1] and made[2::2] == made[3::2]
  assert len({*made}) == 6
  content = '{"en": "a", "fr": "b"}\n'
  made = [
    _open(tmp_path, content, suffix='.jsonl', columns=columns).digest
    for columns in ((), ('en', 'fr'), ('fr', 'en'))
  ]
  assert made[0] == made[1] != made[2]


# Any bytes at all.

CHUNKS = [
  *(b'\t', b'\t', b'\n', b'\n', b'\r\n', b'\r', b'\0', b' ', b'"', b"'", b'\\'),
  *(BOM, b'\xff', b'\xff\xfe', b'\xc3', b'\xa9', b'\xe2\x80', b'\xed\xa0\x80'),
  *(c.encode() for c in 'é\x0b\x0c\x1c\x85\u00a0\u2028\u2029\u3000😀'),
  *(b'a', b'b c', b'1\ta\tb', b'x' * 90),
  *(b'{', b'}', b'[', b']', b':', b',', b'"en"', b'"fr"', b'null', b'1e999'),
  *(b'{"en": "a", "fr": "', b'"}', b'\\ud83d', b'\\u0000', b'\\n', b'\\"'),
]

LINES = {
  'tsv': [b'1\ta\tb', b'2\tc "d\te', b'3\t \xc3\xa9\t\xe2\x80\xa8f', b'a\tb'],
  'jsonl': [
    b'{"en": "a", "fr": "b"}',
    b'{"fr": "\\u00e9\\ud83d\\ude00", "x": {}, "en": "c"}',
    b'{"en": "a\\nb", "fr": "b"}',
    b'{"en": "", "fr": "b"}',
    b'{"en": "a", "fr": " "}',
    b'{"en": "a", "fr": 3}',
    b'{"en": "a", "fr": "b\\ud83d"}',
  ],
  'txt': [b'a', b'b\tc', b'"', b'\xc3\xa9', b''],
}


REASONS = {
  'tsv': [f'{x} than {n} columns' for x in ('fewer', 'more') for n in (2, 3)],
  'jsonl': [
    'not JSON',
    "no text under 'en'",
    "no text under 'fr'",
    'a line break in a text',
    'half a surrogate pair',
  ],
  'txt': [],
}


def _file(rng, kind):
  """Lines that are mostly good, or mostly not, or no lines at all."""
  parts = [rng.choice([b'', b'', b'', BOM, b'\xff\xfe', b'\n'])]
  share = rng.choice([0.0, 0.1, 0.5, 1.0])
  good = LINES[kind][: rng.randint(1, len(LINES[kind]))]
  for _ in range(rng.randrange(9)):
    if rng.random() < share:
      parts += rng.choices(CHUNKS, k=rng.randrange(9))
    else:
      parts.append(rng.choice(good))
    parts.append(rng.choice([b'\n', b'\n', b'\n', b'\r\n', b'']))
  return b''.join(parts)


def _slow(contents, kind, longest):
  """What is to be found, from whole files: pairs, reason -> [line numbers].

  None for files that are no parallel text at all.
  """
  if any(c[:2] in (b'\xff\xfe', b'\xfe\xff') for c in contents):
    return None
  contents = [c[3:] if c[:3] == BOM else c for c in contents]
  files = [re.findall(rb'[^\n]*\n|[^\n]+', c) for c in contents]
  if len({*map(len, files)}) > 1:
    return None
  rows = [line for line in files[0] if line.decode(errors='replace').strip()]
  width = rows[0][:longest].count(b'\t') + 1 if rows else 0
  if kind == 'tsv' and width not in (2, 3):
    return None
  pairs, bad = [], {}
  for number, raws in enumerate(zip(*files, strict=True), 1):
    found = _slow_line(number, raws, kind, longest, width)
    if isinstance(found, str):
      bad.setdefault(found, []).append(number)
    else:
      pairs.append(found)
  return (pairs, bad) if pairs else None


def _slow_line(number, raws, kind, longest, width):
  if any(len(raw) > longest for raw in raws):
    return f'longer than {longest:,} bytes'
  texts = [
    re.sub(rb'\r?\n?\Z', b'', raw).decode('utf-8', 'surrogateescape')
    for raw in raws
  ]
  for text in texts:  # A byte that is no UTF-8 has become half a surrogate.
    if '\0' in text:
      return 'a NUL character'
    if re.search('[\udc80-\udcff]', text):
      return 'not UTF-8'
  if ''.join(texts).strip() == '':
    return 'an empty line'
  name = str(number)
  if kind == 'tsv':
    count = texts[0].count('\t') + 1
    if count != width:
      return f'{"more" if count > width else "fewer"} than {width} columns'
    *rest, source, target = texts[0].split('\t')
    name = rest[0] if rest else name
  elif kind == 'jsonl':
    try:
      value = json.JSONDecoder().decode(texts[0])
    except ValueError:
      return 'not JSON'
    texts = []
    for key in ('en', 'fr'):
      text = value.get(key) if type(value) is dict else None
      if type(text) is not str:
        texts.append(f"no text under '{key}'")
      elif '\0' in text:
        texts.append('a NUL character')
      elif '\n' in text:
        texts.append('a line break in a text')
      elif re.search('[\ud800-\udfff]', text):
        texts.append('half a surrogate pair')
      else:
        texts.append((text,))
    for text in texts:
      if isinstance(text, str):
        return text
    (source,), (target,) = texts
  else:
    source, target = texts
  if not source.strip():
    return 'an empty source'
  if not target.strip():
    return 'an empty target'
  return (name, source, target)


@pytest.mark.parametrize(
  ('kind', 'number'), [('tsv', 4000), ('jsonl', 3000), ('txt', 3000)]
)
def test_any_bytes(tmp_path, monkeypatch, kind, number):
  """No crash, no line uncounted, and the very pairs of a plain parser."""
  longest = 120
  monkeypatch.setattr(lines, 'LONGEST', longest)
  rng = random.Random(7)
  done = {'refused': 0, 'read': 0}
  reasons = set()
  for _ in range(number):
    contents = [_file(rng, kind) for _ in range(2 if kind == 'txt' else 1)]
    if kind == 'txt' and rng.random() < 0.9:  # As many lines in each.
      ends = [c.count(b'\n') + (c[-1:] not in (b'\n', b'')) for c in contents]
      less = ends.index(min(ends))
      if contents[less][-1:] not in (b'\n', b''):
        contents[less] += b'\n'
      contents[less] += b'z\n' * (max(ends) - min(ends))
    expected = _slow(contents, kind, longest)
    try:
      text = _open(tmp_path, *contents, suffix=f'.{kind}')
    except errors.UserError as e:
      assert expected is None, (contents, str(e))
      assert str(e).endswith('.') and len(str(e).splitlines()) == 1
      done['refused'] += 1
      continue
    assert expected is not None, contents
    pairs, bad = expected
    assert text.read() == pairs, contents
    counts = {reason: (len(at), at[0]) for reason, at in bad.items()}
    assert text.unusable == counts, contents
    assert len(pairs) + sum(map(len, bad.values())) == text.num_lines, contents
    which = rng.choices(range(len(pairs)), k=3)
    assert text.read(which) == [pairs[i] for i in which], contents
    done['read'] += 1
    reasons.update(bad)
  # The files are of every kind, or nothing would be shown.
  assert min(done.values()) > number // 10, done
  assert reasons == {
    'an empty line',
    'an empty source',
    'an empty target',
    'not UTF-8',
    'a NUL character',
    f'longer than {longest:,} bytes',
    *REASONS[kind],
  }
