"""Files of parallel text as they lie on disk -> plain lines.

All other code reads lines that end with LF. A file that has them is read where
it lies. Others are rewritten, once, into the cache: gzip and xz are unpacked, a
record of CSV becomes a JSON array, a row of parquet a JSON object; so a line
break inside a text is \\n in JSON. What is none of these is recognised by its
first bytes and refused.
"""

import collections
from collections.abc import Sequence
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import re
import shutil
from typing import NamedTuple
import zlib

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import foreign

BOM = b'\xef\xbb\xbf'
HEAD = 4096  # As many first bytes are looked at.
_FIRST = 1000  # Records of CSV that tell its delimiter.
_MOST = 0.9  # Of them; the others may be damaged.

# To be raised when what is written into the cache becomes other text.
_VERSION = 2
_PACKED = {b'\x1f\x8b': gzip.open, b'\xfd7zXZ\0': lzma.open}
_JSON_LINES = ('.jsonl', '.ndjson', '.json')
_PARQUET = b'PAR1'

_MARKUP = re.compile(  # After comments, if there are any.
  rb'\s*(<!--((?!-->).)*-->\s*)*+<(\?xml|tmx|xliff|!doctype|html|srcset|refset'
  rb'|tstset|doc|dataset|mteval)\b',
  re.IGNORECASE | re.DOTALL,
)


class Plain(NamedTuple):
  """A file of lines."""

  name: str  # As it was asked for.
  path: str  # The same, or what it became in the cache.
  kind: str  # `text`; `json`: objects; `cells`: arrays of JSON.
  unit: str = 'line'  # Or `record`, of which a line number says nothing.


def open_plain(
  name: str, quotes: str = '', keys: Sequence[str] = (), *, aligned: bool
) -> Plain:
  """The lines of a file.

  Args:
    quotes: `csv` and `text` say what a quote is, where the file's name would
      say something else, see data.quotes; `tfds`, see data.tfds_quoting.
    keys: which columns of parquet are wanted, see lines.Keys.
    aligned: every line is a text.

  Raises:
    OSError: it cannot be read, or only once.
    errors.UserError: another format, or damaged; a full disk.
  """
  if files.is_pipe(name):
    what = 'a pipe or a device, and it is read more than once: write a file'
    raise OSError(errno.ESPIPE, what, name)
  path, suffix = _unpacked(name)
  head = _head(path)
  foreign.refuse_no_text(head, name)
  if _MARKUP.match(head):
    raise errors.UserError(
      f"{name}: markup, as of TMX, of XLIFF, of WMT's .sgm and .xml, or of a "
      'web page in the place of a file; write its pairs into a .jsonl, or its '
      'segments one a line into two aligned files, as `sacrebleu -t wmt20 -l '
      'en-de --echo src ref` does.'
    )
  is_parquet = head.startswith(_PARQUET)
  if aligned and (is_parquet or suffix in (*_JSON_LINES, '.csv')):
    what = 'parquet' if is_parquet else suffix
    raise errors.UserError(
      f'{name}: {what}, where a text a line is expected; write its texts into '
      'a file, one a line, or name a file of both languages in data.source, '
      'without {lang}; mt.translate reads JSON and parquet by --key.'
    )
  if is_parquet:
    parts, rows = ('parquet', *keys), _parquet(name, path, keys)
    path = _rewrite(path, parts, lambda f: f.writelines(rows))
    return Plain(name, path, 'json', 'record')
  if aligned:
    return Plain(name, path, 'text')
  if quotes == 'tfds':
    path = _rewrite(path, (quotes,), lambda f: _tfds(name, path, f))
    return Plain(name, path, 'cells', 'record')
  if suffix in _JSON_LINES:
    if head.lstrip().startswith(b'['):
      raise errors.UserError(
        f'{name}: a JSON array; an object a line is expected: convert it with '
        "`jq -c '.[]'`."
      )
    return Plain(name, path, 'json')
  if quotes == 'csv' or (suffix == '.csv' and quotes != 'text'):
    delimiter = _delimiter(name, path) if suffix == '.csv' else '\t'
    parts = ('csv', delimiter)
    path = _rewrite(path, parts, lambda f: _csv(name, path, delimiter, f))
    return Plain(name, path, 'cells', 'record')
  return Plain(name, path, 'text')


def cache_path(path: str, parts: Sequence[str]) -> pathlib.Path:
  """Where in the cache something made of a file is; another file, another one.

  The file is known by its place, inode, size and time of change.
  """
  s = os.stat(path)
  identity = [_VERSION, os.path.realpath(path), s.st_dev, s.st_ino, s.st_size]
  identity += [s.st_mtime_ns, *parts]
  key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
  return folder() / key


def folder() -> pathlib.Path:
  """What is made of texts and kept."""
  return cache.cache_dir() / 'texts'


def _head(path) -> bytes:
  with open(path, 'rb') as f:
    return f.read(HEAD).removeprefix(BOM)


def _rewrite(path, parts, write) -> str:
  target = cache_path(path, parts)
  if not target.exists():
    with files.new_file(target) as f:
      write(f)
  return str(target)


def _unpacked(name) -> tuple[str, str]:
  """The file without gzip and xz, and the end of its name."""
  path, head = pathlib.Path(name), _head(name)
  for magic, opener in _PACKED.items():
    if head.startswith(magic):
      unpack = functools.partial(_unpack, opener, name)
      suffix = path.with_suffix('').suffix.lower()
      return _rewrite(name, ('unpacked',), unpack), suffix
  return name, path.suffix.lower()


def _unpack(opener, path, out):
  try:
    with opener(path) as f:
      shutil.copyfileobj(f, out, 1 << 20)
  except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
    raise errors.UserError(
      f'{path}: damaged ({" ".join(str(e).split())}); fetch it again.'
    ) from e


def _delimiter(name, path) -> str:
  """A comma, or the semicolon of spreadsheets whose numbers have commas.

  It parts some first records into as many cells each, two or more; a few may be
  odd, if the other one does not part most of them so.
  """
  shares = {}
  for delimiter in ',;':
    rows = _first_records(path, delimiter=delimiter)
    sizes = collections.Counter(len(x) for x in rows if any(map(str.strip, x)))
    size, times = max(sizes.items(), key=lambda x: x[1], default=(0, 0))
    shares[delimiter] = times / sizes.total() if size > 1 else 0
  if min(shares.values()) >= (1 if 1 in shares.values() else _MOST):
    raise errors.UserError(
      f'{name}: a comma and a semicolon both part its records into cells (as '
      f'{";".join(rows[0])[:80]!r}); put quotes around texts that have one, or '
      'write a .tsv.'
    )
  return max(shares, key=shares.get)


def _first_records(path, **options) -> list[list[str]]:
  """Some first records of CSV, up to one that is damaged."""
  out = []
  with _open_csv(path) as f, contextlib.suppress(csv.Error):
    out.extend(itertools.islice(csv.reader(f, strict=True, **options), _FIRST))
  return out


# What is not UTF-8 becomes surrogates, which a parser refuses by the line.
def _open_csv(path):
  return open(path, encoding='utf-8-sig', errors='surrogateescape', newline='')


def _csv(name, path, delimiter, out):
  _refuse_spaces(name, path, delimiter)
  with _open_csv(path) as f:
    _cells(name, csv.reader(f, delimiter=delimiter, strict=True), None, out)


def _refuse_spaces(name, path, delimiter):
  """Refuses quotes after a space, which would be characters of a text.

  In the first records: who writes a file so does it from the first one on.
  """
  kept, skipped = (
    _first_records(path, delimiter=delimiter, skipinitialspace=skip)
    for skip in (False, True)
  )
  for row, other in zip(kept, skipped, strict=False):
    if [x.lstrip(' ') for x in row] != [x.lstrip(' ') for x in other]:
      raise errors.UserError(
        f'{name}: quotes with a space before them (such as '
        f'{delimiter.join(row)[:80]!r}); take those spaces out.'
      )


def _tfds(name, path, out):
  """The rows that TFDS's `mtnt` reads, with the quoting that it takes.

  A quote at the start of a column makes one text of all up to the next quote,
  tabs and line ends too (tensorflow_datasets/translate/mtnt/mtnt.py).
  """
  with open(path, encoding='utf-8', errors='surrogateescape') as f:
    _cells(name, csv.reader(f, delimiter='\t'), 3, out)


def _cells(name, reader, most, out):
  try:
    for cells in reader:
      out.write(json.dumps(cells[:most]).encode() + b'\n')
  except csv.Error as e:
    raise errors.UserError(
      f'{name}, line {reader.line_num}: not CSV ({e}); mend the line, or set '
      "data.quotes='text' and data.tfds_quoting=False where a quote is a "
      'character and tabs part columns.'
    ) from e


def _parquet(name, path, keys):
  """A line of JSON for each row; an error while one is written passes by."""
  import pyarrow  # Here: it takes time to load.
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    wanted = {k if k in names else k.split('.')[0] for k in keys}
    if not wanted <= {*names}:
      raise errors.UserError(
        f'{name}: no column {min(wanted - {*names})!r}; it has '
        f'{", ".join(names)[:200]}: set data.columns to two of them, such as '
        "('translation.en', 'translation.fr')."
      )
    if twice := [name for name in wanted if names.count(name) > 1]:
      raise errors.UserError(
        f'{name}: more than one column {min(twice)!r}; name them apart.'
      )
    for batch in file.iter_batches(columns=sorted(wanted)):
      for row in batch.to_pylist():
        # null for what JSON has no type of.
        yield json.dumps(row, default=lambda _: None).encode() + b'\n'
  except (OSError, ValueError, pyarrow.ArrowException) as e:
    raise errors.UserError(
      f'{name}: damaged parquet ({" ".join(str(e).split())[:200]}); fetch it '
      'again.'
    ) from e
