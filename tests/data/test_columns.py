"""What columns mean: checked on lines, refused with the knob to settle it."""

import pytest

from mt.data import columns as columns_lib
from mt.data import formats
from mt.data import lines
from tests.fixtures.refusal import refusal


def _choose(
  first, columns=(), kind='text', pair='en-fr', quotes='', reversed_pair=False
):
  """The parser that a file's first lines call for, and its notes."""
  file = formats.Plain('my/x.tsv', 'x', kind)
  rows = [line.split('\t') for line in first.split('\n')]
  return columns_lib.choose(
    [file], rows, pair, columns, quotes=quotes, reversed_pair=reversed_pair
  )


@pytest.mark.parametrize(
  ('first', 'columns', 'expected'),
  [
    ('1\ta\tb', (), lines.Columns(3, 1, 2, id=0)),
    ('a\tb', (), lines.Columns(2, 0, 1)),
    # An empty last cell is one.
    ('a1\tb\t', (), lines.Columns(3, 1, 2, id=0)),
    ('a\tb\tc\td', (4, 2), lines.Columns(4, 3, 1)),
    ('a\tb\tc', (1, 2), lines.Columns(3, 0, 1)),
    ('n\tfrançais\tEn g', ('En g', 'français'), lines.Columns(3, 2, 1)),
    # A score is as good as an id, and one line of ten may be odd.
    ('0.5\ta\tb\n' * 9 + 'x y\ta\tb', (), lines.Columns(3, 1, 2, id=0)),
    # A quote is a character where others stand alone.
    ('a "b\tc\n"d ""e""."\tf\n"\tg', (), lines.Columns(2, 0, 1)),
  ],
)
def test_columns(first, columns, expected):
  assert _choose(first, columns) == (expected, ())
  # Columns that are named stay where they are said to be.
  other, _ = _choose(first, columns, reversed_pair=True)
  if columns:
    assert other == expected
  else:
    assert (other.target, other.source) == (expected.source, expected.target)


MANYTHINGS = (
  'Go.\tVa !\tCC-BY 2.0 (France) Attribution: tatoeba.org #2877272 (CM)\n'
  'Hi.\tSalut !\tCC-BY 2.0 (France) Attribution: tatoeba.org #538123 (CM)'
)


@pytest.mark.parametrize(
  ('first', 'words'),
  [
    ('just text', ['1 columns in its first', 'in a .csv by commas', '{lang}']),
    ('a\tb\tc\td', ['4 columns in its first', 'data.columns']),
    (MANYTHINGS, ['holds no ids', "'Go.'", 'data.columns=(1, 2)']),
    ('1\teng\tHi.\n2\tfra\tVa.', ['column 2', "codes of languages ('eng')"]),
    ('Hi.\teng\nGo.\teng', ['column 2', "codes of languages ('eng')"]),
    (
      '\n'.join(f'{n}\ta {n}\tCC-BY 2.0' for n in range(10)),
      ["column 3 holds the same in every line ('CC-BY 2.0')"],
    ),
    ('1\tHi.\n2\tGo.', ['column 1 holds numbers', 'data.columns']),
    ('en\tfr\na\tb', ['header (en | fr)', "data.columns=('en', 'fr')"]),
    ('id\tFrench\tEnglish', ["data.columns=('English', 'French')"]),
    ('Source\tTarget\na\tb', ["data.columns=('Source', 'Target')"]),
    ('1\t"a ""b"""\t"c"\n2\td\te', ['"a ""b"""', "data.quotes='csv'"]),
    ('"a"\t"b"\n"c"\t"d"', ['quoted as in CSV', "'text'"]),
  ],
)
def test_columns_that_hold_something_else(first, words):
  refusal(lambda: _choose(first), 'my/x.tsv: ', *words)
  quoted = 'data.quotes' in words[-1] or 'quoted' in words[0]
  column = 1 + ('\t' in first)
  knob = {'quotes': 'text'} if quoted else {'columns': (column, column)}
  _choose(first, **knob)  # As the knob says.


@pytest.mark.parametrize(
  ('first', 'columns', 'words'),
  [
    ('1\ta\tb', (3, 4), ['3 columns in its first', '4, of (3, 4), expected']),
    ('en\tde', ('en', 'fr'), ["'fr', of", "'en | de'", 'data.columns']),
    ('en\tfr ', ('en', 'fr'), ["'fr', of"]),
    ('', ('en', 'fr'), ["'en', of ('en', 'fr'), expected"]),
    ('en\tfr\ten', ('en', 'fr'), ["'en' stands", 'en | fr | en', 'numbers']),
    ('EN\tFR\u2028x', ('EN', 'FR'), ["'FR', of", '\\u2028']),
  ],
)
def test_columns_that_are_not_there(first, columns, words):
  refusal(lambda: _choose(first, columns), 'my/x.tsv: ', *words)


@pytest.mark.parametrize('columns', [(1, 2), (2, 1), (1, 3)])
def test_ids_are_no_texts(columns):
  """Of a text that has other columns than the other ones of the run."""
  usual = '\n'.join(f'{n}\ta {n}\tb {n}' for n in range(10))
  words = 'my/x.tsv', "ids (such as '0')", f'data.columns={columns}'
  refusal(lambda: _choose(usual, columns), *words, 'set it to (2, 3)')
  _choose(usual, (3, 2))
  _choose(usual.replace('\tb', ' b'), (1, 2))  # Numbers, spelled out.


def test_a_header_that_is_asked_for_as_a_pair_is_noted():
  parse, (note,) = _choose('en\tfr\na\tb', (1, 2))
  assert parse == lines.Columns(2, 0, 1) and "'en | fr'" in note


def test_keys_and_aligned_files():
  keys = lines.Keys('en', 'fr')
  assert _choose('', kind='json') == (keys, ())
  assert _choose('', kind='json', pair='de-ja') == (lines.Keys('de', 'ja'), ())
  columns = ('translation.en', 'translation.fr')
  assert _choose('{}', columns, kind='json') == (lines.Keys(*columns), ())
  # Numbers are those of other texts of the run: it is said.
  parse, (note,) = _choose('{}', (2, 1), kind='json')
  assert parse == keys and 'keys' in note and 'data.columns=(2, 1)' in note
  file = formats.Plain('x.en', 'x.en', 'text')
  made = columns_lib.choose([file, file], [], 'en-fr', ())
  assert made == (lines.Aligned(), ())
