"""Parallel text on disk: where its lines are, and pairs read by number.

What a line holds is looked at when it is read. A line that cannot be used is
counted under its reason; a text of up to 65,536 lines is looked at whole when
it is opened, of a larger one a sample, and the rest when it is tokenised.
Formats: see mt/data/formats.py and mt/data/columns.py.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from mt.base import errors
from mt.data import columns as columns_lib
from mt.data import faults
from mt.data import formats
from mt.data import line_index
from mt.data import lines
from mt.data import typography

_LOOK_AT_ALL = 1 << 16  # Lines; of more, as many as _SAMPLE, evenly spread.
_SAMPLE = 1 << 12
_CHANCE = 5  # Standard deviations of the number of bad lines in a sample.
_FIRST = 1000  # Lines that tell what the columns mean.

Unusable = dict[str, tuple[int, int]]  # Reason -> (how many, the first one).


class Looked(NamedTuple):
  """What became of some lines."""

  number: int  # Of lines.
  pairs: list[lines.Pair]
  usable: np.ndarray  # [pairs] int64, which of these lines they are.
  unusable: Unusable


class File(NamedTuple):
  """A file of lines, as it was when it was opened."""

  name: str  # As it was asked for.
  path: str  # See formats.Plain.
  stat: tuple[int, ...]  # A file that changes is refused.
  starts: np.ndarray  # See line_index.Index.
  digest: str

  def read(self, which: np.ndarray) -> list[bytes]:
    """These lines of it, from 0.

    Raises:
      errors.UserError: it is gone, or not what it was.
    """
    begin, sizes = self.starts[which], self.starts[which + 1]
    sizes = (sizes - begin).tolist()
    try:
      with open(self.path, 'rb', buffering=0) as f:
        if _stat(f) != self.stat:
          raise OSError(0, 'another size or time')
        fd, places = f.fileno(), zip(sizes, begin.tolist(), strict=True)
        return [os.pread(fd, size, at) for size, at in places]
    except OSError as e:
      raise errors.UserError(
        f'{self.name}: changed or gone since the run began '
        f'({e.strerror}); put the file back as it was and start again.'
      ) from e


@dataclasses.dataclass(frozen=True)
class Bitext:
  """The lines of one split, on disk; line 0 is the first after a header."""

  files: tuple[File, ...]  # One, or two aligned ones.
  parse: lines.Parser
  header: int  # Lines before line 0.
  max_bad_fraction: float  # Of unusable lines that are put up with.
  notes: tuple[str, ...]  # What else a reader should know.
  digest: str  # Changes with the content and with how it is read.
  pair: str  # The direction, such as en-fr.
  rules: faults.Rules | None = None  # What training leaves out, see corpus.
  apostrophe: str = ''  # Of all targets; '' for their own.
  unit: str = 'line'  # See formats.Plain.

  def __len__(self) -> int:
    """Lines, usable or not."""
    return len(self.files[0].starts) - 1 - self.header

  @property
  def where(self) -> str:
    return ' + '.join(file.name for file in self.files)

  @property
  def sample_lines(self) -> np.ndarray:
    """All lines, or of a large text some, see _LOOK_AT_ALL."""
    number = len(self) if len(self) <= _LOOK_AT_ALL else _SAMPLE
    return np.linspace(0, len(self) - 1, number).astype(np.int64)

  @functools.cached_property
  def sample(self) -> Looked:
    """What became of these lines."""
    return self.look(self.sample_lines)

  def read(self, which: Sequence[int] | None = None) -> list[lines.Pair]:
    """The pairs of these lines, or of all, without the unusable ones.

    Raises:
      errors.UserError: a file is gone, or not what it was.
    """
    return self.look(range(len(self)) if which is None else which).pairs

  def look(self, which: Sequence[int]) -> Looked:
    """The pairs of these lines, and why others are none; see `read`."""
    which = np.asarray(which, np.int64)
    pairs, usable, unusable = [], [], {}
    raws = zip(*(f.read(which + self.header) for f in self.files), strict=True)
    for at, (line, raw) in enumerate(zip(which.tolist(), raws, strict=True)):
      number = line + self.header + 1
      pair = lines.parse_line(self.parse, number, raw)
      why = pair if isinstance(pair, str) else ''
      if not why and self.rules:
        why = self.rules.why_left_out(line, pair)
      if why:
        count, first = unusable.get(why, (0, number))
        unusable[why] = count + 1, min(first, number)
        continue
      if self.apostrophe:
        target = typography.with_apostrophe(pair.target, self.apostrophe)
        pair = pair._replace(target=target)
      pairs.append(pair)
      usable.append(at)
    return Looked(len(which), pairs, np.array(usable, np.int64), unusable)

  def check(self, unusable: Unusable, number: int) -> None:
    """Refuses too many unusable ones among `number` lines.

    Of some lines drawn at random a little more is put up with, so that chance
    stops no run; of a text that was looked at whole before, any number.
    """
    whole = number == len(self)
    if not whole and len(self) <= _LOOK_AT_ALL:
      return
    lost = sum(count for count, _ in unusable.values())
    bad = lost - sum(unusable.get(name, (0,))[0] for name in faults.NAMES)
    most = self.max_bad_fraction
    if not whole:
      most += _CHANCE * math.sqrt(most / number)
    if lost == number and (whole or bad == number):
      raise no_pair(self.where, unusable, self.unit)
    # Divided, for 0.29 * 100 is less than 29.
    if bad and bad / number > most:
      of = 'its' if whole else 'some'
      raise errors.UserError(
        f'{self.where}: {bad:,} of {of} {number:,} lines cannot be used '
        f'({reasons(unusable, self.unit)}), more than data.max_bad_fraction='
        f'{self.max_bad_fraction:g}; mend them, or raise it.'
      )


def _stat(f) -> tuple[int, ...]:
  s = os.fstat(f.fileno())
  return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def open_bitext(
  paths: Sequence[str | pathlib.Path],
  pair: str,
  columns: Sequence[int | str] = (),
  *,
  quotes: str = '',
  reversed_pair: bool = False,
  max_bad_fraction: float = 0.0,
) -> Bitext:
  """Opens a file, or two aligned ones.

  Args:
    paths: one file or two.
    pair: of languages, such as en-fr.
    columns: of source and target: numbers from 1, or names out of a header
      line; keys in JSON lines and parquet. () takes columns `id source target`
      or `source target`, and the languages as keys.
    quotes: `csv` or `text`, see data.quotes; or `tfds`, see data.tfds_quoting.
    reversed_pair: the usual columns hold target and source.
    max_bad_fraction: of unusable lines that are put up with.

  Raises:
    errors.UserError: unreadable, in another format, without a pair, aligned
      files of different length, too many unusable lines, or columns that hold
      something else.
  """
  keys = columns_lib.keys(pair, columns)
  plain, opened = [], []
  for path in map(str, paths):
    try:
      file = formats.open_plain(path, quotes, keys, aligned=len(paths) == 2)
      with open(file.path, 'rb') as f:
        stat = _stat(f)
      index = line_index.index(file.path, file.name)
    except OSError as e:
      raise unreadable(path, e) from e
    plain.append(file)
    opened.append(File(file.name, file.path, stat, *index))
  _check_alignment(opened)
  named = columns_lib.has_header(columns)
  in_columns = len(opened) == 1 and plain[0].kind != 'json'
  first = _first_cells(opened[0], plain[0].kind, named) if in_columns else []
  parse, notes = columns_lib.choose(
    plain, first, pair, columns, quotes=quotes, reversed_pair=reversed_pair
  )
  header = named and isinstance(parse, lines.Columns)
  text = Bitext(
    files=tuple(opened),
    parse=parse,
    header=int(header),
    max_bad_fraction=max_bad_fraction,
    notes=notes,
    digest=digest_of([file.digest for file in opened], repr(parse), header),
    pair=pair,
    unit=plain[0].unit,
  )
  text.check(text.sample.unusable, text.sample.number)
  return text


def digest_of(*parts: Any) -> str:
  """The SHA-256 of what JSON can hold."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check_alignment(opened):
  less, more = (f(opened, key=lambda x: len(x.starts)) for f in (min, max))
  if len(less.starts) < len(more.starts):
    raise errors.UserError(
      f'{more.name} has {len(more.starts) - 1:,} lines and {less.name} '
      f'{len(less.starts) - 1:,}; aligned files have a line for each other: '
      'find where they part.'
    )


def _first_cells(file, kind, named) -> list[list[str]]:
  """The columns of some first lines with something in them.

  Where columns are `named`, the very first is one of them.
  """
  number = len(file.starts) - 1
  for at in range(0, number, _FIRST):
    raws = file.read(np.arange(at, min(at + _FIRST, number)))
    texts = [lines.strip_end(raw).decode(errors='replace') for raw in raws]
    split = json.loads if kind == 'cells' else lambda x: x.split('\t')
    rows = enumerate(map(split, texts), at)
    out = [x for i, x in rows if any(map(str.strip, x)) or (named and not i)]
    if out:
      return out
  raise no_pair(file.name, {})


def reasons(unusable: Unusable, unit: str) -> str:
  """Why lines were not used, the most frequent reason first."""
  by_count = sorted(unusable.items(), key=lambda item: -item[1][0])
  return ', '.join(
    f'{count:,} {reason} (the first in {unit} {first:,})'
    for reason, (count, first) in by_count
  )


def unreadable(path: str, e: OSError) -> errors.UserError:
  """The error for a parallel text that cannot be read."""
  return errors.UserError(
    f'{path}: cannot read the parallel text ({e.strerror or e}); for what '
    'data.source, data.valid and data.test may name see mt/data/corpus.py.'
  )


def no_pair(
  where: str, unusable: Unusable, unit: str = 'line'
) -> errors.UserError:
  """The error for a text without a usable line."""
  why = f' ({reasons(unusable, unit)})' if unusable else ''
  advice = 'name another file'
  if unusable.keys() & faults.NAMES:
    advice += ', or change data.filter'
  if any(reason.startswith(lines.NO_TEXT) for reason in unusable):
    advice = 'set data.columns to the keys of its texts, a.b for b in a'
  return errors.UserError(
    f'{where}: no pair in it{why}; one a line is expected: {advice}.'
  )


def describe(text: Bitext) -> str:
  """What became of the lines, in a sentence or a few."""
  looked_at, pairs, _, unusable = text.sample
  out = f'{text.where}: {len(text):,} lines, '
  if looked_at < len(text):
    out += f'{looked_at:,} of them looked at: '
  out += f'{len(pairs):,} pairs'
  if unusable:
    out += f'; not used: {reasons(unusable, text.unit)}'
  return '; '.join([out, *text.notes])
