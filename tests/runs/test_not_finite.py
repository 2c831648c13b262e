"""Runs that meet numbers that are none, and the averages of EMA in runs."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from mt.base import errors
from mt.data import corpus
from mt.data import splits
from mt.data import tokenizer
from mt.gemma import loss
from mt.train import checkpoint
from mt.train import loop
from mt.train import run as run_lib
from mt.train import step
from tests.fixtures.refusal import refusal
from tests.runs import folders


def _refused(config, workdir):
  with pytest.raises(errors.UserError) as e:
    run_lib.run(config, workdir)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_steps_that_are_not_finite_end_a_run(
  debug_config, tmp_path, monkeypatch
):
  real = loss.target_nll

  def infinite(*args, **kwargs):
    return tuple(x + jnp.inf for x in real(*args, **kwargs))

  monkeypatch.setattr(loss, 'target_nll', infinite)
  debug_config.train.max_skipped = 3
  debug_config.checkpoint.every = 100
  text = _refused(debug_config, tmp_path)
  # The third batch's pairs, by what its tokens say.
  found = re.search(r'training pairs (.*?)(?: and \d+ more)?: lower', text)
  texts = corpus.read_splits(debug_config.data, corpus.splits(debug_config))
  tok = tokenizer.from_file(tmp_path / 'tokenizer.model')
  train = splits.read(debug_config, tok, texts).train
  batch = [next(train) for _ in range(3)][2]
  train.close()
  said = ' '.join(tok.decode(row.tolist()) for row in batch['tokens'])
  sources = {p.id: p.source for p in texts['train'][0].read()}
  ids = found[1].split(', ')
  assert ids and all(sources[i] in said for i in ids)
  assert 'step 3' in text and '3 steps in a row' in text
  assert 'train.max_skipped=3' in text and 'no checkpoint' in text
  lines = [m for m in folders.metrics(tmp_path) if 'loss' in m]
  assert [m['skipped'] for m in lines] == [1, 2, 3]
  assert all(m['loss'] is None for m in lines)
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


@pytest.mark.parametrize('every', [2, 100])
def test_a_state_of_no_finite_loss_is_not_saved(
  debug_config, tmp_path, monkeypatch, every
):
  """Weights may be finite and good for nothing, whether it is eval's turn."""
  real = step.make_eval_step

  def make_eval_step(*args):
    eval_step = real(*args)

    def wrapped(state, batch):
      nll = {'nll': jnp.nan} if int(state.step) > 3 else {}
      return eval_step(state, batch) | nll

    return wrapped

  monkeypatch.setattr(step, 'make_eval_step', make_eval_step)
  debug_config.eval.every, debug_config.checkpoint.every = every, 2
  text = _refused(debug_config, tmp_path)
  assert 'step 4: the validation loss is nan' in text
  assert 'newest checkpoint is of step 2' in text
  assert folders.steps(tmp_path) == [2]


def test_weights_that_are_not_finite_are_not_saved(debug_config, tmp_path):
  debug_config.train.max_steps = 2
  real = loop.save

  def save_two(run, state, metrics):
    real(run, state, metrics)
    bad = {'final_norm': jnp.full(64, jnp.nan)}
    bad = dataclasses.replace(
      state, step=state.step + 1, trained=state.trained | bad
    )
    refusal(
      lambda: real(run, bad, metrics), 'step 3', 'not all weights', 'step 2'
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'save', save_two)
    run_lib.run(debug_config, tmp_path)
  assert folders.steps(tmp_path) == [2]


def test_ema_is_saved_resumed_and_translates(debug_config, tmp_path):
  debug_config.optim.ema_decay = 0.9
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path / 'whole')
  debug_config.train.max_steps = 2
  run_lib.run(debug_config, tmp_path / 'cut')
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path / 'cut')
  assert (
    folders.losses(tmp_path / 'whole')[4] == folders.losses(tmp_path / 'cut')[4]
  )
  _, _, params = checkpoint.load_finetuned(tmp_path / 'cut', 4)
  ema = folders.arrays(tmp_path / 'whole', 4, 'ema')
  np.testing.assert_array_equal(params['embedding'], ema['embedding'])
  trained = folders.arrays(tmp_path / 'whole', 4)
  assert not np.array_equal(params['embedding'], trained['embedding'])
