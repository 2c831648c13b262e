"""Files and folders that are written whole or not at all."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import shutil
from typing import IO
from typing import Any

from mt.base import errors
from mt.base import processes


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """An open file that replaces `path` when the block ends well.

  Nothing is left of it otherwise. A link stays, and what it names is replaced;
  a device or a pipe is written to. Raises errors.UserError where it cannot be
  written.
  """
  try:
    if is_pipe(path):
      with open(path, 'wb') as f:
        yield f
      return
    path = pathlib.Path(os.path.realpath(path))
    # Not named by its process: those of several containers have one number.
    part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(part, 'wb') as f:
        yield f
      os.replace(part, path)
    finally:
      with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)  # It may be what fills the disk.
  except OSError as e:
    raise unwritable(path, e) from e


def is_pipe(path: pathlib.Path | str) -> bool:
  """Whether it is a pipe or a device: what is read from it is gone."""
  path = pathlib.Path(path)
  return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `path` when the block ends well.

  Nothing is left of it otherwise. Raises errors.UserError where it cannot be
  written, or is there already, see check_new.
  """
  path = path.absolute()
  part = _part(path)
  try:
    check_new(path)
    shutil.rmtree(part, ignore_errors=True)  # Killed; containers repeat pids.
    part.mkdir(parents=True)
    try:
      yield part
      check_new(path)  # Minutes may have passed.
      os.replace(part, path)
    finally:
      shutil.rmtree(part, ignore_errors=True)
  except OSError as e:
    raise unwritable(e.filename or path, e) from e


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str = '') -> Iterator[None]:
  """Holds a file's lock; whoever dies gives it free.

  Raises:
    errors.UserError: another process holds it, which `busy` says; without such
      words it is waited for. Or the file cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(path, 'ab'))
      fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as e:
      raise errors.UserError(busy) from e
    except OSError as e:
      raise unwritable(path.parent, e) from e
    yield


def check_new(path: pathlib.Path) -> None:
  """Refuses a file, a link, a mount, or a folder with something in it."""
  in_it = path.is_dir() and any(path.iterdir())
  if path.is_symlink() or path.is_file() or path.is_mount() or in_it:
    raise errors.UserError(
      f'{path}: there already (a file, a mount, or with something in it), and '
      'nothing is overwritten; name a new folder.'
    )


def _part(path):
  return path.with_name(f'{path.name}.{os.getpid()}.part')


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file whole or not at all, text as UTF-8; in the first process."""
  if processes.is_first():
    with new_file(path) as f:
      f.write(content.encode() if isinstance(content, str) else content)


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
    ) from e
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read it ({e.strerror}); check --workdir, or what else '
      'names the folder of a run of train.py.'
    ) from e


def read_lines(path: pathlib.Path) -> list[str]:
  """What write_lines wrote."""
  return _read(path).split('\n')[:-1]


def read_json(path: pathlib.Path) -> Any:
  """What write_json wrote; errors.UserError where it is missing or damaged."""
  try:
    return json.loads(_read(path))
  except ValueError as e:
    raise errors.UserError(f'{path}: damaged JSON ({e}).') from e


def remove(path: pathlib.Path) -> None:
  """Removes a file, if it is there; in the first process."""
  if processes.is_first():
    try:
      path.unlink(missing_ok=True)
    except OSError as e:
      raise unwritable(path, e) from e


def unwritable(path: pathlib.Path | str, e: OSError) -> errors.UserError:
  """What to say where a file or folder cannot be written."""
  return errors.UserError(
    f'{path}: cannot write it ({e.strerror or e}); make space there, or name '
    'a folder that you may write to (--workdir, --out, XDG_CACHE_HOME).'
  )
