"""A disk that is full or read-only at any time; two runs in one folder."""

import gc
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from mt.base import errors
from mt.base import journal
from mt.base import run_folder
from mt.evaluate import report
from mt.train import checkpoint
from mt.train import manifest
from mt.train import run as run_lib
from tests.fixtures.refusal import refusal
from tests.runs import folders


@pytest.fixture
def config(debug_config):
  debug_config.train.max_steps, debug_config.checkpoint.every = 4, 2
  debug_config.eval.every = 2
  debug_config.eval.chrf_pairs = debug_config.eval.translate_every = 0
  debug_config.eval.patience, debug_config.eval.translate_pairs = 0, 1
  return debug_config


@pytest.fixture
def disk(tmp_path):
  """A file system of its own, of 8 MB."""
  path = tmp_path / 'disk'
  path.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'none', str(path)]
  try:
    done = subprocess.run(command, capture_output=True)
  except FileNotFoundError:
    pytest.skip('no mount here')
  if done.returncode:
    pytest.skip('only root may mount a small file system')
  yield path
  subprocess.run(['umount', '-l', str(path)], check=True)
  # Orbax's writes that failed are tasks that log when they are collected. In
  # the midst of an ast.parse, as another test may have it, Python 3.11 fails.
  gc.collect()


def _fill(disk, leave=0):
  """Takes all the space but `leave` bytes."""
  with open(disk / 'filler', 'ab', buffering=0) as f:
    stats = os.statvfs(disk)
    free = stats.f_bavail * stats.f_bsize - leave
    while free > 0:
      free -= f.write(bytes(min(free, 1 << 20)))


def _before(monkeypatch, module, name, act):
  """Calls `act` with the arguments before each call of a function."""
  real = getattr(module, name)

  def wrapped(*args, **kwargs):
    act(*args)
    return real(*args, **kwargs)

  monkeypatch.setattr(module, name, wrapped)


def test_full_during_each_kind_of_file_and_then_not(
  config, disk, tmp_path, monkeypatch
):
  """Each time one sentence; in the end, the run that had room all along."""
  run_lib.run(config, tmp_path / 'whole')
  workdir = disk / 'w'

  def refused(*words):
    refusal(lambda: run_lib.run(config, workdir), *words)
    assert not list(workdir.rglob('*.part'))
    monkeypatch.undo()
    (disk / 'filler').unlink()

  # Nothing can be written at all.
  _fill(disk)
  refused(workdir, '--workdir', 'space')

  def of_step(path, line):
    if line['step'] == 1:
      _fill(disk)

  _before(monkeypatch, journal, 'add_metrics', of_step)
  refused('cannot write')  # metrics.jsonl, or the events beside it.

  # Seen before a checkpoint is begun; and, were it not, while it is written.
  _before(
    monkeypatch, checkpoint, 'save', lambda *_: _fill(disk, leave=300_000)
  )
  refused('a checkpoint takes 1.9 MB', '0.3 MB are free')
  _before(
    monkeypatch, checkpoint, 'save', lambda *_: _fill(disk, leave=300_000)
  )
  monkeypatch.setattr(manifest, 'check_space', lambda *_: None)
  with pytest.raises(errors.ExitNow, match='cannot save step 2'):
    run_lib.run(config, workdir)
  monkeypatch.undo()
  (disk / 'filler').unlink()
  assert manifest.steps(workdir / 'checkpoints') == []

  def after_training(path, _):
    if manifest.steps(path / 'checkpoints') == [2, 4]:
      _fill(disk)

  _before(monkeypatch, report, 'write', after_training)
  refused('report.html', 'space')

  run_lib.run(config, workdir)
  folders.assert_same_run(tmp_path / 'whole', workdir)


def test_a_folder_that_is_only_to_be_read(config, disk):
  (disk / 'w').mkdir()
  command = ['mount', '-o', 'remount,ro', str(disk)]
  subprocess.run(command, check=True)
  refusal(
    lambda: run_lib.run(config, disk / 'w'), disk, 'Read-only', '--workdir'
  )


_HOLDER = """
import sys, time
from mt.base import run_folder
import pathlib
with run_folder.locked(pathlib.Path(sys.argv[1])):
  print('locked', flush=True)
  time.sleep(1000)
"""


def test_one_run_at_a_time(config, tmp_path):
  """And a crash leaves no lock behind."""
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLDER, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[2],
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == b'locked\n'
  refusal(lambda: run_lib.run(config, tmp_path), tmp_path, 'another run')
  assert not (tmp_path / 'config.json').exists()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with run_folder.locked(tmp_path):
    pass
