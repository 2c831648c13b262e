"""metrics.jsonl for TensorBoard: event files, without TensorFlow.

  tensorboard --logdir=runs

The event files of a run hold what metrics.jsonl holds: each start of the run
writes them anew, so that a resumed run has every step once.
"""

import math
import pathlib
import time
from typing import Any

from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from mt.base import files
from mt.base import journal
from mt.base import processes

# tensorboardX's usual writer is a thread: where the disk is full it dies, and
# whoever has more events for it waits for ever.
Writer = event_file_writer.EventsWriter | None  # The first process has one.


def open_writer(workdir: pathlib.Path) -> Writer:
  """Begins the event file of a run, and removes those of earlier starts."""
  if not processes.is_first():
    return None
  folder = workdir / 'tensorboard'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('events.out.tfevents.*'):
      old.unlink()
    writer = event_file_writer.EventsWriter(str(folder / 'events'))
    writer.flush()
  except OSError as e:
    raise files.unwritable(folder, e) from e
  return writer


def replay(writer: Writer, metrics: pathlib.Path) -> None:
  """Adds what metrics.jsonl holds already."""
  for line in journal.read_metrics(metrics):
    add(writer, line)


def add(writer: Writer, line: dict[str, Any]) -> None:
  """Adds the numbers of one line of metrics.jsonl, under its step."""
  if not writer:
    return
  event = event_pb2.Event(wall_time=time.time(), step=line['step'])
  for name, value in line.items():
    number = isinstance(value, int | float) and math.isfinite(value)
    if name != 'step' and number:
      event.summary.MergeFrom(summary.scalar(name, value))
  try:
    writer.write_event(event)
    writer.flush()
  except OSError as e:
    raise files.unwritable('tensorboard', e) from e
