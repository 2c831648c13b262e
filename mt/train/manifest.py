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
from mt.base import files
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
# Where Orbax moves what is not kept: deleted in place, a checkpoint would be a
# damaged one if the run is killed meanwhile.
DELETED = 'deleted'
_PIECE = 1 << 22  # Bytes.
_SMALL = 1 << 16


class TemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Orbax's temporary folder, which gets its manifest just before its name."""

  async def finalize(self) -> None:
    if _STEP.fullmatch(self.get_final().name):  # And not one of its items.
      write(pathlib.Path(self.get()))
    await super().finalize()


def _crc(path: pathlib.Path) -> int:
  crc = 0
  with open(path, 'rb') as f:
    while piece := f.read(_PIECE):
      crc = zlib.crc32(piece, crc)
  return crc


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of a folder into it."""
  found = {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name not in _NOT_IN_IT:
      found[name] = [path.stat().st_size, _crc(path)]
  (folder / NAME).write_text(json.dumps(found, indent=0), encoding='utf-8')


def crc(checkpoints: pathlib.Path, at: int) -> int:
  """The CRC-32 of a checkpoint's manifest, by which its weights are known."""
  return zlib.crc32((folder_of(checkpoints, at) / NAME).read_bytes())


def damage(
  folder: pathlib.Path, largest: float = math.inf, item: str = ''
) -> str:
  """What is wrong with a checkpoint; '' if it is as it was written.

  Args:
    folder: of one checkpoint.
    largest: files of more bytes are only measured, and not read.
    item: of Orbax's, such as metrics, that is looked at; '' for all.
  """
  try:
    for name in (_ORBAX, NAME):
      wanted = json.loads((folder / name).read_text(encoding='utf-8'))
    wanted = {k: v for k, v in wanted.items() if k.startswith(item)}
    for name, (size, crc) in wanted.items():
      has = (folder / name).stat().st_size
      if has != size:
        return f'{name} has {has} bytes instead of {size}'
      if size <= largest and _crc(folder / name) != crc:
        return f'{name} has another content'
  except FileNotFoundError:
    return f'{name} is missing'
  except (OSError, ValueError):
    return f'{name} cannot be read'
  return ''


def steps(checkpoints: pathlib.Path) -> list[int]:
  """Of the checkpoints in a folder, whole or not, in order."""
  names = [p.name for p in checkpoints.glob('step_*')]
  return sorted(int(m[1]) for m in map(_STEP.fullmatch, names) if m)


def folder_of(checkpoints: pathlib.Path, at: int) -> pathlib.Path:
  """Of the checkpoint of a step."""
  return checkpoints / f'step_{at}'


def check(checkpoints: pathlib.Path, at: int, item: str = '') -> None:
  """Refuses a checkpoint whose model cannot be read: damaged, or of a version.

  `item` is one of Orbax's, if it is looked at alone.

  Raises:
    errors.UserError: with the damage.
  """
  check_version(checkpoints, at, since=_MODELS_SINCE)
  if what := damage(folder_of(checkpoints, at), item=item):
    check_there(checkpoints, at)
    remedy = 'take another step, or go on from the one before with train.py'
    if item:  # Orbax reads it of all checkpoints, whichever is asked for.
      remedy = 'move it away, as train.py does when it starts with this folder'
    raise errors.UserError(
      f'{checkpoints}: step {at} is damaged ({what}); {remedy}.'
    )


def check_there(checkpoints: pathlib.Path, at: int) -> None:
  """Refuses, as errors.UserError, what a run at work has deleted meanwhile."""
  if not folder_of(checkpoints, at).exists():
    raise errors.UserError(
      f'{checkpoints}: step {at} is gone: the run at work there has newer '
      'ones and has deleted it; give the command again.'
    )


def check_version(
  checkpoints: pathlib.Path, *which: int, since: int = VERSION
) -> None:
  """Refuses checkpoints, by step, of versions that are older or newer.

  Raises:
    errors.UserError: with the version.
  """
  for at in which:
    path = folder_of(checkpoints, at) / 'identity' / 'metadata'
    try:
      version = json.loads(path.read_text(encoding='utf-8')).get('version')
    except (OSError, ValueError, AttributeError):
      continue  # Damaged.
    if not since <= (version or 0) <= VERSION:
      found = 'no version' if version is None else f'version {version}'
      raise errors.UserError(
        f'{checkpoints}: step {at} has {found}, and this code goes on with '
        f'version {VERSION}: finish it with the code that wrote it, or take '
        f'another --workdir for a new run; weights.warm_start begins with the '
        f'weights of a run of version {_MODELS_SINCE} or {VERSION}.'
      )


def check_space(checkpoints: pathlib.Path, need: int) -> None:
  """Refuses to begin a checkpoint that the disk has no room for, in bytes.

  Half of one would fill it.

  Raises:
    errors.UserError: with what is free.
  """
  free = shutil.disk_usage(checkpoints).free
  if free < need:
    raise errors.UserError(
      f'{checkpoints}: a checkpoint takes {need / 1e6:,.1f} MB, and '
      f'{free / 1e6:,.1f} MB are free; the checkpoints before it are whole: '
      'free some space and start again.'
    )


def remove_deleted(checkpoints: pathlib.Path) -> None:
  """Removes the checkpoints that are not kept."""
  shutil.rmtree(checkpoints / DELETED, ignore_errors=True)


def quarantine_damaged(checkpoints: pathlib.Path) -> None:
  """Moves aside what is damaged, so that the newest checkpoint is whole.

  Older ones are measured, and their small files read.

  Raises:
    errors.UserError: there are checkpoints, but none is whole; or the folder is
      not writable.
  """
  remove_deleted(checkpoints)
  aside = [p.name for p in checkpoints.glob(_ASIDE + 'step_*')]
  bad, newest = {}, None
  for at in reversed(steps(checkpoints)):
    largest = math.inf if newest is None else _SMALL
    if what := damage(folder_of(checkpoints, at), largest):
      bad[at] = what
    elif newest is None:
      newest = at
  if newest is None and (bad or aside):
    found = [f'step {at}: {what}' for at, what in bad.items()] or aside
    raise errors.UserError(
      f'{checkpoints}: no checkpoint is whole ({"; ".join(found)}); give '
      'another --workdir to start from the pretrained weights, or bring back a '
      'copy of that folder.'
    )
  for at, what in bad.items():
    goal = checkpoints / f'{_ASIDE}step_{at}'
    shutil.rmtree(goal, ignore_errors=True)
    try:
      folder_of(checkpoints, at).rename(goal)
    except OSError as e:
      raise files.unwritable(goal, e) from e
    journal.say(
      f'checkpoint of step {at} is damaged ({what}), moved to {goal.name}; '
      f'the newest whole one is of step {newest}'
    )
