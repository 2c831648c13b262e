"""SIGINT and SIGTERM: saved within a step, the code, the same run after."""

import json
import os
import signal
import subprocess
import sys

import pytest

from mt.base import errors
from mt.base import journal
from mt.train import manifest
from mt.train import run as run_lib
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
  assert before == [
    signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)
  ]
  lines = (tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == [0, 1, 2, 3]
  monkeypatch.setattr(journal, 'add_metrics', real)
  run_lib.run(config, tmp_path / 'cut')
  folders.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


_TWICE = """
import os, signal
from mt.base import errors, signals
def main(_):
  with signals.listening() as listener:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert listener.asked() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print('still here')
errors.run(main)
"""
_OUTSIDE = """
import os, signal
from mt.base import errors
errors.run(lambda _: os.kill(os.getpid(), signal.SIGTERM))
"""


@pytest.mark.parametrize(
  'program, code, words',
  [(_TWICE, 130, 'not saved'), (_OUTSIDE, 143, 'last checkpoint')],
)
def test_a_second_interrupt_and_one_outside_training(program, code, words):
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=folders.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == code, done.stderr
  assert 'still here' not in done.stdout
  assert done.stderr.count('\n') == 1 and words in done.stderr
