"""What goes wrong while batches are read: soon an error that names the text."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
import grain
import numpy as np
import pytest

from mt.base import errors
from mt.data import batches
from mt.data import reader
from mt.data import store
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]


def _reader(row, last=9, max_wait=60.0):
  """A batch is a number; `row` makes it."""

  def dataset_from(first):
    return grain.MapDataset.range(first, 9).map(row).to_iter_dataset()

  return reader.Reader(dataset_from, last, 'a.tsv and b.tsv', None, max_wait)


def test_whoever_reads_ahead_is_closed():
  """Grain's processes would go on for ever."""
  closed = []

  class Batches:
    def __init__(self, first):
      self.at = first

    def __iter__(self):
      return self

    def __next__(self):
      self.at += 1
      return self.at

    def close(self):
      closed.append(self.at)

  iterator = reader.Reader(Batches, 9, 'a.tsv')
  assert [next(iterator), next(iterator)] == [1, 2] and closed == []
  iterator.set_state({'batches_taken': 7})
  assert closed == [2] and next(iterator) == 8
  iterator.close()
  assert closed == [2, 8]
  assert next(iterator) == 9
  with pytest.raises(StopIteration):
    next(iterator)


def test_no_batch_is_lost_by_an_error():
  """Who asks again is told the same, and not given the batch after."""
  fails = [True]

  def row(number):
    if number == 2 and fails:
      raise errors.UserError('Out of order.')
    return np.array(number)

  iterator = _reader(row)
  assert [int(next(iterator)) for _ in range(2)] == [0, 1]
  for _ in range(2):
    refusal(lambda: next(iterator), 'Out of order')
  fails.clear()
  assert int(next(iterator)) == 2


def test_data_that_end_too_early_are_an_error():
  iterator = _reader(np.array, last=12)
  for _ in range(9):
    next(iterator)
  refusal(lambda: next(iterator), 'batch 10 of 12 from a.tsv and b.tsv')
  refusal(lambda: next(iterator), 'batch 10 of 12', 'ended')


def test_what_does_not_come_is_an_error_in_time():
  wait = [True]

  def row(number):
    while number == 1 and wait:
      time.sleep(0.01)
    return np.array(number)

  iterator = _reader(row, max_wait=0.3)
  assert int(next(iterator)) == 0
  start = time.monotonic()
  refusal(
    lambda: next(iterator), 'batch 2 of 9 from a.tsv', 'data.max_wait=0.3 s'
  )
  assert 0.3 <= time.monotonic() - start < 10
  wait.clear()
  assert int(next(iterator)) == 1


_SILENT = """
import time
import grain
from mt.base import cli
from mt.data import reader
def main(_):
  rows = grain.MapDataset.range(9).map(lambda _: time.sleep(1000))
  next(reader.Reader(lambda _: rows.to_iter_dataset(), 9, 'a.tsv', None, 0.5))
cli.run(main)
"""


def test_nobody_waits_for_what_does_not_come():
  """Python would join the thread that hangs."""
  done = subprocess.run(
    [sys.executable, '-c', _SILENT],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == errors.UserError.code
  assert done.stderr.count('\n') == 1 and 'a.tsv' in done.stderr


class _Text:
  """A parallel text of one block of 40 examples of one token."""

  where = 'web.tsv'

  def __init__(self, error=None):
    self.bitext, self.error = self, error

  def __len__(self):
    return 1

  def block(self, number):
    if self.error:
      raise self.error
    ones = np.ones(40, np.int32)
    return store.make_examples(ones, 0 * ones, ones)


@pytest.mark.parametrize(
  'error', [IndexError('tokens\nout of range'), MemoryError(), OSError(5, 'IO')]
)
def test_an_exception_names_the_text_and_the_row(error):
  rows = batches.Rows(_Text(error), 8, 0, 100)
  refusal(lambda: rows[7], 'web.tsv: row 7', type(error).__name__)
  iterator = batches.train_iterator([rows], [1], 2, 9)
  iterator.set_state({'batches_taken': 3})
  refusal(lambda: next(iterator), 'web.tsv: row 6', type(error).__name__)


class _OwnProcess(_Text):
  """Damage that shows in a process of Grain's alone."""

  def block(self, number):
    if multiprocessing.parent_process():
      raise IndexError('out of range')
    return super().block(number)


@pytest.fixture
def parsed_flags():
  """Grain's processes look at absl's flags, which a command has parsed."""
  parsed = flags.FLAGS.is_parsed()
  if not parsed:
    flags.FLAGS.mark_as_parsed()
  yield
  if not parsed:
    flags.FLAGS.unparse_flags()


def test_a_process_that_fails_or_is_killed_is_one_sentence(parsed_flags):
  def make(text):
    rows = batches.Rows(text, 8, 0, 10_000)
    return batches.train_iterator([rows], [1], 2, 4000, workers=1)

  failing = make(_OwnProcess())
  refusal(lambda: next(failing), 'web.tsv: row 0', 'IndexError: out of range')
  assert not multiprocessing.active_children()

  iterator = make(_Text())
  next(iterator)
  (child,) = multiprocessing.active_children()
  os.kill(child.pid, signal.SIGTERM)  # Of a cluster, to all processes.
  next(iterator)
  os.kill(child.pid, signal.SIGKILL)

  def rest():
    while True:
      next(iterator)

  refusal(rest, 'from web.tsv', 'data.workers', 'exit code -9')


_ORPHAN = """
import multiprocessing
import os
import signal
from absl import flags
from mt.data import batches
from tests.data import test_reader
if __name__ == '__main__':
  flags.FLAGS.mark_as_parsed()
  rows = batches.Rows(test_reader._Text(), 8, 0, 10_000)
  iterator = batches.train_iterator([rows], [1], 2, 4000, workers=1)
  next(iterator)
  (child,) = multiprocessing.active_children()
  print(child.pid, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_the_one_that_started_it():
  """It would wait for ever to be rid of its batches."""
  done = subprocess.run(
    [sys.executable, '-c', _ORPHAN],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    timeout=120,
  )
  assert done.returncode == -signal.SIGKILL
  path = pathlib.Path('/proc') / done.stdout.strip() / 'cmdline'
  deadline = time.monotonic() + 30
  while path.exists() and b'spawn_main' in path.read_bytes():
    assert time.monotonic() < deadline
    time.sleep(0.05)
