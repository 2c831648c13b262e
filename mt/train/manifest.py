"""What a checkpoint is made of, and whether it is as it was written.

Orbax's arrays have no checksums: a chunk of zeros is a chunk like any other.
manifest.json is written before Orbax gives a checkpoint its name, so that no
checkpoint is without it:

  {"trained/manifest.ocdbt": [123, 4053472818], …}

The sizes in it are in bytes, the other numbers CRC-32.
"""

import json
import math
import pathlib
import re
import shutil
import zlib

import orbax.checkpoint as ocp

from mt.base import errors
from mt.base import journal

NAME = 'manifest.json'
# Of what a checkpoint holds; to be raised when that changes. The model of older
# ones can be read; version 1 knew its data by another number.
VERSION, _MODELS_SINCE = 2, 1
_ORBAX = '_CHECKPOINT_METADATA'  # JSON.
# Orbax writes two more after the manifest, and reads no number from them.
_NOT_IN_IT = (NAME, _ORBAX, 'commit_success.txt')
_STEP = re.compile(r'step_(\d+)')
_ASIDE = 'damaged-'
_PIECE = 1 << 22  # Bytes.
_SMALL = 1 << 16


class TemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Orbax's temporary folder, which gets its manifest just before its name."""

  async def finalize(self) -> None:
    if _STEP.fullmatch(self.get_final().name):  # And not one of its items.
      write(pathlib.Path(self.get()))
    await super().finalize()


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  files = {
    p.relative_to(folder).as_posix(): p
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }
  return {name: p for name, p in files.items() if name not in _NOT_IN_IT}


def _crc(path: pathlib.Path) -> int:
  crc = 0
  with open(path, 'rb') as f:
    while piece := f.read(_PIECE):
      crc = zlib.crc32(piece, crc)
  return crc


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of a folder into it."""
  found = {
    name: [path.stat().st_size, _crc(path)]
    for name, path in _files(folder).items()
  }
  (folder / NAME).write_text(json.dumps(found, indent=0), encoding='utf-8')


def damage(folder: pathlib.Path, largest: float = math.inf) -> str:
  """What is wrong with a checkpoint; '' if it is as it was written.

  Args:
    folder: of one checkpoint.
    largest: files of more bytes are only measured, and not read.
  """
  for name in (_ORBAX, NAME):
    try:
      wanted = json.loads((folder / name).read_text(encoding='utf-8'))
    except FileNotFoundError:
      return f'{name} is missing'
    except (OSError, ValueError):
      return f'{name} cannot be read'
  found = _files(folder)
  for name, (size, crc) in wanted.items():
    if name not in found:
      return f'{name} is missing'
    try:
      has = found[name].stat().st_size
      if has != size:
        return f'{name} has {has} bytes instead of {size}'
      if size <= largest and _crc(found[name]) != crc:
        return f'{name} has another content'
    except OSError as e:
      return f'{name} cannot be read: {e.strerror}'
  return ''


def steps(checkpoints: pathlib.Path) -> list[int]:
  """Of the checkpoints in a folder, whole or not, in order."""
  names = [p.name for p in checkpoints.glob('step_*')]
  return sorted(int(m[1]) for m in map(_STEP.fullmatch, names) if m)


def folder_of(checkpoints: pathlib.Path, at: int) -> pathlib.Path:
  """Of the checkpoint of a step."""
  return checkpoints / f'step_{at}'


def check(checkpoints: pathlib.Path, at: int) -> None:
  """Refuses a checkpoint whose model cannot be read: damaged, or of a version.

  Raises:
    errors.UserError: with the damage.
  """
  check_version(checkpoints, at, since=_MODELS_SINCE)
  if what := damage(folder_of(checkpoints, at)):
    raise errors.UserError(
      f'{checkpoints}: step {at} is damaged ({what}); start train.py with this '
      '--workdir to go on from the one before, or take another step.'
    )


def check_version(
  checkpoints: pathlib.Path, *which: int, since: int = VERSION
) -> None:
  """Refuses checkpoints that another version of this code wrote.

  Args:
    checkpoints: the folder of all of them.
    *which: their steps.
    since: the oldest version that will do.

  Raises:
    errors.UserError: with the version.
  """
  for at in which:
    known = folder_of(checkpoints, at) / 'identity' / 'metadata'
    try:
      version = json.loads(known.read_text(encoding='utf-8')).get('version')
    except (OSError, ValueError, AttributeError):
      continue  # Damaged.
    if not since <= (version or 0) <= VERSION:
      found = 'no version' if version is None else f'version {version}'
      more = 'take another --workdir for a new run'
      if _MODELS_SINCE <= (version or 0) < VERSION:
        more += ', which can begin with its weights (weights.warm_start)'
      raise errors.UserError(
        f'{checkpoints}: step {at} has {found}, and this code goes on with '
        f'version {VERSION}: finish it with the code that wrote it, or {more}.'
      )


def check_space(checkpoints: pathlib.Path, need: int) -> None:
  """Refuses to begin a checkpoint that the disk has no room for, in bytes.

  Half of one would fill it.

  Raises:
    errors.UserError: with what is free.
  """
  try:
    free = shutil.disk_usage(checkpoints).free
  except OSError:
    return  # Writing will tell.
  if free < need:
    raise errors.UserError(
      f'{checkpoints}: a checkpoint takes {need / 1e6:,.1f} MB, and '
      f'{free / 1e6:,.1f} MB are free; the checkpoints before it are whole: '
      'free some space and start again.'
    )


def quarantine_damaged(checkpoints: pathlib.Path) -> None:
  """Moves aside what is damaged, so that the newest checkpoint is whole.

  Older ones are measured, and their small files read.

  Raises:
    errors.UserError: there are checkpoints, but none is whole; or the folder is
      not writable.
  """
  aside = list(checkpoints.glob(_ASIDE + 'step_*'))
  bad, newest = {}, None
  for at in reversed(steps(checkpoints)):
    largest = math.inf if newest is None else _SMALL
    if what := damage(folder_of(checkpoints, at), largest):
      bad[at] = what
    elif newest is None:
      newest = at
  if newest is None and (bad or aside):
    found = [f'step {at}: {what}' for at, what in bad.items()]
    raise errors.UserError(
      f'{checkpoints}: no checkpoint is whole '
      f'({"; ".join(found) or aside[0].name}); give another --workdir to start '
      'from the pretrained weights, or bring back a copy of that folder.'
    )
  for at, what in bad.items():
    goal = checkpoints / f'{_ASIDE}step_{at}'
    try:
      shutil.rmtree(goal, ignore_errors=True)
      folder_of(checkpoints, at).rename(goal)
    except OSError as e:
      raise errors.UserError(
        f'{goal}: cannot move a damaged checkpoint there ({e.strerror}); give '
        '--workdir a folder that you may write to.'
      ) from e
    journal.say(
      f'checkpoint of step {at} is damaged ({what}), moved to {goal.name}; '
      f'the newest whole one is of step {newest}'
    )
