"""Parallel text on disk: what is read of it, counted, noted and refused."""

import dataclasses
import functools
import json
import os

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from mt.base import errors
from mt.data import bitext
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text
from tests.fixtures.bitext_files import tuples
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal

# What is read.


def test_the_first_line_with_something_in_it_tells_the_columns(tmp_path):
  text = open_text(tmp_path, '\n \t \n\u00a0\u2028\na\tb\n1\ta\tb\nc\td\n')
  assert tuples(text) == [('4', 'a', 'b'), ('6', 'c', 'd')]


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
  assert len(text) == 3 - header


_any_text = st.text(
  # A surrogate has no UTF-8, a NUL is refused, the others are layout.
  st.characters(exclude_categories=['Cs'], exclude_characters='\0\t\n\r'),
).map(lambda text: f'{text}.')  # No code of a language, no number.

# Of each kind of text: a pair as a line of each file, and lines that are none.
KINDS = {
  'two': (lambda n, s, t: [f'{s}\t{t}'], ['a\tb\tc', 'a', '\tb', ' \t']),
  'three': (lambda n, s, t: [f'é{n}\t{s}\t{t}'], ['1\ta', '1\ta\t ', '\0']),
  'jsonl': (
    lambda n, s, t: [json.dumps({'en': s, 'fr': t})],
    ['a\tb', '{"en": "a"}', '{"en": "a\\nb", "fr": ""}', '[' * 9000],
  ),
  'aligned': (lambda n, s, t: [s, t], []),
}
REASONS = {
  'a\tb\tc': 'more than 2 columns',
  'a': 'fewer than 2 columns',
  '\tb': 'an empty source',
  ' \t': 'an empty line',
  '1\ta': 'fewer than 3 columns',
  '1\ta\t ': 'an empty target',
  '\0': 'a NUL character',
  'a\tb': 'not JSON',
  '[' * 9000: 'not JSON',
  '{"en": "a"}': "no text under 'fr'",
  '{"en": "a\\nb", "fr": ""}': 'an empty target',
}


@settings(max_examples=100, deadline=None)  # Disks are slow at times.
@given(
  pairs=st.lists(st.tuples(_any_text, _any_text), min_size=1, max_size=8),
  kind=st.sampled_from([*KINDS]),
  ending=st.sampled_from(['\n', '\r\n']),
  mark=st.booleans(),
  data=st.data(),
)
def test_what_is_written_is_read_back(
  tmp_path_factory, pairs, kind, ending, mark, data
):
  """No line uncounted, and the very pairs, whatever stands between them."""
  line, bad = KINDS[kind]
  rows, numbers, unusable = [], [], {}
  for n, pair in enumerate(pairs):
    numbers.append(len(rows) + 1)
    rows.append(line(n, *pair))
    for other in data.draw(st.lists(st.sampled_from(bad or ['']), max_size=2)):
      rows.append([other] * len(rows[0]))
      reason = REASONS.get(other, 'an empty line')
      count, first = unusable.get(reason, (0, len(rows)))
      unusable[reason] = count + 1, first
  contents = [
    (BOM if mark else b'') + ''.join(x + ending for x in column).encode()
    for column in zip(*rows, strict=True)
  ]
  # A text may begin with the character that a mark is made of.
  assume(mark or not any(c.startswith(BOM) for c in contents))
  suffix = '.jsonl' if kind == 'jsonl' else '.tsv'
  text = open_text(tmp_path_factory.getbasetemp(), *contents, suffix=suffix)
  ids = numbers if kind != 'three' else [f'é{n}' for n in range(len(pairs))]
  want = [(str(n), *pair) for n, pair in zip(ids, pairs, strict=True)]
  assert tuples(text) == want
  assert text.sample.unusable == unusable and len(text) == len(rows)
  which = data.draw(st.lists(st.integers(0, len(want) - 1), max_size=12))
  at = text.sample.usable[which]
  assert text.read(at) == [want[i] for i in which]


# Lines that cannot be used.


@pytest.mark.parametrize('start', [b'', BOM], ids=['', 'BOM'])
def test_line_numbers_count_the_header(tmp_path, start):
  rows = [b'en\tfr', b'a\tb', b'', b'c\t', b'\xff\td', b'e\tf', b'', b'\tf']
  content = start + b''.join(row + b'\n' for row in rows)
  text = open_text(tmp_path, content, columns=('en', 'fr'))
  assert tuples(text) == [('2', 'a', 'b'), ('6', 'e', 'f')]
  assert len(text) == 7
  assert text.sample.unusable == {
    'an empty line': (2, 3),
    'an empty target': (1, 4),
    'not UTF-8': (1, 5),
    'an empty source': (1, 8),
  }
  rows = [b'fr\tx\ten\r', *(b'%d\t\ta%d' % (n, n) for n in range(3)), b'b']
  text = open_text(tmp_path, start + b'\n'.join(rows), columns=('en', 'fr'))
  assert text.sample.unusable == {'fewer than 3 columns': (1, 5)}
  assert tuples(text)[2] == ('4', 'a2', '2')


@pytest.mark.parametrize('marks', [(b'', b''), (b'', BOM), (BOM, b'')])
def test_bad_aligned_lines_are_counted(tmp_path, marks):
  sources = [b'a', b'', b'', b'd', b'e\xff', b'f', b'g']
  targets = [b'A', b'B', b'', b' ', b'E', b'\0', b'G']
  contents = [
    mark + b''.join(x + b'\n' for x in side)
    for mark, side in zip(marks, (sources, targets), strict=True)
  ]
  text = open_text(tmp_path, *contents, suffix='.txt')
  assert tuples(text) == [('1', 'a', 'A'), ('7', 'g', 'G')]
  assert len(text) == 7
  assert text.sample.unusable == {
    'an empty source': (1, 2),
    'an empty line': (1, 3),
    'an empty target': (1, 4),
    'not UTF-8': (1, 5),
    'a NUL character': (1, 6),
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


def test_a_byte_order_mark_is_left_out(tmp_path):
  text = open_text(tmp_path, BOM + b'1\ta\tb\n', bad=0)
  assert tuples(text) == [('1', 'a', 'b')]
  # Anywhere else it is a character.
  text = open_text(tmp_path, BOM * 2 + b'1\ta\tb\n' + BOM + b'2\tc\td\n', bad=0)
  assert [p.id for p in text.read()] == ['\ufeff1', '\ufeff2']


@pytest.mark.parametrize('bad', [0, 1])
def test_other_keys_than_the_languages(tmp_path, bad):
  """As Hugging Face's data sets have them: more bad lines would not help."""
  line = json.dumps({'translation': {'en': 'a', 'fr': 'b'}}) + '\n'
  call = functools.partial(open_text, tmp_path, line * 3, suffix='.jsonl')
  words = tmp_path / 'x0.jsonl', "3 no text under 'en'", 'set data.columns'
  refusal(lambda: call(bad=bad), *words)
  assert len(call(columns=('translation.en', 'translation.fr'))) == 3


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
  assert len(open_text(tmp_path, content, bad=0.4).read()) == 6


def test_exactly_the_fraction_does_not_stop(tmp_path):
  total = 100
  for bad in (1, 7, 28, 29, 57, 58, 99):  # 0.29 * 100 is less than 29.
    content = 'a\tb\n' * (total - bad) + '\n' * bad
    assert (
      len(open_text(tmp_path, content, bad=bad / 100).read()) == total - bad
    )
    with pytest.raises(errors.UserError):
      open_text(tmp_path, content + '\n', bad=bad / 100)


def test_chance_stops_no_run(tmp_path, monkeypatch):
  """Of as many bad lines as are allowed a sample has too many, often."""
  text = open_text(tmp_path, 'a\tb\n' * 99 + '\n', bad=0.01)
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 99)
  text.check({'an empty line': (2, 1)}, 100 // 2)
  text.check({'an empty line': (780, 1), 'copies': (9999, 1)}, 1 << 16)
  text.check({'copies': (1 << 16, 1)}, 1 << 16)  # Of others pairs may be left.
  none = {'no text under': (1 << 12, 1)}  # Where all are allowed to be bad.
  lenient = dataclasses.replace(text, max_bad_fraction=1)
  refusal(lambda: lenient.check(none, 1 << 12), 'no pair in it')
  few = {'an empty line': (790, 1)}
  refusal(lambda: text.check(few, 1 << 16), '790 of some 65,536 lines')
  text = dataclasses.replace(text, max_bad_fraction=0)
  one = {'an empty line': (1, 1)}
  refusal(lambda: text.check(one, 1 << 16), '1 of some')
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 100)
  text.check(one, 50)  # It was looked at whole.


@pytest.mark.parametrize('blank', [999, 1000, 2001])
def test_any_number_of_lines_in_front_may_be_empty(tmp_path, blank):
  content = '\n' * blank + '1\ta\tb\n2\tc\td\n'
  assert tuples(open_text(tmp_path, content))[0] == ('1', 'a', 'b')
  assert len(open_text(tmp_path, content, content).read()) == 2


# Files that are no parallel text.


@pytest.mark.parametrize('content', [b'', BOM, b'\n', b'\r\n \n', b'\r'])
def test_a_file_without_pairs(tmp_path, content):
  for contents, suffix in (
    ([content], '.tsv'),
    ([content], '.jsonl'),
    ([content, content], '.txt'),
  ):
    call = functools.partial(open_text, tmp_path, *contents, suffix=suffix)
    refusal(call, *sorted(tmp_path.glob(f'*{suffix}')), 'no pair in it')


@pytest.mark.parametrize('what', ['missing', 'a folder', 'under a file'])
def test_a_file_that_cannot_be_read(tmp_path, what):
  file = write(tmp_path / 'x.tsv', 'a\tb\n')
  path, reason = {
    'missing': (tmp_path / 'y.tsv', 'No such file'),
    'a folder': (tmp_path, 'Is a directory'),
    'under a file': (file / 'y.tsv', 'Not a directory'),
  }[what]
  for paths in ([path], [file, path]):
    refusal(
      lambda p=paths: bitext.open_bitext(p, 'en-fr'),
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
    lambda: open_text(tmp_path, *contents, suffix=suffix),
    tmp_path / f'x{len(contents) - 1}{suffix}',
    'UTF-16 found, UTF-8 expected',
    'iconv',
  )


@pytest.mark.parametrize(
  ('x', 'y', 'counts'),
  [
    ('a\nb\nc\n', 'a\nb\n', (3, 2)),
    ('a\nb', 'a\nb\nc', (2, 3)),
    ('a\n', '', (1, 0)),
    ('a\r\nb\r\n', 'a\u2028b\x0cc\rd\r\n', (2, 1)),
    ('a\n', 'a\n' + 'b\n' * 1999, (1, 2000)),
  ],
)
def test_aligned_files_of_different_length(tmp_path, x, y, counts):
  names = [tmp_path / 'x0.txt', tmp_path / 'x1.txt']
  more, less = sorted((0, 1), key=lambda n: -counts[n])
  refusal(
    lambda: open_text(tmp_path, x, y, suffix='.txt'),
    f'{names[more]} has {counts[more]:,} lines and {names[less]} '
    f'{counts[less]:,};',
  )


# Between a look at a file and a read.


def _gone(path):
  path.unlink()
  return 'No such file'


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


@pytest.mark.parametrize(
  'change',
  [
    _gone,
    _shorter,
    _same_size_later,
    _another_file,
  ],
  ids=lambda f: f.__name__.strip('_'),
)
@pytest.mark.parametrize('file', [None, 1])
def test_a_file_that_changes_is_refused(tmp_path, file, change):
  sides = ['a\tb\nc\td\ne\tf\n'] if file is None else ['a1\nb2\nc3\nd4\n'] * 2
  text = open_text(tmp_path, *sides, bad=0)
  path = tmp_path / f'x{file or 0}.tsv'
  text.read([0])
  reason = change(path)
  for which in ([0], None):
    refusal(lambda w=which: text.read(w), f'{path}: changed or gone', reason)


# The digest.


def test_the_digest_is_of_the_content(tmp_path):
  content = '1\ta\tb\n2\tc\td\n'
  text = open_text(tmp_path, content)
  (tmp_path / 'other').mkdir()
  again = open_text(tmp_path / 'other', content, suffix='.txt')
  os.utime(tmp_path / 'other' / 'x0.txt', ns=(0, 0))
  later = open_text(tmp_path / 'other', None, suffix='.txt')
  assert text.digest == again.digest == later.digest
  stats = {x.files[0].stat for x in (text, again, later)}
  assert len(stats) == 3
  for other in (content.replace('d', 'D'), content + '\n', content[:-1]):
    assert open_text(tmp_path, other).digest != text.digest


def test_the_digest_is_of_every_file(tmp_path):
  a, b = 'a\nb\n', 'c\nd\n'
  made = [
    open_text(tmp_path, *sides).digest
    for sides in ((a, b), (b, a), (a, a), (b, b), ('a\nB\n', b))
  ]
  assert len({*made}) == len(made)


def test_the_digest_is_of_the_way_of_reading(tmp_path):
  content = 'en1\tfr\tx\na1\tb\tc\n'
  open_text(tmp_path, content)
  made = [
    open_text(tmp_path, None, columns=columns, reversed_pair=other_way).digest
    for columns in ((), (1, 2), (1, 3), (3, 1), ('en1', 'fr'))
    for other_way in (False, True)
  ]
  # (1, 2) and ('en1', 'fr') differ in whether the first line is a pair; only
  # the usual columns can be reversed.
  assert made[0] != made[1] and made[2::2] == made[3::2]
  assert len({*made}) == 6
  content = '{"en": "a", "fr": "b"}\n'
  made = [
    open_text(tmp_path, content, suffix='.jsonl', columns=columns).digest
    for columns in ((), ('en', 'fr'), ('fr', 'en'))
  ]
  assert made[0] == made[1] != made[2]
