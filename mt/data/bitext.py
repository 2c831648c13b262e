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
  """The usable pairs of one split, on disk."""

  paths: tuple[str, ...]  # One file, or two aligned ones.
  stats: tuple[tuple[int, ...], ...]  # Of each; a file that changes is refused.
  parse: lines.Parser
  starts: np.ndarray  # [n, files] int64, bytes before each line.
  sizes: np.ndarray  # [n, files] int32, bytes of each line.
  numbers: np.ndarray  # [n] int32, line numbers from 1.
  num_lines: int  # How many were looked at.
  unusable: dict[str, tuple[int, int]]  # Reason -> (how many, the first one).
  notes: tuple[str, ...]  # What else a reader should know.
  digest: str  # Changes with the content and with how it is read.
  # Instead of all that, the pairs themselves, see mt/data/tfds.py.
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
    texts = [self._read_lines(file, which) for file in range(len(self.paths))]
    numbers = self.numbers[which].tolist()
    return list(map(self.parse, numbers, *texts))

  def _read_lines(self, file, which):
    path = self.paths[file]
    starts, sizes = self.starts[which, file], self.sizes[which, file]
    try:
      with open(path, 'rb', buffering=0) as f:
        if _stat(f) != self.stats[file]:
          raise OSError(0, 'another size or time')
        fd = f.fileno()
        return [
          os.pread(fd, size, start).decode()
          for size, start in zip(sizes.tolist(), starts.tolist(), strict=True)
        ]
    except (OSError, UnicodeDecodeError) as e:
      raise errors.UserError(
        f'{path}: changed or gone since the run began '
        f'({getattr(e, "strerror", e)}); put the file back as it was and start '
        'again.'
      ) from e


def _stat(f) -> tuple[int, ...]:
  s = os.fstat(f.fileno())
  return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def open_bitext(
  paths: Sequence[str | pathlib.Path],
  pair: str,
  columns: Sequence[int | str] = (),
  *,
  reversed_pair: bool = False,
  max_bad_fraction: float = 0.0,
) -> Bitext:
  """Looks at every line of a file, or of two aligned ones.

  Args:
    paths: one file or two.
    pair: of languages, such as en-fr.
    columns: of source and target: numbers from 1, or names out of a header
      line; keys in JSON lines. () takes columns `id source target` or
      `source target`, and in JSON lines the languages as keys.
    reversed_pair: the usual columns hold target and source.
    max_bad_fraction: of unusable lines that are put up with.

  Raises:
    errors.UserError: unreadable, in another format, without a pair, aligned
      files of different length, or too many unusable lines.
  """
  paths = tuple(map(str, paths))
  with contextlib.ExitStack() as stack:
    try:
      files = [stack.enter_context(open(p, 'rb')) for p in paths]
      stats = tuple(_stat(f) for f in files)
      notes = [
        f'{path}: a byte-order mark in front, left out'
        for path, f in zip(paths, files, strict=True)
        if _skip_bom(path, f)
      ]
      first, header = _first_line(paths, files, columns)
      parse = lines.make_parser(
        paths, first, pair, columns, reversed_pair=reversed_pair
      )
      found = _look_at_lines(files, parse, header)
      content = [_sha256(f) for f in files]
    except OSError as e:
      raise unreadable(e.filename or ' + '.join(paths), e) from e
  identity = json.dumps([content, repr(parse), header])
  text = Bitext(
    paths=paths,
    stats=stats,
    parse=parse,
    notes=tuple(notes),
    digest=hashlib.sha256(identity.encode()).hexdigest(),
    **found,
  )
  bad = text.num_lines - len(text)
  # Divided, for 0.29 * 100 is less than 29.
  if bad and bad / text.num_lines > max_bad_fraction:
    raise errors.UserError(
      f'{text.where}: {bad:,} of its {text.num_lines:,} lines cannot be used '
      f'({_reasons(text.unusable)}), more than data.max_bad_fraction='
      f'{max_bad_fraction:g}; mend them, or raise it.'
    )
  if not len(text):
    raise lines.no_pair(text.where)
  return text


def _sha256(f) -> str:
  f.seek(0)
  return hashlib.file_digest(f, 'sha256').hexdigest()


def _skip_bom(path, f) -> bool:
  start = f.read(3)
  if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
    raise errors.UserError(
      f'{path}: UTF-16 found, UTF-8 expected; convert it, for example with '
      '`iconv -f utf-16 -t utf-8`.'
    )
  f.seek(3 if start == _BOM else 0)
  return start == _BOM


def _first_line(paths, files, columns) -> tuple[str, bool]:
  """The line that tells the columns, and whether it is a header.

  A header is read, any other line is left to be read again.
  """
  if len(paths) == 2 or paths[0].endswith('.jsonl'):
    return '', False
  header, start = lines.has_header(columns), files[0].tell()
  for raw in iter(files[0].readline, b''):
    first = raw.decode(errors='replace')
    if header or first.strip():
      break
  else:
    raise lines.no_pair(paths[0])
  if not header:
    files[0].seek(start)
  return first.rstrip('\r\n'), header


def _look_at_lines(files, parse, header):
  """One pass over every line: the fields of Bitext that it gives."""
  starts, sizes, numbers = array.array('q'), array.array('i'), array.array('i')
  num_lines, unusable = 0, {}
  total = sum(os.fstat(f.fileno()).st_size for f in files)
  progress = journal.Progress(f'{files[0].name}, MB', total // 10**6, every=100)
  at = [f.tell() for f in files]
  while all(raws := [f.readline() for f in files]):
    num_lines += 1
    number = num_lines + header
    bodies = [lines.strip_end(raw) for raw in raws]
    pair = lines.parse_line(parse, number, bodies)
    if isinstance(pair, str):
      count, first = unusable.get(pair, (0, number))
      unusable[pair] = count + 1, first
    else:
      starts.extend(at)
      sizes.extend(map(len, bodies))
      numbers.append(number)
    at = [start + len(raw) for start, raw in zip(at, raws, strict=True)]
    if not num_lines & 0xFFFF:
      progress.update(sum(at) // 10**6)
  progress.close()
  if any(raws):
    more, less = (0, 1) if raws[0] else (1, 0)
    count = num_lines + 1 + sum(1 for _ in files[more])
    raise errors.UserError(
      f'{files[more].name} has {count:,} lines and {files[less].name} '
      f'{num_lines:,}; aligned files have a line for each other: find where '
      'they part.'
    )
  return {
    'starts': np.frombuffer(starts, np.int64).reshape(-1, len(files)),
    'sizes': np.frombuffer(sizes, np.int32).reshape(-1, len(files)),
    'numbers': np.frombuffer(numbers, np.int32),
    'num_lines': num_lines,
    'unusable': unusable,
  }


def _reasons(unusable) -> str:
  by_count = sorted(unusable.items(), key=lambda item: -item[1][0])
  return ', '.join(
    f'{count:,} {reason} (the first in line {first:,})'
    for reason, (count, first) in by_count
  )


def unreadable(path: str, e: OSError) -> errors.UserError:
  """The error for a parallel text that cannot be read."""
  return errors.UserError(
    f'{path}: cannot read the parallel text ({e.strerror or e}); for what '
    'data.source, data.valid and data.test may name see mt/data/corpus.py.'
  )


def describe(text: Bitext) -> str:
  """What became of the lines, in a sentence or a few."""
  out = f'{text.where}: {text.num_lines:,} lines, {len(text):,} pairs'
  if text.unusable:
    out += f'; not used: {_reasons(text.unusable)}'
  return '; '.join([out, *text.notes])
