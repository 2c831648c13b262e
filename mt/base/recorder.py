"""Where the metrics of a run go: metrics.jsonl, and what log.to names."""

import pathlib
from typing import Any

import ml_collections

from mt.base import events
from mt.base import journal
from mt.base import tracking


class Recorder:
  """Open files; each line is in them when `add` returns."""

  def __init__(
    self, workdir: pathlib.Path, config: ml_collections.ConfigDict, last: int
  ):
    """Goes on after step `last`; what is there of later ones is dropped.

    Raises:
      errors.UserError: the folder cannot be written; see tracking.start.
    """
    path, to = workdir / 'metrics.jsonl', config.log.to.split(',')
    journal.cut_metrics(path, last)
    self._metrics = journal.open_metrics(path)
    self._events = self._tracked = None
    if 'tensorboard' in to:
      self._events = events.open_writer(workdir)
      events.replay(self._events, path)
    if 'wandb' in to:
      self._tracked = tracking.start(workdir, config)

  def add(self, line: dict[str, Any]) -> None:
    """Adds what is known of a step; `step` says how many were done."""
    journal.add_metrics(self._metrics, line)
    events.add(self._events, line)
    tracking.add(self._tracked, line)

  def close(self) -> None:
    for each in (self._metrics, self._events):
      if each:
        each.close()
    tracking.finish(self._tracked)
