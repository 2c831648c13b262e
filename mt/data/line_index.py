"""Where the lines of a file begin.

What a line holds is not looked at, only newlines are, at the speed of a disk.
The index of a large file is kept in the cache and mapped into memory.

It is the file's SHA-256, 32 bytes; then int64 numbers in the machine's order:
the byte at which each line begins, and the one after the last line.
"""

import hashlib
import io
import os
import time
from typing import NamedTuple

import numpy as np

from mt.base import files
from mt.base import journal
from mt.data import formats

_CHUNK = 1 << 22  # Bytes that are looked at in one go.
_SMALL = 1 << 24  # Files below are indexed at every start: 20 ms.


class Index(NamedTuple):
  """Line i has the bytes starts[i] to starts[i + 1], its end included."""

  starts: np.ndarray  # [lines + 1] int64.
  digest: str  # SHA-256 of the file.


def index(path: str, name: str) -> Index:
  """The lines of a file that `name` is shown for; a byte-order mark is none.

  Raises:
    OSError: it cannot be read.
    errors.UserError: a full disk.
  """
  with open(path, 'rb') as f:
    first = len(formats.BOM) if f.read(3) == formats.BOM else 0
    f.seek(0)
    stat = os.fstat(f.fileno())
    # A file that is just written may change again at the same time and size.
    if stat.st_size < _SMALL or time.time() - stat.st_mtime < 2:
      out = io.BytesIO()
      _write(f, first, name, out)
      data = np.frombuffer(out.getbuffer(), np.uint8)
    else:
      kept = formats.cache_path(path, ('lines',))
      if not kept.exists():
        with files.new_file(kept) as out:
          _write(f, first, name, out)
      data = np.memmap(kept, np.uint8, 'r')
  return Index(data[32:].view(np.int64), data[:32].tobytes().hex())


def _write(f, first, name, out):
  digest, at, chunk = hashlib.sha256(), 0, b'\n'
  total = os.fstat(f.fileno()).st_size
  progress = journal.Progress(f'{name}, MB', total // 10**6, every=1000)
  out.write(bytes(digest.digest_size))
  out.write(np.int64(first))
  for chunk in iter(lambda: f.read(_CHUNK), b''):
    digest.update(chunk)
    out.write(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (at + 1))
    at += len(chunk)
    if not at % (1 << 28):
      progress.update(at // 10**6)
  if at > first and not chunk.endswith(b'\n'):
    out.write(np.int64(at))  # The last line has no end.
  progress.close()
  out.seek(0)
  out.write(digest.digest())
