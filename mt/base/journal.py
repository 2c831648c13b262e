"""What a run says: metrics.jsonl, and a progress bar or plain lines."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from typing import IO
from typing import Any

import numpy as np
import tqdm

from mt.base import errors
from mt.base import processes


def say(text: str) -> None:
  """A line on stdout, of the first process, that spares a progress bar."""
  if processes.is_first():
    tqdm.tqdm.write(text)
    sys.stdout.flush()


def add_metrics(file: IO[bytes], line: dict[str, Any]) -> None:
  """Appends one JSON object; `step` says how many steps were done.

  It is written at once, so that a kill loses the line under way at the most.
  JSON has no infinity and no NaN: they become null.
  """
  line = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in line.items()
  }
  data = (json.dumps(line) + '\n').encode()
  try:
    if file.write(data) < len(data):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  except OSError as e:
    raise errors.UserError(
      f'{file.name}: cannot write metrics ({e.strerror}); the last checkpoint '
      'is whole: make room and start again.'
    ) from e


def table_line(
  path: pathlib.Path, step: int, sums: Sequence[dict[str, float]]
) -> str:
  """A validation as the tutorial prints it.

  `STEP 20 training loss: 3.3015 - eval loss: 2.6868`: the mean of the training
  losses since the validation before, and the mean over batches of the mean in a
  batch, `sums` being nll and targets of each. Before the first step: `Start,
  validation loss: 10.6472`. Digits are those of a float32.
  """
  valid = _float32(np.mean([m['nll'] / m['targets'] for m in sums]))
  if not step:
    return f'Start, validation loss: {valid}'
  losses = []
  for line in read_metrics(path):
    if 'valid_loss' in line:
      losses = []
    elif line['loss'] is not None:  # That of a skipped step may be no number.
      losses.append(line['loss'])
  train = _float32(np.mean(losses)) if losses else math.nan
  return f'STEP {step} training loss: {train} - eval loss: {valid}'


def since_best(path: pathlib.Path) -> int:
  """Translated validations in a row without a better chrF than the one before.

  Counted from the first that reached the highest `valid_chrf` in metrics.jsonl;
  0 where there is none. The pretrained model, step 0, is no rival.
  """
  lines = (m for m in read_metrics(path) if m['step'] > 0)
  found = [m['valid_chrf'] for m in lines if 'valid_chrf' in m]
  return len(found) - 1 - found.index(max(found)) if found else 0


def _float32(x: float) -> float:
  return float(np.float32(x))


def read_metrics(
  path: pathlib.Path, first: int = 0
) -> Iterator[dict[str, Any]]:
  """The lines of metrics.jsonl that are whole; none where there is no file.

  `first` is the byte to begin with, where a line begins.
  """
  if not path.exists():
    return
  with path.open('rb') as lines:
    lines.seek(first)
    for line in lines:
      with contextlib.suppress(ValueError):  # A crash in the middle of a line.
        yield json.loads(line)


class Progress:
  """A bar on a terminal; else a line at each multiple of `every`, if any."""

  def __init__(self, what: str, total: int, done: int = 0, every: int = 0):
    self.what, self.total, self.every = what, total, every
    self.first, self.start = done, time.monotonic()
    self.done = done
    self.bar = tqdm.tqdm(
      desc=what,
      total=total,
      initial=done,
      disable=not (sys.stderr.isatty() and processes.is_first()),
      dynamic_ncols=True,
      leave=False,
    )

  def update(self, done: int, note: str = '') -> None:
    """Shows that `done` of all are done."""
    if not self.bar.disable:
      self.bar.set_postfix_str(note, refresh=False)
      self.bar.update(done - self.bar.n)
    elif self.every and (
      done // self.every > self.done // self.every or done == self.total
    ):
      spent = time.monotonic() - self.start
      left = spent / max(1, done - self.first) * (self.total - done)
      note = f'  {note}' if note else ''
      say(f'{self.what} {done}/{self.total}{note}  {left:.0f} s left')
    self.done = done

  def close(self) -> None:
    self.bar.close()
