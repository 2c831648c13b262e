"""One line of parallel text -> a pair, or the reason why it cannot be used.

The file's name tells the format:
  *.jsonl        one JSON object a line, the texts under two keys
  two files      line n of one belongs to line n of the other
  anything else  tab-separated columns; a quote is just a character

Lines end with LF or CRLF and with nothing else: U+2028 and form feeds are text.
White space around a text is kept.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
from typing import NamedTuple

from mt.base import errors


class Pair(NamedTuple):
  """One line of a parallel corpus."""

  id: str  # Its first column; where there is none, the number of its line.
  source: str
  target: str


# (line number from 1, a line of each file) -> pair or reason.
Parser = Callable[..., Pair | str]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Texts in tab-separated columns; indices from 0."""

  number: int  # Of columns in every line.
  source: int
  target: int
  id: int | None = None

  def __call__(self, number: int, line: str) -> Pair | str:
    cells = line.split('\t')
    if len(cells) != self.number:
      less = len(cells) < self.number
      return f'{"fewer" if less else "more"} than {self.number} columns'
    name = str(number) if self.id is None else cells[self.id]
    return Pair(name, cells[self.source], cells[self.target])


@dataclasses.dataclass(frozen=True)
class Keys:
  """Texts under keys of a JSON object; `a.b` is b in the object of a."""

  source: str
  target: str

  def __call__(self, number: int, line: str) -> Pair | str:
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      return 'not JSON'
    texts = []
    for key in (self.source, self.target):
      text = _look_up(value, key)
      if not isinstance(text, str):
        return f'no text under {key!r}'
      if '\0' in text:
        return 'a NUL character'
      if '\n' in text:
        return 'a line break in a text'
      if any('\ud800' <= c <= '\udfff' for c in text):
        return 'half a surrogate pair'
      texts.append(text)
    return Pair(str(number), *texts)


@dataclasses.dataclass(frozen=True)
class Aligned:
  """Texts of the same line number in two files."""

  def __call__(self, number: int, source: str, target: str) -> Pair | str:
    return Pair(str(number), source, target)


def _look_up(value, key):
  if isinstance(value, dict) and key in value:
    return value[key]
  first, _, rest = key.partition('.')
  if rest and isinstance(value, dict):
    return _look_up(value.get(first), rest)
  return None


def parse_line(parse: Parser, number: int, raws: Sequence[bytes]) -> Pair | str:
  """A pair, or the reason why there is none; `raws`: of each file, ends off."""
  if any(b'\0' in raw for raw in raws):
    return 'a NUL character'
  try:
    texts = [raw.decode() for raw in raws]
  except UnicodeDecodeError:
    return 'not UTF-8'
  if not any(map(str.strip, texts)):
    return 'an empty line'
  pair = parse(number, *texts)
  if isinstance(pair, str):
    return pair
  if not pair.source.strip():
    return 'an empty source'
  return pair if pair.target.strip() else 'an empty target'


def strip_end(raw: bytes) -> bytes:
  """A line without its LF or CRLF."""
  return raw.removesuffix(b'\n').removesuffix(b'\r')


def make_parser(
  paths: Sequence[str],
  first: str,
  pair: str,
  columns: Sequence[int | str],
  *,
  reversed_pair: bool,
) -> Parser:
  """How lines become pairs; the arguments are those of bitext.open_bitext.

  Args:
    first: the header line, where `columns` has names; else the first line with
      something in it.

  Raises:
    errors.UserError: the first line has not the columns that are asked for.
  """
  if len(paths) == 2:
    return Aligned()
  if paths[0].endswith('.jsonl'):
    return Keys(*(columns if has_header(columns) else pair.split('-')))
  cells = first.split('\t')
  if has_header(columns):
    for name in columns:
      if name not in cells:
        raise errors.UserError(
          f'{paths[0]}: no column {name!r} in its first line, which has '
          f'{" ".join(cells)[:200]!r}; mend data.columns, or give the numbers '
          'of the columns if there is no header.'
        )
    return Columns(len(cells), *map(cells.index, columns))
  source, target = (n - 1 for n in columns or (len(cells) - 1, len(cells)))
  if max(source, target) >= len(cells) or not (columns or len(cells) in (2, 3)):
    raise errors.UserError(
      f'{paths[0]}: tab-separated columns in its first line: {len(cells)}, '
      f'expected {columns or "id, source, target or source, target"}; set '
      'data.columns to the two that hold source and target.'
    )
  if columns:
    return Columns(len(cells), source, target)
  if reversed_pair:
    source, target = target, source
  return Columns(len(cells), source, target, 0 if len(cells) == 3 else None)


def has_header(columns: Sequence[int | str]) -> bool:
  """Whether `columns` are names, not numbers."""
  return bool(columns) and isinstance(columns[0], str)


def no_pair(where: str) -> errors.UserError:
  """The error for a text without a usable line."""
  return errors.UserError(
    f'{where}: no pair in it; one a line is expected: name another file.'
  )
