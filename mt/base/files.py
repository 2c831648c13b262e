"""Files that are written whole or not at all."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
from typing import IO
from typing import Any

from mt.base import errors
from mt.base import processes


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file whole or not at all; text as UTF-8.

  Of several processes the first one writes, and the others do nothing.

  Raises:
    errors.UserError: the folder is not writable, the disk is full.
  """
  if not processes.is_first():
    return
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)
  except OSError as e:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)  # It may be what fills the disk.
    raise unwritable(path, e) from None


@contextlib.contextmanager
def new_file(path: pathlib.Path, mode: str = 'wb') -> Iterator[IO]:
  """A file that gets its name at the end of the `with`, whole or not at all.

  Raises:
    errors.UserError: the folder is not writable, the disk is full.
  """
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    with part.open(mode) as file:
      yield file
    os.replace(part, path)
  except OSError as e:
    raise unwritable(path, e) from e
  finally:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """`write` for JSON, indented, with real characters."""
  write(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
  """`write` for texts, one a line; a newline inside becomes a space."""
  write(path, ''.join(line.replace('\n', ' ') + '\n' for line in lines))


def _read(path):
  try:
    # Not read_text: it takes a carriage return inside a line for its end.
    return path.read_bytes().decode()
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f'{path}: damaged (not UTF-8 at byte {e.start}); delete it and run the '
      'command that wrote it again.'
    ) from None
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read it ({e.strerror}); --workdir must name the folder '
      'of a run of train.py.'
    ) from None


def read_lines(path: pathlib.Path) -> list[str]:
  """What write_lines wrote."""
  return _read(path).split('\n')[:-1]


def read_json(path: pathlib.Path) -> Any:
  """What write_json wrote.

  Raises:
    errors.UserError: missing, unreadable or damaged.
  """
  try:
    return json.loads(_read(path))
  except ValueError as e:
    raise errors.UserError(f'{path}: damaged JSON ({e}).') from None


def remove(path: pathlib.Path) -> None:
  """Removes a file, if it is there.

  Of several processes the first one does it.

  Raises:
    errors.UserError: the folder is not writable.
  """
  if not processes.is_first():
    return
  try:
    path.unlink(missing_ok=True)
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot remove what an earlier start left ({e.strerror}); give '
      '--workdir a folder that you may write to.'
    ) from None


def unwritable(path, e):
  return errors.UserError(
    f'{path}: cannot write it ({e.strerror}); give --workdir a folder with '
    'space that you may write to.'
  )
