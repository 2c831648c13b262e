"""Files as they lie on disk: the same pairs of every format, or a sentence."""

import csv
import datetime
import decimal
import functools
import gzip
import io
import json
import lzma
import os

import pytest

from mt.data import bitext
from mt.data import formats
from mt.data import lines
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text
from tests.fixtures.bitext_files import tuples
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal

PAIRS = [
  ('1', 'say "hi", you', 'dis\tsalut'),
  ('2', 'two\nlines', 'deux\n\nlignes'),
  ('3', ' \u2028 é', '😀'),
]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def _csv(rows, **options):
  out = io.StringIO()
  csv.writer(out, **options).writerows(rows)
  return out.getvalue().encode()


def _json(rows):
  objects = ({'en': s, 'fr': t} for _, s, t in rows)
  return b''.join(json.dumps(o).encode() + b'\n' for o in objects)


@pytest.mark.parametrize(
  ('suffix', 'content', 'options'),
  [
    ('.csv', _csv(PAIRS), {}),
    ('.csv', BOM + _csv([('n', 'f', 'e'), *PAIRS]), {'columns': ('f', 'e')}),
    (
      '.csv',
      b'n;f;e\n' + _csv(PAIRS, delimiter=';'),
      {'columns': ('f', 'e')},
    ),
    ('.tsv', _csv(PAIRS, delimiter='\t'), {'quotes': 'csv'}),
    ('.jsonl', _json(PAIRS), {}),
    ('.ndjson', BOM + _json(PAIRS), {}),
    ('.json', _json(PAIRS), {}),
  ],
)
@pytest.mark.parametrize('pack', [None, gzip.compress, lzma.compress])
def test_the_same_pairs_of_every_format(
  tmp_path, suffix, content, options, pack
):
  if pack:
    suffix += '.gz' if pack is gzip.compress else '.xz'
    content = pack(content)
  text = open_text(tmp_path, content, suffix=suffix, bad=0, **options)
  assert [tuple(p[1:]) for p in text.read()] == [p[1:] for p in PAIRS]
  # Written into the cache once.
  first = {f: f.stat().st_mtime_ns for f in tmp_path.glob('cache/mt/texts/*')}
  again = open_text(tmp_path, None, suffix=suffix, bad=0, **options)
  assert again.digest == text.digest
  assert first == {f: f.stat().st_mtime_ns for f in first}


def test_packed_aligned_files_are_what_they_were(tmp_path):
  plain = open_text(tmp_path, 'a\nb\n', 'c\nd\n', suffix='.txt', bad=0)
  packed = [gzip.compress(b'a\nb\n'), gzip.compress(b'c\nd\n')]
  text = open_text(tmp_path, *packed, suffix='.gz', bad=0)
  assert tuples(text) == [('1', 'a', 'c'), ('2', 'b', 'd')]
  assert text.digest == plain.digest
  # A file of the same size in its place is another one.
  other = [gzip.compress(b'a\nB\n'), packed[1]]
  assert len(other[0]) == len(packed[0])
  for path, content in zip(sorted(tmp_path.glob('*.gz')), other, strict=True):
    path.write_bytes(content)
    os.utime(path, ns=(0, 1))
  assert open_text(tmp_path, None, None, suffix='.gz').read()[1].source == 'B'


def test_parquet(tmp_path):
  import pyarrow
  from pyarrow import parquet

  texts = [{'en': s, 'fr': t} for _, s, t in PAIRS]
  table = pyarrow.table(
    {
      'translation': texts,
      'en': [t['en'] for t in texts],
      'fr': [t['fr'] for t in texts],
      'blob': [b'\xff'] * 3,
    }
  )
  path = tmp_path / 'x.parquet'
  parquet.write_table(table, path)
  for columns in ((), ('translation.en', 'translation.fr')):
    assert tuples(bitext.open_bitext([path], 'en-fr', columns)) == PAIRS
  refusal(
    lambda: bitext.open_bitext([path], 'en-de'),
    f"{path}: no column 'de'",
    'translation, en, fr, blob',
    'data.columns',
  )
  refusal(
    lambda: bitext.open_bitext([path, path], 'en-fr'),
    'a text a line is expected',
  )
  cells = [pyarrow.array([text]) for text in ('a', 'b', 'c')]
  two = tmp_path / 'two.parquet'
  parquet.write_table(pyarrow.table(cells, ['en', 'fr', 'en']), two)
  words = two, "more than one column 'en'"
  refusal(lambda: bitext.open_bitext([two], 'en-fr'), *words)
  whole = path.read_bytes()
  for damaged in (whole[:50], whole[:4] + bytes(99) + whole[103:]):
    write(path, damaged)
    refusal(
      lambda: bitext.open_bitext([path], 'en-fr', columns), f'{path}: damaged'
    )


def test_parquet_cells_that_are_no_text_are_counted(tmp_path):
  import pyarrow
  from pyarrow import parquet

  table = {
    'text': ['a', 'b', 'c'],
    'bytes': [b'a', b'b', b'c'],
    'day': [datetime.date(2020, 1, 1)] * 3,
    'number': [decimal.Decimal(1)] * 3,
    'some': ['d', 'e', None],
  }
  path = tmp_path / 'x.parquet'
  parquet.write_table(pyarrow.table(table), path)
  for key in ('bytes', 'day', 'number'):
    call = functools.partial(bitext.open_bitext, [path], 'en-fr', (key, 'some'))
    refusal(call, path, f"3 no text under '{key}' (the first in record 1")
  text = bitext.open_bitext(
    [path], 'en-fr', ('text', 'some'), max_bad_fraction=0.7
  )
  assert tuples(text) == [('1', 'a', 'd'), ('2', 'b', 'e')]
  assert text.sample.unusable == {"no text under 'some'": (1, 3)}


def test_csv_lines_that_cannot_be_used_are_counted(tmp_path):
  content = b'1,a,b\n\n2,c\n3,\xff,d\n4,e\0,f\n,,\n5,"g\nh",i\n\xe92,j,k\n'
  text = open_text(tmp_path, content, suffix='.csv')
  assert tuples(text) == [('1', 'a', 'b'), ('5', 'g\nh', 'i')]
  assert text.sample.unusable == {
    'an empty line': (2, 2),
    'fewer than 3 columns': (1, 3),
    'not UTF-8': (2, 4),  # As of .tsv: in ids, too.
    'a NUL character': (1, 5),
  }
  content = '"a\nb",c\nonly one\n'
  call = lambda bad: open_text(tmp_path, content, suffix='.csv', bad=bad)  # noqa: E731
  refusal(lambda: call(0), 'columns (the first in record 2)')
  assert 'columns (the first in record 2)' in bitext.describe(call(1))


@pytest.mark.parametrize(
  ('row', 'pair'),
  [
    ('Well, hello;Salut', ('Well, hello', 'Salut')),
    ('Hello,Salut; toi', ('Hello', 'Salut; toi')),
    ('"Hello; you","Salut, toi"', ('Hello; you', 'Salut, toi')),
  ],
)
@pytest.mark.parametrize('bad', ['', '\nno cell\n'])
def test_the_delimiter_gives_records_as_many_cells(tmp_path, row, pair, bad):
  """The other one may stand in texts; where it stands in all, nobody knows."""
  call = functools.partial(open_text, tmp_path, suffix='.csv')
  plain = f'{row}\n' * 20
  if '"' in row:
    assert call(plain + bad).read()[-1][1:] == pair
    return
  words = tmp_path / 'x0.csv', 'a comma and a semicolon', row, '.tsv'
  refusal(lambda: call(plain + bad), *words)
  others = row.replace(', ', ' ').replace('; ', ' ')
  assert call(plain + f'{others}\n' * 9 + bad).read()[0][1:] == pair


def test_the_better_of_two_delimiters_is_taken(tmp_path):
  """The worse one's cells are text; a line without the better one is bad."""
  content = 'a,b;c\n' * 12 + 'a;c\n' * 5 + 'a b c\n' * 3
  text = open_text(tmp_path, content, suffix='.csv', bad=0.2)
  assert {tuple(p[1:]) for p in text.read()} == {('a,b', 'c'), ('a', 'c')}


def test_quotes_after_a_space_are_refused(tmp_path):
  for sign, suffix in ((',', '.csv'), (';', '.csv'), ('\t', '.tsv')):
    call = functools.partial(open_text, tmp_path, suffix=suffix, quotes='csv')
    content = f'"a"{sign} "b"\n'
    refusal(lambda c=content, f=call: f(c), 'a space before', 'spaces out')
  # It is text inside quotes, or where no cell ends with the quote.
  text = open_text(tmp_path, 'a," ""b"""\nc, "d" e\n', suffix='.csv')
  assert tuples(text) == [('1', 'a', ' "b"'), ('2', 'c', ' "d" e')]


SGM = b'<srcset setid="x" srclang="any">\n<doc docid="y">\n<seg>a</seg>\n'
REFUSED = {
  'zip': (b'PK\3\4rest', ['a zip archive', 'unpack it']),
  'sgm': (SGM, ['markup', 'segments one a line', 'sacrebleu']),
  'xml': (BOM + b"<?xml version='1.0'?>\n<dataset/>", ['markup', 'sacrebleu']),
  'tmx': (b'<?xml version="1.0"?>\n<tmx version="1.4">', ['TMX', '.jsonl']),
  'xliff': (b'<xliff version="1.2">\n<file/>', ['XLIFF', '.jsonl']),
  'a comment': (b'<!-- TMX -->\n<tmx version="1.4">', ['markup', '.jsonl']),
  'html': (b'\n<!DOCTYPE html>\n<html>', ['a web page', '.jsonl']),
  'lfs': (b'version https://git-lfs.github.com/spec/v1\n', ['git lfs pull']),
  'bzip2': (b'BZh91AY&SY', ['bzip2', 'unpack it']),
  'zstd': (b'\x28\xb5\x2f\xfd', ['zstd', 'unpack it']),
}


def test_a_comment_alone_is_text(tmp_path):
  text = open_text(tmp_path, '<!-- a -->\tb\n<!-- c\td\n')
  assert tuples(text) == [('1', '<!-- a -->', 'b'), ('2', '<!-- c', 'd')]


@pytest.mark.parametrize('what', REFUSED)
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_what_is_not_read_is_recognised(tmp_path, what, pack):
  content, words = REFUSED[what]
  for contents in ([pack(content)], [b'a\n', pack(content)]):
    call = lambda c=contents: open_text(tmp_path, *c)  # noqa: E731
    refusal(call, tmp_path / f'x{len(contents) - 1}.tsv', *words)


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv', '.ndjson.gz'])
def test_aligned_files_of_another_format_are_refused(tmp_path, suffix):
  """Else their lines would be texts, braces and commas too."""
  content = b'{"text": "a"}\n'
  content = gzip.compress(content) if suffix.endswith('gz') else content
  refusal(
    lambda: open_text(tmp_path, content, content, suffix=suffix),
    tmp_path / f'x0{suffix}',
    suffix.removesuffix('.gz'),
    'a text a line is expected',
    '--key',
  )


def test_a_json_array_is_refused(tmp_path):
  content = b' [\n{"en": "a", "fr": "b"}]'
  for suffix in ('.json', '.jsonl', '.json.gz'):
    data = gzip.compress(content) if suffix.endswith('gz') else content
    call = lambda s=suffix, d=data: open_text(tmp_path, d, suffix=s)  # noqa: E731
    refusal(call, 'a JSON array', "jq -c '.[]'")


@pytest.mark.parametrize('pack', [gzip.compress, lzma.compress])
def test_a_damaged_archive(tmp_path, pack):
  content = pack(os.urandom(999))[:-20]
  refusal(lambda: open_text(tmp_path, content), tmp_path / 'x0.tsv', 'damaged')
  assert not list(tmp_path.glob('cache/mt/texts/*'))


def test_a_pipe_is_refused(tmp_path):
  """Its first lines would be gone when it is read again."""
  os.mkfifo(tmp_path / 'x0.tsv')
  refusal(lambda: open_text(tmp_path, None), tmp_path / 'x0.tsv', 'a pipe')


def test_csv_that_is_none(tmp_path):
  content = 'a,b\nsay "hi",c\n"x"y,z\n'
  refusal(
    lambda: open_text(tmp_path, content, suffix='.csv'),
    tmp_path / 'x0.csv',
    'line 3: not CSV',
    "data.quotes='text'",
  )
  # Its delimiter is that of the records before the damage.
  content = '"en";"fr"\n' + '"a";"b"\n' * 5 + '"a" b;"c"\n'
  call = functools.partial(open_text, tmp_path, content, suffix='.csv')
  refusal(call, tmp_path / 'x0.csv', 'line 7: not CSV', "';' expected")
  text = open_text(tmp_path, 'a\t"b\n', suffix='.csv', quotes='text')
  assert tuples(text) == [('1', 'a', '"b')]


def test_the_kind_is_not_part_of_a_parser(tmp_path):
  """Digests of old runs have its repr in them."""
  assert repr(lines.Columns(2, 0, 1, json=True)) == repr(lines.Columns(2, 0, 1))
  assert formats.BOM == BOM
