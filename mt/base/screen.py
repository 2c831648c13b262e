"""Standard output and error: no print ends a program.

What a terminal's encoding lacks is escaped. A reader that left, a full disk or
a closed stream takes nothing more, and the program goes on: what counts is in
files. A command whose result is its output asks `check` whether it got out.
"""

import errno
import io
import os
import sys

from mt.base import errors

_STREAMS = {1: 'stdout', 2: 'stderr'}


class _Stream(io.FileIO):
  """A file descriptor; what it does not take is dropped, and noted."""

  failed: OSError | None = None

  def write(self, data) -> int:
    try:
      return super().write(data)
    except OSError as e:
      self.failed = e
      return len(data)


def protect() -> None:
  """Puts such streams in the place of stdout and stderr; once a process."""
  # A stream that was closed by who started the program is None. os.devnull
  # gets its number, which is the lowest free one: else the next file that is
  # opened would get it, and what libraries in C print.
  if sys.stdin is None:
    sys.stdin = open(os.devnull, encoding='utf-8')  # noqa: SIM115
  for number, name in _STREAMS.items():
    old = getattr(sys, name)
    if old is not getattr(sys, f'__{name}__'):
      continue  # Somebody else's, or done.
    if old is None:
      raw, encoding = _Stream(os.devnull, 'w'), 'utf-8'
      raw.failed = OSError(errno.EBADF, 'it is closed')
    else:
      old.flush()
      raw, encoding = _Stream(number, 'w', closefd=False), old.encoding
    new = io.TextIOWrapper(
      io.BufferedWriter(raw),
      encoding,
      errors='backslashreplace',
      line_buffering=True,
    )
    setattr(sys, name, new)


def check() -> None:
  """Ends the command where stdout did not take all that was written.

  Raises:
    errors.UserError: why; a reader that left, such as `head`, has what it
      wanted: the command ends without a word.
  """
  sys.stdout.flush()
  raw = getattr(getattr(sys.stdout, 'buffer', None), 'raw', None)
  failed = getattr(raw, 'failed', None)
  if isinstance(failed, BrokenPipeError):
    sys.exit(0)
  if failed is not None:
    raise errors.UserError(
      f'standard output: cannot write the result ({failed.strerror}); send it '
      'to a file on a disk with room.'
    ) from failed
