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
from typing import BinaryIO
from typing import NamedTuple

from mt.base import errors

LONGEST = 1 << 20  # Bytes of a line; the longest pairs of MTNT have 2,000.


class Pair(NamedTuple):
  """One line of a parallel corpus.

  Attributes:
    id: its first column; where there is none, the number of its line.
    source: the text to be translated.
    target: its translation.
  """

  id: str
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
    texts = [_look_up(value, key) for key in (self.source, self.target)]
    for key, text in zip((self.source, self.target), texts, strict=True):
      if not isinstance(text, str):
        return f'no text under {key!r}'
      if '\0' in text:
        return 'a NUL character'
      if '\n' in text:
        return 'a line break in a text'
      if not text.isascii() and any('\ud800' <= c <= '\udfff' for c in text):
        return 'half a surrogate pair'
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
  if rest and isinstance(value, dict) and first in value:
    return _look_up(value[first], rest)
  return None


def make_parser(
  paths: Sequence[str],
  files: Sequence[BinaryIO],
  pair: str,
  columns: Sequence[int | str],
  *,
  turned: bool,
) -> tuple[Parser, bool]:
  """How lines become pairs, and whether the first line is a header.

  Args:
    paths: one or two.
    files: these, open, past a byte-order mark.
    pair: of languages, such as en-fr.
    columns: see bitext.open_bitext.
    turned: see bitext.open_bitext.

  Raises:
    errors.UserError: the first line has not the columns that are asked for.
  """
  named = bool(columns) and isinstance(columns[0], str)
  if len(paths) == 2:
    return Aligned(), False
  if paths[0].endswith('.jsonl'):
    return Keys(*(columns if named else pair.split('-'))), False
  start, first = files[0].tell(), ''
  while not first.strip() and (raw := files[0].readline(LONGEST)):
    first = raw.decode(errors='replace')
    if named:
      break
  files[0].seek(start)
  if not (first if named else first.strip()):
    raise no_pair(paths[0])
  cells = first.rstrip('\r\n').split('\t')
  if named:
    missing = [name for name in columns if name not in cells]
    if missing:
      raise errors.UserError(
        f'{paths[0]}: no column {missing[0]!r} in its first line, which has '
        f'{" ".join(cells)[:200]!r}; mend data.columns, or give the numbers of '
        'the columns if there is no header.'
      )
    source, target = (cells.index(name) for name in columns)
  elif columns:
    source, target = (number - 1 for number in columns)
  elif len(cells) in (2, 3):
    source, target = len(cells) - 2, len(cells) - 1
  else:
    source, target = len(cells), len(cells)
  if max(source, target) >= len(cells):
    raise errors.UserError(
      f'{paths[0]}: tab-separated columns in its first line: {len(cells)}, '
      f'expected {columns or "id, source, target or source, target"}; set '
      'data.columns to the two that hold source and target.'
    )
  if turned and not columns:
    source, target = target, source
  has_id = len(cells) == 3 and not columns
  return Columns(len(cells), source, target, 0 if has_id else None), named


def no_pair(where: str) -> errors.UserError:
  """The sentence for a text without a usable line."""
  return errors.UserError(
    f'{where}: no pair in it; one a line is expected: name another file.'
  )


def strip_end(raw: bytes) -> bytes:
  """A line without its LF or CRLF."""
  return raw.removesuffix(b'\n').removesuffix(b'\r')


def parse_line(parse: Parser, number: int, raws: Sequence[bytes]) -> Pair | str:
  """A pair, or the reason why there is none; `raws`: of each file, ends off."""
  texts = []
  for raw in raws:
    if b'\0' in raw:
      return 'a NUL character'
    try:
      texts.append(raw.decode())
    except UnicodeDecodeError:
      return 'not UTF-8'
  pair = parse(number, *texts)
  if isinstance(pair, str):
    return pair if any(map(str.strip, texts)) else 'an empty line'
  if not pair.source.strip():
    return 'an empty source' if any(map(str.strip, texts)) else 'an empty line'
  return pair if pair.target.strip() else 'an empty target'
