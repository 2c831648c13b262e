"""Where the metrics of a run go: metrics.jsonl, and what log.to names.

tensorboard  event files, without TensorFlow: `tensorboard --logdir=runs`. They
             hold what metrics.jsonl holds; each start of the run writes them
             anew, so that a resumed run has every step once
wandb        Weights & Biases, an optional library, imported only then. It gets
             the config and each line; output, code and the state of the
             repository stay here
"""

import importlib.util
import math
import os
import pathlib
import secrets
import time
from typing import Any

import ml_collections
from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import processes

# tensorboardX's usual writer is a thread: where the disk is full it dies, and
# whoever has more events for it waits for ever.
_Writer = event_file_writer.EventsWriter


class Recorder:
  """Open files of the first process; each line is in them when `add` returns.

  In other processes nothing is written.
  """

  def __init__(
    self, workdir: pathlib.Path, config: ml_collections.ConfigDict, last: int
  ):
    """Goes on after step `last`; what is there of later ones is dropped.

    Raises:
      errors.UserError: the folder cannot be written; Weights & Biases has no
        login, or no network.
    """
    path, to = workdir / 'metrics.jsonl', config.log.to.split(',')
    self._metrics = self._events = self._wandb = None
    if not processes.is_first():
      return
    if 'tensorboard' in to:
      self._events = _new_events(workdir / 'tensorboard')
    with files.new_file(path) as kept:
      for line in journal.read_metrics(path):
        if line['step'] <= last:
          journal.add_metrics(kept, line)
          if self._events:
            _add_event(self._events, line)
    if self._events:
      _flush(self._events)
    self._metrics = open(path, 'ab', buffering=0)  # noqa: SIM115
    if 'wandb' in to:
      self._wandb = _start_wandb(workdir, config)

  def add(self, line: dict[str, Any]) -> None:
    """Adds what is known of a step; `step` says how many were done.

    Steps that Weights & Biases has already, of before a resume, it passes over.
    """
    if self._metrics:
      journal.add_metrics(self._metrics, line)
    if self._events:
      _add_event(self._events, line)
      _flush(self._events)
    if self._wandb:
      known = {k: v for k, v in line.items() if k != 'step' and v is not None}
      self._wandb.log(known, step=line['step'])

  def close(self) -> None:
    for each in (self._metrics, self._events):
      if each:
        each.close()
    if self._wandb:
      self._wandb.finish()  # Sends what is left.


def _new_events(folder: pathlib.Path) -> _Writer:
  """Begins an event file, and removes those of earlier starts."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('events.out.tfevents.*'):
      old.unlink()
    writer = _Writer(str(folder / 'events'))
    writer.flush()
  except OSError as e:
    raise files.unwritable(folder, e) from e
  return writer


def _add_event(writer: _Writer, line: dict[str, Any]) -> None:
  """The numbers of one line of metrics.jsonl, under its step."""
  event = event_pb2.Event(wall_time=time.time(), step=line['step'])
  for name, value in line.items():
    number = isinstance(value, int | float) and math.isfinite(value)
    if name != 'step' and number:
      event.summary.MergeFrom(summary.scalar(name, value))
  try:
    writer.write_event(event)
  except OSError as e:
    raise files.unwritable('tensorboard', e) from e


def _flush(writer: _Writer) -> None:
  """To the disk itself, which takes as long as all else."""
  try:
    writer.flush()
  except OSError as e:
    raise files.unwritable('tensorboard', e) from e


def check_wandb() -> None:
  """Refuses to go on without the library; errors.UserError."""
  if not importlib.util.find_spec('wandb'):
    raise errors.UserError(
      'log.to names wandb, which is not installed: `.venv/bin/python -m pip '
      'install wandb` does it; or give --config.log.to=tensorboard.'
    )


def _start_wandb(workdir, config) -> Any:
  """A run there; a resumed one goes on under its id, kept in the folder."""
  import wandb

  path = workdir / 'wandb_id.txt'
  if not path.exists():
    files.write_lines(path, [secrets.token_hex(8)])
  try:
    return wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'mt'),
      name=workdir.absolute().name,
      id=files.read_lines(path)[0],
      resume='allow',
      dir=workdir,
      config=config.to_dict(),
      settings=wandb.Settings(
        console='off', disable_code=True, disable_git=True, silent=True
      ),
    )
  except wandb.Error as e:
    raise errors.UserError(
      f'wandb cannot start ({" ".join(str(e).split())[:200]}); `wandb login`, '
      'WANDB_MODE=offline, or --config.log.to=tensorboard would do.'
    ) from e
