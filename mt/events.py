"""metrics.jsonl for TensorBoard: event files, without TensorFlow.

  tensorboard --logdir=runs

The event files of a run hold what metrics.jsonl holds: each start of the run
writes them anew, so that a resumed run has every step once. Steps that are
written again get the time of the restart.
"""

import math
import pathlib
from typing import Any

import tensorboardX

from mt import distributed
from mt import errors
from mt import journal

Writer = tensorboardX.SummaryWriter | None  # The first process has one.


def open_writer(workdir: pathlib.Path) -> Writer:
  """Begins the event file of a run, and removes those of earlier starts.

  Raises:
    errors.UserError: the folder is not writable, the disk is full.
  """
  if not distributed.is_first():
    return None
  folder = workdir / 'tensorboard'
  try:
    for old in folder.glob('events.out.tfevents.*'):
      old.unlink()
    return tensorboardX.SummaryWriter(str(folder), flush_secs=10)
  except OSError as e:
    raise errors.UserError(
      f'{folder}: cannot write event files ({e.strerror}); give --workdir a '
      'folder with space that you may write to.'
    ) from None


def replay(writer: Writer, metrics: pathlib.Path) -> None:
  """Adds what metrics.jsonl holds already."""
  for line in journal.read_metrics(metrics):
    add(writer, line)


def add(writer: Writer, line: dict[str, Any]) -> None:
  """Adds the numbers of one line of metrics.jsonl, under its step."""
  for name, value in line.items() if writer else ():
    number = isinstance(value, int | float) and math.isfinite(value)
    if name != 'step' and number:
      writer.add_scalar(name, value, line['step'])
