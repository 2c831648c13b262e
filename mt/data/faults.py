"""What spoils a result: pairs that are counted, shown, and left out on demand.

  duplicates  the same pair stands in an earlier line
  leaks       its source is one of validation or test, but for case and spaces
  copies      source and target are the same, but for case and spaces
  script      most letters of a side are not of its language's script
  entities    HTML entities, such as &amp;
  lengths     one side is far longer than in most pairs of the text
  not_nfc     letter and accent apart, where Unicode's NFC has one character

`data.filter` names those that training leaves out.
"""

import array
from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import html
import math
from typing import Any
import unicodedata

import numpy as np
import regex

from mt.base import errors
from mt.base import files
from mt.data import formats
from mt.data import lines
from mt.data import template

_LENGTHS = 3.0  # Times as long as the median of the text's pairs.
_SHORT = 20  # Characters; the lengths of shorter texts say nothing.
_LETTERS = 4  # In a text, at least, to tell a script.
_CHUNK = 1 << 16
_LINES_IN_MEMORY = 1 << 20

NAMES = (
  *('duplicates', 'leaks', 'copies', 'script', 'entities', 'lengths'),
  'not_nfc',
)
_letters = regex.compile(r'\p{L}+')
_entity = regex.compile(r'&(?:\w+|#\d+|#x[\da-fA-F]+);')

Counts = dict[str, tuple[int, lines.Pair]]  # Fault -> how many, the first.


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is a fault in a pair of a text."""

  pair: str  # Of languages, such as en-fr.
  ratio: float  # Median logarithm of source / target in characters.
  # Folded source -> (`valid` or `test`, the source).
  held_out: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  # What training leaves out, and for duplicates: which lines they are.
  left_out: frozenset[str] = frozenset()
  again: np.ndarray | None = None  # [lines] bool.

  def find(self, pair: lines.Pair, names: Container[str] = NAMES) -> list[str]:
    """Which of these faults a pair has; duplicates are those of many."""
    source, target = fold(pair.source), fold(pair.target)
    tests = {
      'leaks': lambda: source in self.held_out,
      'copies': lambda: source == target,
      'script': lambda: self._other_script(pair),
      'entities': lambda: _has_entity(pair.source + pair.target),
      'lengths': lambda: self._other_length(source, target),
      'not_nfc': lambda: (
        not unicodedata.is_normalized('NFC', ''.join(pair[1:]))
      ),
    }
    return [name for name, test in tests.items() if name in names and test()]

  def _other_script(self, pair) -> bool:
    languages = map(template.base_language, self.pair.split('-'))
    sides = zip(languages, pair[1:], strict=True)
    return any(_mostly_other(code, text) for code, text in sides)

  def _other_length(self, source, target) -> bool:
    ratio = math.log(max(1, len(source)) / max(1, len(target)))
    far = abs(ratio - self.ratio) > math.log(_LENGTHS)
    return far and max(len(source), len(target)) >= _SHORT

  def why_left_out(self, line: int, pair: lines.Pair) -> str:
    """The first fault for which training leaves out a pair, or nothing."""
    if self.again is not None and self.again[line]:
      return 'duplicates'
    found = self.find(pair, self.left_out) if self.left_out else ()
    return next(iter(found), '')


def fold(text: str) -> str:
  """A text without what looks the same: case, and how wide a space is."""
  return ' '.join(text.casefold().split())


def scripts(pair: str) -> list[list[str]]:
  """Those of a pair's languages that are not written in Latin letters."""
  codes = map(template.base_language, pair.split('-'))
  return [template.SCRIPTS[code] for code in codes if code in template.SCRIPTS]


def _mostly_other(code, text) -> bool:
  if text.isascii() and code not in template.SCRIPTS:
    return False
  # Runs of letters: three times as fast as letter by letter.
  letters, own = (
    sum(map(len, pattern.findall(text))) for pattern in (_letters, _own(code))
  )
  return letters >= _LETTERS and 2 * own < letters


@functools.cache
def _own(code) -> regex.Pattern:
  scripts = (rf'\p{{{x}}}' for x in template.SCRIPTS.get(code, ['Latin']))
  return regex.compile(f'[{"".join(scripts)}]+')


def _has_entity(text) -> bool:
  return any(html.unescape(x) != x for x in _entity.findall(text))


def median_ratio(pairs: Iterable[lines.Pair]) -> float:
  """Of characters of source and target, its logarithm."""
  ratios = [
    math.log(len(p.source) / len(p.target)) for p in pairs if all(p[1:])
  ]
  return float(np.median(ratios)) if ratios else 0.0


def duplicates(text: Any) -> np.ndarray:
  """Which lines of a Bitext have the pair of an earlier one: [lines] bool.

  Found by hashes of 64 bits; for a large text once, then kept in the cache.
  """
  number, kept = len(text), formats.folder() / f'{text.digest}.again'
  if number > _LINES_IN_MEMORY and kept.exists():
    return np.memmap(kept, bool, 'r')
  hashes = np.zeros(number, np.uint64)
  for at in range(0, number, _CHUNK):
    looked = text.look(range(at, min(at + _CHUNK, number)))
    hashes[at + looked.usable] = [_hash(p) for p in looked.pairs]
  again = _again(hashes) & (hashes != 0)  # Which stands for no pair.
  if number > _LINES_IN_MEMORY:
    with files.new_file(kept) as f:
      f.write(again)
  return again


def _again(hashes) -> np.ndarray:
  """Which of them stand further in front, too: [n] bool."""
  out = np.ones(len(hashes), bool)
  out[np.unique(hashes, return_index=True)[1]] = False
  return out


def _hash(pair) -> int:
  text = f'{pair.source}\0{pair.target}'.encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) or 1


def count(text: Any, which: Sequence[int]) -> Counts:
  """How many pairs of these lines of a Bitext have each fault; most first."""
  places, hashes, counts = [], array.array('Q'), {}
  for at in range(0, len(which), _CHUNK):
    part = np.asarray(which[at : at + _CHUNK])
    looked = text.look(part)
    places.append(part[looked.usable])
    for pair in looked.pairs:
      hashes.append(_hash(pair))
      for name in text.rules.find(pair):
        number, first = counts.get(name, (0, pair))
        counts[name] = number + 1, first
  again = _again(np.frombuffer(hashes, np.uint64))
  if number := int(again.sum()):
    first = np.concatenate(places)[again][:1]
    counts['duplicates'] = number, text.read(first)[0]
  return dict(sorted(counts.items(), key=lambda item: -item[1][0]))


def describe(counts: Counts) -> str:
  """Them in a line; or nothing."""
  return ', '.join(f'{number:,} {name}' for name, (number, _) in counts.items())


def show(counts: Counts) -> list[str]:
  """A line for each fault, with its first pair and what leaves it out."""
  return [
    f'  {name:10} {number:9,}  {p.id}: {p.source[:50]!r} -> {p.target[:50]!r}  '
    f'(data.filter={name} leaves them out)'
    for name, (number, p) in counts.items()
  ]


def refuse_leaks(where: str, pairs: Iterable[lines.Pair], rules: Rules) -> None:
  """Refuses training pairs whose sources are tested.

  Raises:
    errors.UserError: with how many there are.
  """
  found = [
    (p, rules.held_out[fold(p.source)][1])
    for p in pairs
    if rules.held_out.get(fold(p.source), ('',))[0] == 'test'
  ]
  if found:
    exact = sum(p.source == tested for p, tested in found)
    raise errors.UserError(
      f'{where}: {len(found):,} of its sources are in the test text, too '
      f'({exact:,} to the letter; the first is {found[0][0].id}: '
      f'{found[0][0].source[:80]!r}), so that scores would be too good; set '
      "data.filter='leaks' to train without these pairs, or data.allow_leaks "
      'to train on them.'
    )
