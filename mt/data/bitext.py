"""Parallel text on disk: every line is looked at once, then read by number.

A line that cannot be used is counted under its reason. What is kept in memory
of a usable one is where it stands. Formats: see mt/data/lines.py.
"""

import array
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from mt.base import errors
from mt.base import journal
from mt.data import lines

_BOM = b'\xef\xbb\xbf'


@dataclasses.dataclass(frozen=True)
class Bitext:
  """The usable pairs of one split, on disk.

  Attributes:
    paths: one file, or two aligned ones.
    stats: what os.fstat said of each: device, inode, size, time of change.
    parse: (line number, a line of each file) -> pair, or why there is none.
    starts: [n, files] int64, bytes before each line.
    sizes: [n, files] int32, bytes of each line.
    numbers: [n] int32, line numbers from 1.
    num_lines: how many lines were looked at.
    unusable: reason -> (how many lines, the first one's number).
    notes: what else a reader should know.
    digest: changes with the content and with how it is read.
    pairs: instead of all that, the pairs themselves (see read_as_tfds).
  """

  paths: tuple[str, ...]
  stats: tuple[tuple[int, ...], ...]
  parse: lines.Parser
  starts: np.ndarray
  sizes: np.ndarray
  numbers: np.ndarray
  num_lines: int
  unusable: dict[str, tuple[int, int]]
  notes: tuple[str, ...]
  digest: str
  pairs: tuple[lines.Pair, ...] = ()

  def __len__(self) -> int:
    return len(self.pairs) or len(self.numbers)

  @property
  def where(self) -> str:
    return ' + '.join(self.paths)

  def read(self, which: Sequence[int] | None = None) -> list[lines.Pair]:
    """The pairs of these numbers (0 is the first usable one), or all.

    Raises:
      errors.UserError: a file is gone, or not what it was.
    """
    which = range(len(self)) if which is None else which
    if self.pairs:
      return [self.pairs[i] for i in which]
    columns = [self._read_lines(file, which) for file in range(len(self.paths))]
    numbers = self.numbers[which].tolist()
    out = [self.parse(*line) for line in zip(numbers, *columns, strict=True)]
    if any(isinstance(pair, str) for pair in out):
      raise _changed(self.where, 'another content')
    return out

  def _read_lines(self, file, which):
    path = self.paths[file]
    try:
      with open(path, 'rb', buffering=0) as f:
        if _stat(f) != self.stats[file]:
          raise OSError(0, 'another size or time')
        fd = f.fileno()
        return [
          os.pread(fd, size, start).decode()
          for start, size in zip(
            self.starts[which, file].tolist(),
            self.sizes[which, file].tolist(),
            strict=True,
          )
        ]
    except (OSError, UnicodeDecodeError) as e:
      raise _changed(path, getattr(e, 'strerror', e)) from None


def _changed(where, what) -> errors.UserError:
  return errors.UserError(
    f'{where}: changed or gone since the run began ({what}); put the file back '
    'as it was and start again.'
  )


def _stat(f) -> tuple[int, ...]:
  s = os.fstat(f.fileno())
  return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def open_bitext(
  paths: Sequence[str | pathlib.Path],
  pair: str,
  columns: Sequence[int | str] = (),
  *,
  turned: bool = False,
  max_bad_fraction: float = 0.0,
) -> Bitext:
  """Looks at every line of a file, or of two aligned ones.

  Args:
    paths: one file or two.
    pair: of languages, such as en-fr.
    columns: of source and target: numbers from 1, or names out of a header
      line; keys in JSON lines. () takes columns `id source target` or
      `source target`, and in JSON lines the languages as keys.
    turned: the usual columns hold target and source.
    max_bad_fraction: of unusable lines that are put up with.

  Raises:
    errors.UserError: unreadable, in another format, without a pair, aligned
      files of different length, or too many unusable lines.
  """
  paths = tuple(str(p) for p in paths)
  where = ' + '.join(paths)
  with contextlib.ExitStack() as stack:
    try:
      files = [stack.enter_context(open(p, 'rb')) for p in paths]
      stats = tuple(_stat(f) for f in files)
      notes = [
        f'{path}: a byte-order mark in front, left out'
        for path, f in zip(paths, files, strict=True)
        if _skip_bom(path, f)
      ]
      parse, header = lines.make_parser(
        paths, files, pair, columns, turned=turned
      )
      found = _index(files, parse, header, sum(s[2] for s in stats))
      content = [
        hashlib.file_digest(f, 'sha256').hexdigest()
        for f in files
        if f.seek(0) == 0
      ]
    except OSError as e:
      raise unreadable(e.filename or where, e) from None
  bad = sum(count for count, _ in found.unusable.values())
  # Divided, for 0.29 * 100 is less than 29.
  if bad and bad / found.num_lines > max_bad_fraction:
    raise errors.UserError(
      f'{where}: {bad:,} of its {found.num_lines:,} lines cannot be used '
      f'({_reasons(found.unusable)}), more than data.max_bad_fraction='
      f'{max_bad_fraction:g}; mend them, or raise it.'
    )
  if not found.numbers:
    raise lines.no_pair(where)
  again = found.repeated_ids()
  if again:
    notes.append(
      f'{len(again):,} ids occur again, the first in line {min(again):,}; kept'
    )
  identity = json.dumps([content, repr(parse), header])
  return Bitext(
    paths=paths,
    stats=stats,
    parse=parse,
    starts=np.frombuffer(found.starts, np.int64).reshape(-1, len(paths)),
    sizes=np.frombuffer(found.sizes, np.int32).reshape(-1, len(paths)),
    numbers=np.frombuffer(found.numbers, np.int32),
    num_lines=found.num_lines,
    unusable=found.unusable,
    notes=tuple(notes),
    digest=hashlib.sha256(identity.encode()).hexdigest(),
  )


def unreadable(path: str, e: OSError) -> errors.UserError:
  """The sentence for a parallel text that cannot be read."""
  return errors.UserError(
    f'{path}: cannot read the parallel text ({e.strerror or e}); data.source, '
    'data.valid and data.test name a folder in the layout of MTNT, an archive '
    'of it, or files (with {split} and {lang} in their names, if need be).'
  )


def _skip_bom(path, f) -> bool:
  start = f.read(3)
  if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
    raise errors.UserError(
      f'{path}: UTF-16 found, UTF-8 expected; convert it, for example with '
      '`iconv -f utf-16 -t utf-8`.'
    )
  f.seek(3 if start == _BOM else 0)
  return start == _BOM


def _int64():
  return array.array('q')


def _int32():
  return array.array('i')


@dataclasses.dataclass
class _Found:
  """Usable lines, as Bitext has them, with a hash of each id."""

  starts: array.array = dataclasses.field(default_factory=_int64)
  sizes: array.array = dataclasses.field(default_factory=_int32)
  numbers: array.array = dataclasses.field(default_factory=_int32)
  ids: array.array = dataclasses.field(default_factory=_int64)
  unusable: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  num_lines: int = 0

  def repeated_ids(self) -> list[int]:
    """Line numbers of usable lines whose id an earlier line has."""
    ids = np.frombuffer(self.ids, np.int64)
    in_order = np.sort(ids)
    if not (in_order[1:] == in_order[:-1]).any():
      return []
    _, first = np.unique(ids, return_index=True)
    again = np.ones(len(ids), bool)
    again[first] = False
    return np.frombuffer(self.numbers, np.int32)[again].tolist()


def _index(files, parse, header, total) -> _Found:
  """One pass over every line."""
  out = _Found()
  has_ids = isinstance(parse, lines.Columns) and parse.id is not None
  progress = journal.Progress(f'{files[0].name}, MB', total // 10**6, every=100)
  at = [f.tell() for f in files]
  if header:
    first = files[0].readline(lines.LONGEST)
    at[0] += len(first) + _rest_of_line(files[0], first)
  while True:
    raws = [f.readline(lines.LONGEST) for f in files]
    if not all(raws):
      break
    out.num_lines += 1
    number = out.num_lines + header
    bodies = [lines.strip_end(raw) for raw in raws]
    pair = lines.parse_line(parse, number, bodies)
    starts, at = at, [a + len(raw) for a, raw in zip(at, raws, strict=True)]
    if any(len(raw) == lines.LONGEST for raw in raws):
      rest = [_rest_of_line(f, raw) for f, raw in zip(files, raws, strict=True)]
      at = [a + n for a, n in zip(at, rest, strict=True)]
      if any(rest):
        pair = f'longer than {lines.LONGEST:,} bytes'
    if isinstance(pair, str):
      count, first = out.unusable.get(pair, (0, number))
      out.unusable[pair] = count + 1, first
    else:
      out.starts.extend(starts)
      out.sizes.extend(map(len, bodies))
      out.numbers.append(number)
      if has_ids:
        out.ids.append(hash(pair.id))
    if not out.num_lines & 0xFFFF:
      progress.update(sum(at) // 10**6)
  progress.close()
  if any(raws):
    more, less = (0, 1) if raws[0] else (1, 0)
    count, raw = out.num_lines, raws[more]
    while raw:
      count += 1
      _rest_of_line(files[more], raw)
      raw = files[more].readline(lines.LONGEST)
    raise errors.UserError(
      f'{files[more].name} has {count:,} lines and {files[less].name} '
      f'{out.num_lines:,}; aligned files have a line for each other: find '
      'where they part.'
    )
  return out


def _rest_of_line(f, start: bytes) -> int:
  """Reads to the end of a line that has begun with `start`; its bytes."""
  size, last = 0, start
  while not last.endswith(b'\n') and (last := f.readline(lines.LONGEST)):
    size += len(last)
  return size


def _reasons(unusable) -> str:
  return ', '.join(
    f'{count:,} {reason} (the first in line {first:,})'
    for reason, (count, first) in sorted(
      unusable.items(), key=lambda item: -item[1][0]
    )
  )


def describe(bitext: Bitext) -> str:
  """What became of the lines, in a sentence or a few."""
  text = f'{bitext.where}: {bitext.num_lines:,} lines, {len(bitext):,} pairs'
  if bitext.unusable:
    text += f'; not used: {_reasons(bitext.unusable)}'
  return '; '.join([text, *bitext.notes])
