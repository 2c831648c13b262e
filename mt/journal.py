"""What a run says: metrics.jsonl, and a progress bar or plain lines."""

import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import tqdm

from mt import errors
from mt import workdir as workdir_lib


def say(text: str) -> None:
  """A line on stdout that leaves a progress bar in one piece."""
  tqdm.tqdm.write(text)
  sys.stdout.flush()


def cut_metrics(path: pathlib.Path, last_step: int) -> None:
  """Drops the lines after `last_step`: a resumed run writes them again.

  A line that a crash left unfinished goes too.
  """
  if path.exists():
    kept = [x for x in read_metrics(path) if x['step'] <= last_step]
    workdir_lib.write(path, ''.join(json.dumps(x) + '\n' for x in kept))


def add_metrics(path: pathlib.Path, line: dict[str, Any]) -> None:
  """Appends one JSON object; `step` says how many steps were done."""
  try:
    with open(path, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line) + '\n')
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot write metrics ({e.strerror}); the last checkpoint is '
      'whole: make room and start again.'
    ) from None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl that are whole; none where there is no file."""
  lines = []
  if path.exists():
    for line in path.read_text(encoding='utf-8').splitlines():
      with contextlib.suppress(ValueError):
        lines.append(json.loads(line))
  return lines


class Progress:
  """A bar on a terminal; else a line at each multiple of `every`, if any."""

  def __init__(self, what: str, total: int, done: int = 0, every: int = 0):
    self.what, self.total, self.every = what, total, every
    self.first, self.start = done, time.monotonic()
    self.done = done
    terminal = sys.stderr.isatty()
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
    elif self.every and (
      done // self.every > self.done // self.every or done == self.total
    ):
      spent = time.monotonic() - self.start
      left = spent / max(1, done - self.first) * (self.total - done)
      say(
        f'{self.what} {done}/{self.total}{"  " + note if note else ""}  '
        f'{left:.0f} s left'
      )
    self.done = done

  def close(self) -> None:
    self.bar.close()
