"""Batches read ahead by Grain, with a position; and what goes wrong meanwhile.

Whatever does is an error that names the text: an exception where a row is made,
a process that was killed, a disk that does not answer, data that end too early.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import math
import multiprocessing
import os
import queue
import signal
import threading
from typing import Any

import numpy as np

from mt.base import errors

_GRACE = 60  # Seconds that Grain's processes go on after a SIGTERM.


class Reader:
  """An iterator over batches [B, L] of training rows.

  The position is the number of batches taken. It means the same whatever the
  number of processes or of Grain's workers.
  """

  def __init__(
    self,
    dataset_from: Callable[[int], Iterable],
    num_batches: int,
    where: str,
    pair_ids: Callable[[int], list[str]] | None = None,
    max_wait: float = math.inf,
  ):
    """A reader at position 0; nothing is read yet.

    Args:
      dataset_from: the batches from a position on.
      num_batches: after so many the iterator ends.
      where: the texts that are read.
      pair_ids: number of a batch -> ids of all pairs in it.
      max_wait: seconds that a batch may take.
    """
    self._dataset_from, self._last = dataset_from, num_batches
    self._where, self._max_wait = where, max_wait
    self._taken, self._batches = 0, None
    self.pair_ids = pair_ids

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """The next batch.

    Raises:
      errors.UserError: it cannot be read; who asks again gets this batch, and
        not the one after.
    """
    if self._taken == self._last:
      raise StopIteration
    if self._batches is None:
      self._batches = iter(self._dataset_from(self._taken))
    try:
      batch = self._read()
    except BaseException:
      self.close()
      raise
    self._taken += 1
    return batch

  def _read(self):
    what = f'batch {self._taken + 1} of {self._last} from {self._where}'
    try:
      return _within(self._max_wait, self._batches.__next__)
    except StopIteration:
      raise errors.UserError(
        f'{what}: the data ended before it; put the text back as it was when '
        'the run began and start again.'
      ) from None
    except queue.Empty:
      raise errors.ExitNow(
        f'{what} did not come within data.max_wait={self._max_wait:g} s; see '
        'that its disk answers and start again, or raise data.max_wait.'
      ) from None
    except RuntimeError as e:
      if 'Worker process' not in str(e):
        raise
      raise errors.UserError(
        f'{what}: one of the data.workers that prepare it was ended from '
        f'outside ({str(e).split(". ")[0]}), most often for lack of memory; '
        'start again with fewer of them.'
      ) from None

  def get_state(self) -> dict[str, int]:
    """The position, as JSON."""
    return {'batches_taken': self._taken}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position that get_state gave."""
    self.close()
    self._taken = state['batches_taken']

  def close(self) -> None:
    """Ends Grain's worker processes, if any."""
    if self._batches is not None:
      self._batches.close()
    self._batches = None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
  """What `call` returns or raises; queue.Empty if that takes longer."""
  answers = queue.SimpleQueue()

  def work():
    try:
      answers.put((call(), None))
    except BaseException as e:  # noqa: BLE001 It is raised again below.
      answers.put((None, e))

  threading.Thread(target=work, daemon=True).start()
  timeout = None if seconds == math.inf else seconds
  value, error = answers.get(timeout=timeout)
  if error is not None:
    raise error
  return value


def begin_worker(worker: int, workers: int) -> None:
  """For each of Grain's processes: it ends with the one that started it.

  Ctrl-C reaches every process of a terminal, and a cluster's SIGTERM may; who
  started these saves first, and ends them. If that one is killed, they go too.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))

  def follow():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
