"""What a run says: metrics.jsonl, and a progress bar or plain lines."""

import contextlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import tqdm

from mt import distributed
from mt import errors
from mt import workdir as workdir_lib


def say(text: str) -> None:
  """A line on stdout that leaves a progress bar in one piece.

  Of several processes the first one speaks; so for everything in this file.
  """
  if not distributed.is_first():
    return
  tqdm.tqdm.write(text)
  sys.stdout.flush()


def cut_metrics(path: pathlib.Path, last_step: int) -> None:
  """Drops the lines after `last_step`: a resumed run writes them again.

  A line that a crash left unfinished goes too.
  """
  if not distributed.is_first() or not path.exists():
    return
  kept = []
  for line in path.read_text(encoding='utf-8').splitlines():
    with contextlib.suppress(ValueError):
      if json.loads(line)['step'] <= last_step:
        kept.append(line + '\n')
  workdir_lib.write(path, ''.join(kept))


def add_metrics(path: pathlib.Path, line: dict[str, Any]) -> None:
  """Appends one JSON object; `step` says how many steps were done.

  JSON has no infinity and no NaN: they become null.
  """
  if not distributed.is_first():
    return
  line = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in line.items()
  }
  try:
    with open(path, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line) + '\n')
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot write metrics ({e.strerror}); the last checkpoint is '
      'whole: make room and start again.'
    ) from None


class Progress:
  """A bar on a terminal; elsewhere a line for each `every`, or none at 0."""

  def __init__(self, what: str, total: int, done: int = 0, every: int = 0):
    self.what, self.total, self.every = what, total, every
    self.first, self.start = done, time.monotonic()
    terminal = sys.stderr.isatty() and distributed.is_first()
    self.bar = tqdm.tqdm(
      desc=what,
      total=total,
      initial=done,
      disable=not terminal,
      dynamic_ncols=True,
      leave=False,
    )

  def update(self, done: int, note: str = '') -> None:
    """Shows that `done` of all are done."""
    if not self.bar.disable:
      self.bar.set_postfix_str(note, refresh=False)
      self.bar.update(done - self.bar.n)
    elif self.every and (done % self.every == 0 or done == self.total):
      spent = time.monotonic() - self.start
      left = spent / max(1, done - self.first) * (self.total - done)
      say(
        f'{self.what} {done}/{self.total}{"  " + note if note else ""}  '
        f'{left:.0f} s left'
      )

  def close(self) -> None:
    self.bar.close()
