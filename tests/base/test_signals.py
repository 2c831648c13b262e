"""Signals, notices: saved within a step, the code, the same run after."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mt.base import errors
from mt.base import journal
from mt.base import signals
from mt.train import manifest
from mt.train import run as run_lib
from mt.train import validation
from tests.fixtures.refusal import refusal
from tests.runs import folders


@pytest.fixture
def config(debug_config):
  debug_config.train.max_steps, debug_config.checkpoint.every = 8, 5
  debug_config.eval.every = 4
  debug_config.eval.chrf_pairs = debug_config.eval.translate_every = 0
  debug_config.eval.patience = 0
  return debug_config


@pytest.mark.parametrize(
  'number, code',
  [
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.heavy),
    (signal.SIGTERM, 143),
  ],
)
def test_saved_within_a_step_and_the_same_run_after(
  config, tmp_path, monkeypatch, number, code
):
  run_lib.run(config, tmp_path / 'whole')
  real = journal.add_metrics

  def add_and_ask(path, line):
    real(path, line)
    if line['step'] == 2 and 'loss' in line:  # Step 3 is under way.
      os.kill(os.getpid(), number)

  both = signal.SIGINT, signal.SIGTERM
  before = [signal.getsignal(x) for x in both]
  monkeypatch.setattr(journal, 'add_metrics', add_and_ask)
  with pytest.raises(errors.Interrupted, match='step 3, which is saved') as e:
    run_lib.run(config, tmp_path / 'cut')
  assert e.value.code == code
  assert manifest.steps(tmp_path / 'cut' / 'checkpoints') == [3]
  assert before == [signal.getsignal(x) for x in both]
  lines = (tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == [0, 1, 2, 3]
  monkeypatch.setattr(journal, 'add_metrics', real)
  run_lib.run(config, tmp_path / 'cut')
  folders.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_one_at_the_last_validation_leaves_before_the_scores(
  config, tmp_path, monkeypatch
):
  config.train.max_steps = 2
  real = validation.evaluate

  def evaluate(run, state, translate):
    if state.at == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(run, state, translate)

  with monkeypatch.context() as m:
    m.setattr(validation, 'evaluate', evaluate)
    with pytest.raises(errors.Interrupted, match='step 2, which is saved'):
      run_lib.run(config, tmp_path)
  assert not (tmp_path / 'scores.json').exists()
  lines = folders.metrics(tmp_path)
  assert 'valid_loss' in lines[-1] and lines[-1]['step'] == 2
  run_lib.run(config, tmp_path)
  assert folders.metrics(tmp_path) == lines
  assert folders.scores(tmp_path)['valid']['after']['step'] == 2


_TWICE = """
import os, signal
from mt.base import cli, signals
def main(_):
  with signals.listening() as listener:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert listener.asked() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print('still here')
cli.run(main)
"""
_EACH = """
import os, signal
from mt.base import cli, errors, signals
def main(_):
  for number in (signal.SIGINT, signal.SIGHUP):  # The tests may be under nohup.
    signal.signal(number, signal.SIG_DFL)
  for ignored in ((), (signal.SIGINT, signal.SIGHUP)):
    for number in ignored:  # As nohup and a script's `&` do.
      signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGINT, *errors.TAKEN_AWAY):
      with signals.listening() as listener:
        os.kill(os.getpid(), number)
        print(int(listener.asked()), end=' ')
  os.kill(os.getpid(), signal.SIGUSR1)  # Outside of training.
cli.run(main)
"""


def _run(program):
  return subprocess.run(
    [sys.executable, '-c', program],
    cwd=folders.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_second_interrupt_leaves_at_once():
  done = _run(_TWICE)
  assert done.returncode == 130, done.stderr
  assert 'still here' not in done.stdout
  assert done.stderr.count('\n') == 1 and 'not saved' in done.stderr


def test_each_signal_that_takes_a_machine_away():
  done = _run(_EACH)
  assert done.returncode == 128 + signal.SIGUSR1, done.stderr
  heard = [int(x) for x in done.stdout.split() if x.isdecimal()]
  assert heard == [2, 15, 1, 10, 12, 0, 15, 0, 10, 12]
  assert done.stderr.count('\n') == 1 and 'last checkpoint' in done.stderr


def test_a_notice_that_a_command_finds(tmp_path, monkeypatch):
  monkeypatch.setattr(signals, '_PAUSE', 0.01)
  notice = tmp_path / 'notice'
  with signals.listening(f'test -e {notice}') as listener:
    assert not listener.asked()
    time.sleep(0.1)
    assert not listener.asked()
    notice.touch()
    deadline = time.monotonic() + 20
    while not listener.asked() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert listener.asked() == signal.SIGTERM


def test_a_command_that_hangs_leaves_nothing_behind(tmp_path, monkeypatch):
  """It is asked every few seconds, for days."""
  monkeypatch.setattr(signals, '_PATIENCE', 0.5)
  late = tmp_path / 'late'
  assert signals._status(f'(sleep 1; touch {late}) | cat') == 1
  time.sleep(1)
  assert not late.exists()


def test_a_signal_ends_the_command_that_is_asked(tmp_path):
  def leave(number, _frame):
    raise errors.Interrupted('terminated', 128 + number)

  late, before = tmp_path / 'late', signal.signal(signal.SIGUSR1, leave)
  threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
  try:
    with pytest.raises(errors.Interrupted):
      signals.check_command(f'sleep 1; touch {late}')
    time.sleep(1)
  finally:
    signal.signal(signal.SIGUSR1, before)
  assert not late.exists()


def test_a_command_that_there_is_not():
  command = 'no-such-program --x'
  refusal(
    lambda: signals.check_command(command), 'train.preempt_command', command
  )
  signals.check_command('false')
