"""Translations while training lasts: the best checkpoint, and when to stop."""

import shutil

import numpy as np
import pytest

from mt.base import files
from mt.base import journal
from mt.evaluate import __main__ as evaluate
from mt.evaluate import cached
from mt.export import __main__ as export
from mt.train import checkpoint
from mt.train import loop
from mt.train import run as run_lib
from mt.train import validation
from mt.translate import __main__ as terminal
from mt.weights import hf
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.translate.test_terminal import VALUES

# Step -> chrF; steps 4 and 8 are equal.
CURVE = {0: 9.0, 2: 1.0, 4: 30.25, 6: 2.5, 8: 30.25, 10: 3.0, 12: 40.5}


@pytest.fixture
def config(debug_config):
  c = debug_config
  c.train.max_steps = 8
  c.eval.translate_every = 2
  c.checkpoint.every, c.checkpoint.keep = 3, 1
  return c


@pytest.fixture
def curve(monkeypatch):
  """chrF as it is wanted here; what is scored at the end is real."""
  given = dict(CURVE)
  monkeypatch.setattr(
    validation, 'chrf', lambda run, state: given[int(state.step)]
  )
  return given


def _scored(workdir):
  return {
    split: {when: found['step'] for when, found in both.items()}
    for split, both in folders.scores(workdir).items()
  }


def test_the_best_is_kept_and_does_everything_after(
  config, curve, tmp_path, monkeypatch, capsys
):
  config.train.max_steps, config.checkpoint.keep = 7, 2
  curve[7] = 20.0
  config.eval.test = True
  config.eval.texts = ('Hello!',)
  kept = []
  real = cached.write
  monkeypatch.setattr(
    cached, 'write', lambda path, *a: kept.append(path.stem) or real(path, *a)
  )
  run_lib.run(config, tmp_path)
  assert folders.steps(tmp_path) == [4, 6, 7]
  assert kept == ['valid.before', 'test.before', 'valid.after', 'test.after']
  both = {'before': 0, 'after': 4}
  assert _scored(tmp_path) == {'valid': both, 'test': both}
  out = capsys.readouterr().out
  assert 'best: step 4 of 7, chrF 30.25' in out
  assert 'translated test (after, step 4): 3 sentences' in out

  # They are what the checkpoint of step 4 says, and no other.
  after = (tmp_path / 'translations' / 'test.after.txt').read_text('utf-8')
  texts = (tmp_path / 'translations' / 'texts.after.txt').read_text('utf-8')
  (tmp_path / 'translations' / 'test.after.json').unlink()
  for which, at in (('', 4), ('last', 7)):
    found = evaluate.translate_split(tmp_path, evaluate.Text('test'), which)
    assert found.step == at
    assert ('\n'.join(found.hypotheses) + '\n' == after) == (at == 4)
  given, made = tmp_path / 'in', tmp_path / 'out'
  given.write_text('Hello!\n')
  files = {'workdir': tmp_path, 'input': str(given), 'output': str(made)}
  capsys.readouterr()
  terminal.run(VALUES | files)
  assert made.read_text('utf-8') == texts
  told = 'checkpoint: step 4, the best (chrF 30.25)\n'
  assert told in capsys.readouterr().err
  assert checkpoint.find_step(tmp_path, 'last') == (7, 'step 7, the last')
  assert checkpoint.find_step(tmp_path, '6') == (6, 'step 6')

  # And so is what is exported.
  written = []
  monkeypatch.setattr(
    hf, 'write', lambda part, cfg, params, *_: written.append(params)
  )
  export.from_run('hf', tmp_path, tmp_path / 'a', 'float32', False)
  assert capsys.readouterr().out == told
  export.from_run('hf', tmp_path, tmp_path / 'b', 'float32', False, 'last')
  for params, at in zip(written, (4, 7), strict=True):
    want = folders.arrays(tmp_path, at)['final_norm']
    np.testing.assert_array_equal(params['final_norm'], want)
  assert not np.array_equal(*(p['final_norm'] for p in written))


@pytest.mark.heavy
def test_the_average_of_the_best_is_scored(config, curve, tmp_path):
  config.optim.ema_decay = 0.5
  config.train.max_steps = 6
  run_lib.run(config, tmp_path)
  after = (tmp_path / 'translations' / 'valid.after.txt').read_text('utf-8')
  (tmp_path / 'translations' / 'valid.after.json').unlink()
  found = evaluate.translate_split(tmp_path, evaluate.Text('valid'))
  assert found.step == 4
  assert '\n'.join(found.hypotheses) + '\n' == after


def _dying(monkeypatch, module, name, where):
  """`where(*args)` says when to die, once the real function is done."""
  real = getattr(module, name)

  def wrapped(*args):
    real(*args)
    if where(*args):
      raise KeyboardInterrupt

  monkeypatch.setattr(module, name, wrapped)


def _a_line(at, what):
  return (
    journal,
    'add_metrics',
    lambda path, line: line['step'] == at and what in line,
  )


def _saved(at):
  return checkpoint, 'save', lambda m, state, *_: int(state.step) == at


def _after(kept):
  return cached, 'write', lambda path, *_: path.stem == kept


@pytest.mark.heavy
def test_a_run_killed_again_and_again_has_the_same_best_and_end(
  config, curve, tmp_path, monkeypatch
):
  curve[8] = 7.0
  config.train.max_steps = 12
  config.eval.patience, config.eval.test = 2, True
  run_lib.run(config, tmp_path / 'whole')
  assert folders.metrics(tmp_path / 'whole')[-1]['step'] == 8
  assert folders.steps(tmp_path / 'whole') == [4, 8]
  for death in (
    _a_line(4, 'valid_chrf'),  # The best's, whose checkpoint is to come.
    _saved(4),
    _a_line(6, 'valid_chrf'),
    _a_line(8, 'valid_chrf'),  # Patience is at its end.
    _saved(8),
    _after('valid.after'),  # And test is not.
  ):
    with monkeypatch.context() as m:
      _dying(m, *death)
      with pytest.raises(KeyboardInterrupt):
        run_lib.run(config, tmp_path / 'cut')
  run_lib.run(config, tmp_path / 'cut')
  folders.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_a_stopped_run_only_finishes_until_it_may_go_on(
  config, curve, tmp_path, monkeypatch, capsys
):
  config.train.max_steps = 12
  config.eval.patience = 2
  run_lib.run(config, tmp_path)
  out = capsys.readouterr().out
  assert 'stopped at step 8 of 12: no better chrF in 2 translations' in out
  # Step 8 is as good as step 4: no reason to go on, and the best from then on.
  assert folders.steps(tmp_path) == [8]
  lines, scores = folders.metrics(tmp_path), _scored(tmp_path)
  assert scores == {'valid': {'before': 0, 'after': 8}}

  def never(*args, **kwargs):
    raise AssertionError

  with monkeypatch.context() as m:
    m.setattr(loop, 'train', never)
    m.setattr(cached, 'write', never)
    run_lib.run(config, tmp_path)
  out = capsys.readouterr().out
  assert 'stopped at step 8 of 12' in out and 'valid chrf' in out
  assert (folders.metrics(tmp_path), _scored(tmp_path)) == (lines, scores)

  # Patience is of translations: without them, none is needed.
  for config.eval.translate_every, config.eval.patience in ((0, 2), (2, 4)):
    with monkeypatch.context() as m, pytest.raises(AssertionError):
      m.setattr(loop, 'train', never)
      run_lib.run(config, tmp_path)
  assert not (tmp_path / 'scores.json').exists()
  assert not (tmp_path / 'translations' / 'valid.after.json').exists()
  run_lib.run(config, tmp_path)
  assert 'stopped at' not in capsys.readouterr().out
  assert _scored(tmp_path) == {'valid': {'before': 0, 'after': 12}}
  assert folders.steps(tmp_path) == [12]
  config.eval.patience = 0
  run_lib.run(config, tmp_path / 'whole')
  folders.assert_same_run(tmp_path / 'whole', tmp_path)


@pytest.mark.parametrize('every', [2, 0])
def test_a_run_that_ends_where_it_was_stopped_looks_at_its_last_step(
  config, curve, tmp_path, monkeypatch, capsys, every
):
  curve[3] = 40.0  # More than step 2 has.
  config.eval.translate_every, config.eval.every = every, 2
  with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
    _dying(m, *_saved(3))
    run_lib.run(config, tmp_path)
  config.train.max_steps = 3
  with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
    _dying(m, validation, 'evaluate_last', lambda *_: True)
    run_lib.run(config, tmp_path)
  lines = folders.metrics(tmp_path)
  assert lines[-1].keys() >= {'valid_loss', *['valid_chrf'] * bool(every)}
  run_lib.run(config, tmp_path)
  assert folders.metrics(tmp_path) == lines  # Once is enough.
  # The checkpoint was there before its chrF, and it is said.
  best = 2 if every else 3
  assert _scored(tmp_path) == {'valid': {'before': 0, 'after': best}}
  assert checkpoint.find_step(tmp_path)[0] == best
  assert ('step 3 was saved before its chrF' in capsys.readouterr().out) == (
    every > 0
  )


def test_a_finished_run_is_asked_for_the_test_split(finished, tmp_path, capsys):
  config = finished[0].copy_and_resolve_references()
  config.eval.test = False
  run_lib.run(config, tmp_path)
  config.eval.test = True
  capsys.readouterr()
  run_lib.run(config, tmp_path)
  out = capsys.readouterr().out
  assert 'translated test (before, step 0)' in out
  assert 'translated valid' not in out
  folders.assert_same_run(finished[1], tmp_path)


def test_other_translations_in_the_folder_are_not_taken_for_its_own(
  plain, plain_copy
):
  """A folder without a checkpoint is anybody's."""
  config, folder = plain_copy
  shutil.rmtree(folder / 'checkpoints')
  for when in ('before', 'after'):
    path = folder / 'translations' / f'valid.{when}.txt'
    made = files.read_json(path.with_suffix('.json'))
    del made['texts']
    cached.write(path, made, (['of', 'another', 'model'], []))
  evaluated = folder / 'evaluation' / 'test.json'
  files.write_json(evaluated, {'of': 'another model'})
  run_lib.run(config, folder)
  assert not evaluated.exists()
  folders.assert_same_run(plain[1], folder)


def test_no_checkpoint_is_the_best(plain, tmp_path):
  folder = plain[1]
  assert checkpoint.find_step(folder) == (6, 'step 6, the last')
  for call in (
    lambda: checkpoint.find_step(folder, 'best'),
    lambda: evaluate.evaluate(folder, evaluate.Text('valid'), 'best'),
    lambda: export.from_run(
      'hf', folder, tmp_path / 'x', 'float32', False, 'best'
    ),
  ):
    refusal(call, folder, 'eval.translate_every', 'last or one of 4, 6')
  refusal(lambda: checkpoint.find_step(folder, 'bst'), "'bst'", 'best')


def test_texts_learned_by_heart_have_the_loss_of_validation(
  config, curve, tmp_path
):
  """Validation on the very training pairs: two names of one number."""
  texts = tmp_path / 'x.tsv'
  texts.write_text(''.join(f'{i} the cat\tle chat {i}\n' for i in range(9)))
  config.data.source = config.data.valid = str(texts)
  config.eval.translate_every = config.eval.loss_pairs = 0
  config.eval.minitrain_pairs = 100
  config.train.max_steps = 3
  run_lib.run(config, tmp_path / 'w')
  lines = [m for m in folders.metrics(tmp_path / 'w') if 'valid_loss' in m]
  assert [m['step'] for m in lines] == [0, 3]
  for m in lines:
    assert m['minitrain_loss'] == m['valid_loss']
