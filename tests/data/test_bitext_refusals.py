"""Files that are no parallel text, or another one than a moment ago."""

import os

import pytest

from mt.data import bitext
from mt.data import lines
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal


@pytest.mark.parametrize('suffix', ['.tsv', '.jsonl'])
@pytest.mark.parametrize('content', [b'', BOM, b'\n', b'\r\n \n', b'\r'])
def test_a_file_without_pairs(tmp_path, content, suffix):
  path = tmp_path / f'x0{suffix}'
  call = lambda: open_text(tmp_path, content, suffix=suffix)  # noqa: E731
  refusal(call, path, 'no pair in it')


def test_aligned_files_without_pairs(tmp_path):
  for content in (b'', BOM, b'\n\n'):
    call = lambda c=content: open_text(tmp_path, c, c)  # noqa: E731
    refusal(call, tmp_path / 'x0.tsv', tmp_path / 'x1.tsv', 'no pair in it')


@pytest.mark.parametrize('what', ['missing', 'a folder', 'under a file'])
@pytest.mark.parametrize('other', [(), ('x.tsv',)])
def test_a_file_that_cannot_be_read(tmp_path, what, other):
  file = write(tmp_path / 'x.tsv', 'a\tb\n')
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
    lambda: open_text(tmp_path, *contents, suffix=suffix),
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
    lambda: open_text(tmp_path, x, y, suffix='.txt'),
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
  text = open_text(tmp_path, *sides, bad=0)
  path = tmp_path / f'x{file or 0}.tsv'
  text.read([0])
  reason = change(path)
  for which in ([0], None):
    refusal(lambda w=which: text.read(w), f'{path}: changed or gone', reason)


def test_a_file_that_is_touched_only_by_reading_is_no_other(tmp_path):
  text = open_text(tmp_path, 'a\tb\n', bad=0)
  path = tmp_path / 'x0.tsv'
  os.utime(path, ns=(0, path.stat().st_mtime_ns))
  assert len(text.read()) == 1


# The digest.


def test_the_digest_is_of_the_content(tmp_path):
  content = '1\ta\tb\n2\tc\td\n'
  text = open_text(tmp_path, content)
  (tmp_path / 'other').mkdir()
  again = open_text(tmp_path / 'other', content, suffix='.csv')
  os.utime(tmp_path / 'other' / 'x0.csv', ns=(0, 0))
  later = open_text(tmp_path / 'other', None, suffix='.csv')
  assert text.digest == again.digest == later.digest
  assert len({text.stats, again.stats, later.stats}) == 3
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
  content = 'en\tfr\tfr\na\tb\tc\n'
  open_text(tmp_path, content)
  made = [
    open_text(tmp_path, None, columns=columns, turned=turned).digest
    for columns in ((), (1, 2), (1, 3), (3, 1), ('en', 'fr'))
    for turned in (False, True)
  ]
  # (1, 2) and ('en', 'fr') differ in whether the first line is a pair; only the
  # usual columns can be turned round.
  assert made[0] != made[1] and made[2::2] == made[3::2]
  assert len({*made}) == 6
  content = '{"en": "a", "fr": "b"}\n'
  made = [
    open_text(tmp_path, content, suffix='.jsonl', columns=columns).digest
    for columns in ((), ('en', 'fr'), ('fr', 'en'))
  ]
  assert made[0] == made[1] != made[2]
