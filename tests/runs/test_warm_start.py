"""A run that begins with another's weights: those, and nothing else."""

import shutil

import numpy as np
import pytest

from mt.export import __main__ as export
from mt.train import checkpoint
from mt.train import run as run_lib
from tests.fixtures.refusal import refusal
from tests.runs import folders


def _first_loss(workdir):
  return folders.losses(workdir)[0]


def _quick(config):
  config.train.max_steps, config.eval.every = 4, 2


@pytest.mark.parametrize(
  'parts', ['all', pytest.param('lora', marks=pytest.mark.heavy)]
)
def test_the_weights_and_nothing_else(debug_config, tmp_path, capsys, parts):
  _quick(debug_config)
  debug_config.train.parts = parts
  debug_config.optim.ema_decay = 0.5 if parts == 'lora' else 0.0
  first = tmp_path / 'first'
  run_lib.run(debug_config, first)
  losses = folders.losses(first)
  warm = debug_config.copy_and_resolve_references()
  warm.weights.warm_start = f'{first}@2'
  warm.optim.ema_decay = 0.9
  run_lib.run(warm, tmp_path / 'warm')
  lines = folders.metrics(tmp_path / 'warm')
  assert [m['step'] for m in lines if 'loss' in m] == [1, 2, 3, 4]
  assert 'warm start' in capsys.readouterr().out
  assert _first_loss(tmp_path / 'warm') == losses[2]
  if parts == 'lora':  # An adapter is another way to the same weights.
    export.from_run('peft', first, tmp_path / 'adapter', 'float32', False, '2')
    warm.weights.warm_start = ''
    warm.weights.adapter = str(tmp_path / 'adapter')
    run_lib.run(warm, tmp_path / 'adapted')
    assert _first_loss(tmp_path / 'adapted') == losses[2]
    run_lib.run(warm, tmp_path / 'adapted')  # Resumed.
    warm.weights.warm_start, warm.weights.adapter = f'{first}@2', ''
  # The same again finds its own checkpoint, and that of another is refused.
  run_lib.run(warm, tmp_path / 'warm')
  warm.weights.warm_start = str(first)
  refusal(lambda: run_lib.run(warm, tmp_path / 'warm'), 'weights.warm_start')
  warm.optim.ema_decay = 0.0
  run_lib.run(warm, tmp_path / 'last')
  assert _first_loss(tmp_path / 'last') == losses[4]
  old = checkpoint.load_trained(first, 4)[2]
  new = checkpoint.load_trained(tmp_path / 'last', 4)[2]
  assert any((np.asarray(old[k]) != np.asarray(new[k])).any() for k in old)
  # The other run trains on: these are no longer the weights it began with.
  debug_config.train.max_steps = 6
  run_lib.run(debug_config, first)
  refusal(lambda: run_lib.run(warm, tmp_path / 'last'), 'its warm_start is')


def test_what_cannot_be_begun_with_is_one_sentence(debug_config, tmp_path):
  _quick(debug_config)
  first = tmp_path / 'first'
  debug_config.train.parts, debug_config.train.max_steps = 'lora', 1
  run_lib.run(debug_config, first)
  warm = debug_config.copy_and_resolve_references()

  def refused(*words, **knobs):
    config = warm.copy_and_resolve_references()
    config.update_from_flattened_dict(
      {k.replace('__', '.'): v for k, v in knobs.items()}
    )
    shutil.rmtree(tmp_path / 'w', ignore_errors=True)
    refusal(lambda: run_lib.run(config, tmp_path / 'w'), *words)

  refused('nowhere', weights__warm_start=str(tmp_path / 'nowhere'))
  warm.weights.warm_start = str(first)
  refused("'3'", weights__warm_start=f'{first}@3')
  refused("train.parts='lora'", first, train__parts='all')
  refused('train.lora_rank=16', first, train__lora_rank=4)
  refused('fingerprint', first, seed=5)
