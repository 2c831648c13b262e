"""What the columns of a text mean: told by data.columns, or checked on lines.

Nothing is guessed from the number of columns alone. Of three, the first must
hold ids; a header, codes of languages, numbers where text is expected, and
quotes of CSV in a text without them are refused, with the knob that settles it.
"""

from collections.abc import Sequence
import re

from mt.base import errors
from mt.data import formats
from mt.data import lines
from mt.data import template

_MOST = 0.9  # Of the lines looked at; real text has its exceptions.
_MANY = 10  # Sources that have not the same target by chance.
_SIDES = ({'source', 'src'}, {'target', 'tgt', 'trg', 'translation'})
_is_id = re.compile(r'(?=.*\d)\S{1,64}').fullmatch
_is_number = re.compile(r'\d+').fullmatch
_is_code = re.compile('[a-z]{2,3}').fullmatch
_is_quoted = re.compile('"(?:[^"]|"")*"', re.DOTALL).fullmatch


def choose(
  files: Sequence[formats.Plain],
  first: Sequence[Sequence[str]],
  pair: str,
  columns: Sequence[int | str],
  *,
  quotes: str = '',
  reversed_pair: bool = False,
) -> tuple[lines.Parser, tuple[str, ...]]:
  """How lines become pairs, and what should be known of it.

  Args:
    files: one, or two aligned ones.
    first: the cells of some first lines that are not empty.
    pair, columns, quotes, reversed_pair: as of bitext.open_bitext.

  Raises:
    errors.UserError: the lines have not the columns that are asked for, or not
      the ones expected where none are.
  """
  where, cells = files[0].name, first[0] if first else []
  if len(files) == 2:
    return lines.Aligned(), ()
  if files[0].kind == 'json':
    note = f'its texts have keys, which data.columns={columns} does not name'
    named = has_header(columns) or not columns
    return lines.Keys(*keys(pair, columns)), () if named else (note,)
  if quotes == 'tfds':
    sides = (2, 1) if reversed_pair else (1, 2)
    parse = lines.Columns(3, *sides, id=0, json=True, may_be_empty=True)
    return parse, ('rows as TFDS counts them',)
  is_json, number = files[0].kind == 'cells', len(cells)
  if not is_json and quotes != 'text':
    _refuse_quotes(where, first)
  if columns:
    return _told(where, first, pair, columns, is_json)
  if number not in (2, 3):
    expected = 'id, source, target or source, target'
    raise _wrong_columns(where, cells, expected)
  if header := _header(cells, pair):
    raise errors.UserError(
      f'{where}: its first line is a header ({" | ".join(cells)[:200]}); '
      f'set data.columns={header} to read these columns, or to numbers, such '
      'as (1, 2), if that line is a pair.'
    )
  _refuse_meaning(where, [row for row in first if len(row) == number])
  found = [number - 2, number - 1]
  if reversed_pair:
    found.reverse()
  name = 0 if number == 3 else None
  return lines.Columns(number, *found, id=name, json=is_json), ()


def _told(where, first, pair, columns, is_json):
  """`choose` where data.columns tells the columns of a file."""
  cells, named = first[0], has_header(columns)
  number, shown = len(cells), ' | '.join(cells)
  known = cells if named else range(1, number + 1)
  for column in columns:
    if column not in known:
      raise _wrong_columns(where, cells, f'{column!r}, of {columns},')
    if named and cells.count(column) > 1:
      raise errors.UserError(
        f'{where}: {column!r} stands in its first line more than once '
        f'({shown[:200]}); name the columns apart there, or take that line out '
        'and set data.columns to numbers.'
      )
  rows = [row for row in first if len(row) == number]
  if 1 in columns and number == 3 and len(rows) >= _MANY and _ids_first(rows):
    raise errors.UserError(
      f'{where}: three columns, of which the first holds ids (such as '
      f'{rows[0][0][:80]!r}), but data.columns={columns} takes a text from it; '
      'set it to (2, 3), or, where other files of the run need it as it is, '
      "write this file's texts into the columns of the others or into a .jsonl "
      '(or give mt.evaluate --columns).'
    )
  parse = lines.Columns(number, *map(known.index, columns), json=is_json)
  if named or not _header(cells, pair):
    return parse, ()
  return parse, (f'its first line, {shown[:200]!r}, is taken for a pair',)


def has_header(columns: Sequence[int | str]) -> bool:
  """Whether `columns` are names, not numbers."""
  return bool(columns) and isinstance(columns[0], str)


def keys(pair: str, columns: Sequence[int | str]) -> Sequence[str]:
  """Under which keys of an object the texts are."""
  return columns if has_header(columns) else pair.split('-')


def _wrong_columns(where, cells, expected):
  advice = (
    'set data.columns to the two that hold source and target: numbers, or '
    'names in a header'
  )
  if len(cells) == 1:
    advice = (
      'separate them by tabs, in a .csv by commas, or give two aligned files, '
      'with {lang} in the place of the language in their names'
    )
  return errors.UserError(
    f'{where}: {len(cells)} columns in its first line '
    f'({" | ".join(cells)[:200]!r}), {expected} expected; {advice}.'
  )


def _header(cells, pair) -> tuple[str, ...]:
  """Two cells that name languages or sides, in the order of the pair, or ()."""
  found = []
  for code, side in zip(pair.lower().split('-'), _SIDES, strict=True):
    name = template.LANGUAGES.get(template.base_language(code), code)
    known = {code, name.lower()} | side
    found.append(next((c for c in cells if c.strip().lower() in known), None))
  return () if None in found or found[0] == found[1] else tuple(found)


def _most(test, rows, column) -> bool:
  return sum(bool(test(r[column])) for r in rows) >= _MOST * len(rows)


def _ids_first(rows) -> bool:
  return _most(_is_id, rows, 0)


def _refuse_meaning(where, rows):
  """Refuses columns that are not id, source, target or source, target."""
  number = len(rows[0])
  if number == 3 and not _ids_first(rows):
    cell = next(r[0] for r in rows if not _is_id(r[0]))
    raise errors.UserError(
      f'{where}: three columns, but the first one holds no ids (it has '
      f'{cell[:80]!r}); set data.columns=(1, 2) if these are source, target '
      'and something else, or to the two that hold source and target.'
    )
  for column in (number - 2, number - 1):
    cells = {r[column] for r in rows}
    what = ''
    if len(rows) > 1 and _most(_is_number, rows, column):
      what = 'numbers'
    elif len(rows) > 1 and _most(_is_code, rows, column):
      what = 'codes of languages'
    elif len(cells) == 1 and len({r[number - 2] for r in rows}) >= _MANY:
      what = 'the same in every line'
    if what:
      raise errors.UserError(
        f'{where}: column {column + 1} holds {what} ({rows[0][column][:80]!r}),'
        f' but a text is expected in the last two of {number} columns; set '
        'data.columns to the two that hold source and target.'
      )


def _refuse_quotes(where, rows):
  """Refuses tab-separated cells that are quoted as CSV has it."""
  quoted = [c for row in rows for c in row if c[:1] == '"' or c[-1:] == '"']
  fit = [c for c in quoted if len(c) > 1 and _is_quoted(c)]
  doubled = [c for c in fit if '""' in c[1:-1]]
  every = len(fit) > 1 and len(fit) == sum(map(len, rows))
  if len(fit) >= max(1, _MOST * len(quoted)) and (doubled or every):
    raise errors.UserError(
      f'{where}: its cells are quoted as in CSV (such as '
      f"{(doubled or fit)[0][:80]}); set data.quotes='csv' to read them so, or "
      "'text' if a quote is a character of the text."
    )
