"""Weights & Biases: the calls, to a stub; and its own files, where it is."""

import importlib.util
import sys
import types

import pytest

from configs import default
from mt.base import files
from mt.base import recorder
from mt.base import run_folder
from mt.train import settings
from tests.fixtures.refusal import refusal


@pytest.fixture
def config():
  config = default.get_config()
  config.log.to = 'wandb'
  return config


def _record(folder, config, first, last):
  made = recorder.Recorder(folder, config, first)
  for step in range(first + 1, last + 1):
    made.add({'step': step, 'loss': step / 4, 'bad': None})
  made.close()


def test_a_resume_goes_on_with_the_same_run(tmp_path, config, monkeypatch):
  told, logged = [], []
  run = types.SimpleNamespace(
    log=lambda line, step: logged.append((step, line)),
    finish=lambda: told.append('finish'),
  )
  stub = types.SimpleNamespace(
    init=lambda **kwargs: told.append(kwargs) or run,
    Settings=dict,
    Error=RuntimeError,
  )
  monkeypatch.setitem(sys.modules, 'wandb', stub)
  _record(tmp_path, config, -1, 2)
  _record(tmp_path, config, 1, 3)
  first, _, second, end = told
  assert first == second and end == 'finish'
  assert first['id'] == (tmp_path / 'wandb_id.txt').read_text().strip()
  assert first['config'] == config.to_dict() and first['resume'] == 'allow'
  assert first['settings']['console'] == 'off'
  assert [step for step, _ in logged] == [0, 1, 2, 2, 3]
  assert logged[-1][1] == {'loss': 0.75}
  assert not (tmp_path / 'tensorboard').exists()


def test_a_start_that_came_to_nothing_is_not_gone_on_with(tmp_path, config):
  """What it sent would stand in the curves of a run with other knobs."""
  run_folder.claim(tmp_path, config)
  (tmp_path / 'wandb_id.txt').write_text('a')
  config.optim.learning_rate *= 2
  run_folder.claim(tmp_path, config)
  assert not (tmp_path / 'wandb_id.txt').exists()
  (tmp_path / 'wandb_id.txt').write_text('b')
  (tmp_path / 'checkpoints' / 'step_1').mkdir(parents=True)
  run_folder.claim(tmp_path, config)
  assert (tmp_path / 'wandb_id.txt').read_text() == 'b'


def test_it_is_not_touched_unless_asked_for(tmp_path, config, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # Its import would raise.
  config.log.to = 'tensorboard'
  _record(tmp_path, config, -1, 1)
  assert not (tmp_path / 'wandb_id.txt').exists()


def test_a_missing_library_is_one_sentence(config, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  refusal(lambda: settings.check(config), 'log.to', 'pip install wandb')


def test_the_real_library_offline(tmp_path, config, monkeypatch):
  pytest.importorskip('wandb', reason='wandb is optional, and not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  _record(tmp_path, config, -1, 2)
  _record(tmp_path, config, 1, 3)
  name = files.read_lines(tmp_path / 'wandb_id.txt')[0]
  starts = sorted((tmp_path / 'wandb').glob(f'offline-run-*/run-{name}.wandb'))
  assert len(starts) == 2
  for path, losses in zip(
    starts, (('0.25', '0.5'), ('0.5', '0.75')), strict=True
  ):
    assert all(x.encode() in path.read_bytes() for x in ('loss', *losses))
