"""One line of parallel text -> a pair, or the reason why it cannot be used.

What kinds of lines there are, see mt/data/formats.py. Lines end with LF or CRLF
and with nothing else: U+2028 and form feeds are text. White space around a text
is kept, and so is a line break inside one, where the format can hold it.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import re
from typing import NamedTuple


class Pair(NamedTuple):
  """One line of a parallel corpus."""

  id: str  # Its first column; where there is none, the number of its line.
  source: str
  target: str


NO_TEXT = 'no text under'
_surrogate = re.compile('[\ud800-\udfff]').search
_TWICE = object()

# (line number from 1, a line of each file) -> pair or reason.
Parser = Callable[..., Pair | str]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Texts in columns, tab-separated or cells of a JSON array; from 0."""

  number: int  # Of columns in every line.
  source: int
  target: int
  id: int | None = None
  json: bool = dataclasses.field(default=False, repr=False)
  may_be_empty: bool = dataclasses.field(default=False, repr=False)  # A text.

  def __call__(self, number: int, line: str) -> Pair | str:
    cells = json.loads(line) if self.json else line.split('\t')
    # The surrogates of CSV are bytes, see formats.
    if self.json and (fault := any_fault(cells, 'not UTF-8')):
      return fault
    if not self.may_be_empty and not any(map(str.strip, cells)):
      return 'an empty line'
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
    texts = json_texts(line, (self.source, self.target))
    return texts if isinstance(texts, str) else Pair(str(number), *texts)


@dataclasses.dataclass(frozen=True)
class Aligned:
  """Texts of the same line number in two files."""

  def __call__(self, number: int, source: str, target: str) -> Pair | str:
    return Pair(str(number), source, target)


def json_texts(line: str, keys: Sequence[str]) -> list[str] | str:
  """The texts under keys of a line's JSON object, or why there are none."""
  try:
    value = _decode_json(line)
  except (ValueError, RecursionError):
    return 'not JSON'
  texts = [_look_up(value, key) for key in keys]
  for key, text in zip(keys, texts, strict=True):
    if text is _TWICE:
      return f'more than one value for {key!r}'
    if not isinstance(text, str):
      return f'{NO_TEXT} {key!r}'
  return any_fault(texts) or texts


def _object(pairs):
  """A JSON object; a key that stands in it twice has no value of its own."""
  out = dict(pairs)
  if len(out) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    out |= {key: _TWICE for key, n in counts.items() if n > 1}
  return out


_decode_json = json.JSONDecoder(object_pairs_hook=_object).decode


def any_fault(
  texts: Sequence[str], surrogate: str = 'half a surrogate pair'
) -> str:
  """Why texts that JSON can hold cannot be used, or nothing."""
  if any('\0' in text for text in texts):
    return 'a NUL character'
  return surrogate if any(map(_surrogate, texts)) else ''


def _look_up(value, key):
  if isinstance(value, dict) and key in value:
    return value[key]
  if value is _TWICE:
    return value
  first, _, rest = key.partition('.')
  if rest and isinstance(value, dict):
    return _look_up(value.get(first), rest)
  return None


def strip_end(raw: bytes) -> bytes:
  """A line without its LF or CRLF."""
  return raw.removesuffix(b'\n').removesuffix(b'\r')


def decode(raw: bytes) -> tuple[str, str]:
  """The text of a line, and what is wrong with it, if anything is."""
  if b'\0' in raw:
    return '', 'a NUL character'
  try:
    return strip_end(raw).decode(), ''
  except UnicodeDecodeError:
    return '', 'not UTF-8'


def parse_line(parse: Parser, number: int, raws: Sequence[bytes]) -> Pair | str:
  """A pair, or the reason why there is none; `raws`: a line of each file."""
  texts, faults = zip(*map(decode, raws), strict=True)
  if any(faults):
    return min(filter(None, faults))  # A NUL first.
  if not any(map(str.strip, texts)):
    return 'an empty line'
  pair = parse(number, *texts)
  if isinstance(pair, str) or all(map(str.strip, pair[1:])):
    return pair
  if isinstance(parse, Columns) and parse.may_be_empty:
    return pair
  return 'an empty target' if pair.source.strip() else 'an empty source'
