"""Whole runs of the debug model: what they leave, and what kills them."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mt.train import checkpoint
from mt.data import corpus
from mt.base import errors
from mt.evaluate import __main__ as evaluate
from mt.base import journal
from mt.train import loop
from mt.train import manifest
from mt.gemma import sizes
from mt.train import step
from mt.train import training
from mt.train import validation
from mt.base import run_folder
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]


def _metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(x) for x in lines]


def _timeless(workdir):
  """Everything in metrics.jsonl but the speed."""
  return [
    {k: v for k, v in m.items() if k not in ('targets_per_s', 'data_wait_s')}
    for m in _metrics(workdir)
  ]


def _parameters(workdir):
  with checkpoint.open_manager(workdir) as manager:
    args = ocp.args.Composite(trained=ocp.args.StandardRestore())
    read = manager.restore(manager.latest_step(), args=args)
    return {k: np.asarray(v) for k, v in read.trained.items()}


def _assert_same_run(one, other):
  assert _timeless(one) == _timeless(other)
  a, b = _parameters(one), _parameters(other)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
  steps = [sorted((d / 'checkpoints').glob('step_*')) for d in (one, other)]
  assert [p.name for p in steps[0]] == [p.name for p in steps[1]]
  for name in ('scores.json', 'samples.txt', 'translations/valid.after.txt'):
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_leaves_everything(debug_config, tmp_path, capsys):
  debug_config.eval.test = True
  debug_config.eval.translate_every, debug_config.eval.chrf_pairs = 6, 2
  debug_config.eval.minitrain_pairs = 4
  loop.run(debug_config, tmp_path)
  steps = [m['step'] for m in _metrics(tmp_path) if 'loss' in m]
  assert steps == [1, 2, 3, 4, 5, 6]
  validated = [m['step'] for m in _metrics(tmp_path) if 'valid_loss' in m]
  assert validated == [0, 3, 6]
  scores = json.loads((tmp_path / 'scores.json').read_text())
  assert scores.keys() == {'valid', 'test'}
  for split in scores.values():
    assert split.keys() == {'before', 'after'}
    for s in split.values():
      assert s['sentences'] == 3
      assert s.keys() >= {'bleu', 'bleu_intl', 'chrf', 'chrf_signature'}
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['train']['max_steps'] == 6
  environment = json.loads((tmp_path / 'environment.json').read_text())
  assert environment['packages']['jax']
  assert scores['valid']['after']['noise']['emoji'].keys() == {
    'sentences',
    'chrf',
  }
  curve = [m['step'] for m in _metrics(tmp_path) if 'valid_chrf' in m]
  assert curve == [0, 6]
  assert all(
    'minitrain_loss' in m for m in _metrics(tmp_path) if 'valid_loss' in m
  )
  page = (tmp_path / 'report.html').read_text('utf-8')
  assert 'step 6 of 6, done' in page and 'Sentences: test' in page
  (events,) = (tmp_path / 'tensorboard').iterdir()
  for name in (b'valid_chrf', b'minitrain_loss'):
    assert name in events.read_bytes()
  assert 'key2">● minitrain' in page
  out = capsys.readouterr().out
  assert 'best: step 6 of 6' in out and ', minitrain ' in out
  assert f', chrF {_metrics(tmp_path)[-1]["valid_chrf"]:.2f}, ' in out
  assert 'valid chrf' in out and 'source ' in out and 'before ' in out
  assert '3 dropped' in out or ' dropped (more than' in out

  # The same command again: nothing is trained, the scores are shown again.
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  loop.run(debug_config, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert 'valid chrf' in capsys.readouterr().out


def test_the_curve_of_chrf_is_of_the_first_pairs(debug_config, tmp_path):
  debug_config.eval.chrf_pairs = debug_config.eval.translate_pairs = 3
  debug_config.eval.translate_every = debug_config.train.max_steps = 1
  loop.run(debug_config, tmp_path / 'on')
  scores = json.loads((tmp_path / 'on' / 'scores.json').read_text())['valid']
  assert [
    m['valid_chrf'] for m in _metrics(tmp_path / 'on') if 'valid_chrf' in m
  ] == [
    scores['before']['chrf'],
    scores['after']['chrf'],
  ]
  debug_config.eval.translate_every = debug_config.eval.chrf_pairs = 0
  loop.run(debug_config, tmp_path / 'off')
  assert not any('valid_chrf' in m for m in _metrics(tmp_path / 'off'))


def test_the_page_is_there_before_the_end(debug_config, tmp_path, monkeypatch):
  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(training, 'train', stop)
  with pytest.raises(KeyboardInterrupt):
    loop.run(debug_config, tmp_path)
  assert 'step 0 of 6, running' in (tmp_path / 'report.html').read_text('utf-8')


def test_the_order_of_the_loop(debug_config, tmp_path, monkeypatch):
  """Evaluate, save, step, log; a step is logged once the next is under way."""
  events = []

  def spy(module, name, label):
    real = getattr(module, name)

    def wrapped(*args):
      text = label(*args)
      events.extend([text] if text else [])
      return real(*args)

    monkeypatch.setattr(module, name, wrapped)

  spy(
    validation,
    'validate',
    lambda run, fn, state, translating: (
      f'validate {state.step}{" in words" * translating}'
    ),
  )
  spy(checkpoint, 'save', lambda m, state, *_: f'save {state.step}')
  spy(
    journal,
    'add_metrics',
    lambda path, line: f'log {line["step"]}' if 'loss' in line else None,
  )
  real_make = step.make_train_step

  def make_train_step(*args, **kwargs):
    train_step = real_make(*args, **kwargs)

    def wrapped(state, batch):
      events.append(f'step {int(state.step) + 1}')
      return train_step(state, batch)

    wrapped.lower = train_step.lower
    return wrapped

  monkeypatch.setattr(step, 'make_train_step', make_train_step)
  debug_config.train.max_steps = 5
  debug_config.eval.every, debug_config.checkpoint.every = 3, 4
  debug_config.eval.translate_every = 2
  loop.run(debug_config, tmp_path)
  assert ', '.join(events) == (
    'validate 0 in words, step 1, step 2, log 1, log 2, validate 2 in words, '
    'save 2, step 3, log 3, validate 3, step 4, log 4, validate 4 in words, '
    'save 4, step 5, log 5, validate 5 in words, save 5'
  )
  events.clear()
  debug_config.eval.translate_every = 0
  loop.run(debug_config, tmp_path / 'off')
  assert ', '.join(events) == (
    'validate 0, step 1, step 2, log 1, step 3, log 2, log 3, validate 3, '
    'step 4, log 4, save 4, step 5, log 5, validate 5, save 5'
  )


@pytest.mark.parametrize(
  'parts, packing, stop',
  [
    pytest.param('all', True, 5, marks=pytest.mark.heavy),
    ('lora', False, 3),
    pytest.param('blocks', True, 1, marks=pytest.mark.heavy),
  ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
  debug_config, tmp_path, monkeypatch, parts, packing, stop
):
  debug_config.train.parts = parts
  debug_config.data.packing = packing
  loop.run(debug_config, tmp_path / 'whole')
  real = journal.add_metrics

  def add_then_die(path, line):
    real(path, line)
    if line['step'] == stop and 'loss' in line:
      raise KeyboardInterrupt

  monkeypatch.setattr(journal, 'add_metrics', add_then_die)
  with pytest.raises(KeyboardInterrupt):
    loop.run(debug_config, tmp_path / 'cut')
  monkeypatch.setattr(journal, 'add_metrics', real)
  loop.run(debug_config, tmp_path / 'cut')
  _assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def _command(workdir, *flags):
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT}/configs/debug.py',
    f'--workdir={workdir}',
    *flags,
  ]


def _stop_at(workdir, flags, step, sent):
  """Starts the command, sends a signal once `step` is logged; its exit code."""
  process = subprocess.Popen(
    _command(workdir, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  deadline = time.monotonic() + 120
  path = workdir / 'metrics.jsonl'
  while not (path.exists() and f'"step": {step},' in path.read_text()):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(sent)
  return process.wait(), process.stderr.read().decode()


def test_killed_twice_and_the_same_command_again(tmp_path):
  flags = ('--config.data.length=128', '--config.eval.translate_pairs=2')
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  subprocess.run(_command(whole, *flags), check=True, capture_output=True)
  code, text = _stop_at(cut, flags, 3, signal.SIGINT)
  assert code == 130 and text.count('\n') == 1 and 'interrupted' in text
  at = int(re.search(r'at step (\d+), which is saved', text)[1])
  assert at == manifest.steps(cut / 'checkpoints')[-1]
  code, _ = _stop_at(cut, flags, 7, signal.SIGKILL)
  assert code == -signal.SIGKILL
  done = subprocess.run(
    _command(cut, *flags), check=True, capture_output=True, text=True
  )
  assert 'resumed' in done.stdout
  _assert_same_run(whole, cut)


def test_more_steps_go_on_from_the_last(debug_config, tmp_path):
  debug_config.train.max_steps = 2
  loop.run(debug_config, tmp_path)
  debug_config.train.max_steps = 4
  loop.run(debug_config, tmp_path)
  assert [m['step'] for m in _metrics(tmp_path) if 'loss' in m] == [1, 2, 3, 4]


def test_translate_reads_the_last_checkpoint(debug_config, tmp_path):
  loop.run(debug_config, tmp_path)
  source = (tmp_path / 'translations' / 'valid.source.txt').read_text('utf-8')
  done = subprocess.run(
    [sys.executable, '-m', 'mt.translate', f'--workdir={tmp_path}'],
    input=source.encode(),
    cwd=ROOT,
    capture_output=True,
  )
  assert done.returncode == 0, done.stderr.decode()
  after = (tmp_path / 'translations' / 'valid.after.txt').read_bytes()
  assert done.stdout == after


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--config.optm.lr=1', ('optm', 'optim.{', 'learning_rate')),
    ('--config.optim.learning_rat=1', ('did you mean optim.learning_rate',)),
    ('--config.train.max_steps=1.5', ('train.max_steps', "'1.5'")),
    ('--config.train.max_steps=0', ('train.max_steps is 0', '1 or more')),
    ('--config.data.source=/nowhere', ('/nowhere', 'data.source')),
    ('--confg=x', ('confg', 'config')),
    ('rest', ("'rest'",)),
  ],
)
def test_bad_flags_end_in_one_line(tmp_path, flag, words):
  done = subprocess.run(
    _command(tmp_path, flag), capture_output=True, text=True, timeout=60
  )
  assert done.returncode in (1, 2)
  assert done.stderr.count('\n') == 1, done.stderr
  for word in words:
    assert word in done.stderr


def _refused(config, workdir):
  with pytest.raises(errors.UserError) as e:
    loop.run(config, workdir)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_a_folder_of_another_run_is_refused(debug_config, tmp_path):
  debug_config.train.max_steps = 1
  loop.run(debug_config, tmp_path)
  debug_config.optim.learning_rate = 0.5
  text = _refused(debug_config, tmp_path)
  assert 'optim.learning_rate=0.01' in text and '0.5' in text


def test_a_start_that_failed_claims_nothing(debug_config, tmp_path):
  debug_config.data.length = 8  # Nothing fits.
  assert 'data.length' in _refused(debug_config, tmp_path)
  assert (tmp_path / 'tokenizer.model').exists()
  debug_config.data.length = 128
  debug_config.train.max_steps = 1
  loop.run(debug_config, tmp_path)
  assert (tmp_path / 'scores.json').exists()


def test_a_checkpoint_of_another_model_is_refused(
  debug_config, tmp_path, monkeypatch
):
  debug_config.train.max_steps = 1
  loop.run(debug_config, tmp_path)
  # The same name, other weights: only the fingerprint tells them apart.
  import jax

  from mt.gemma import model

  real = model.init_params
  monkeypatch.setattr(
    model, 'init_params', lambda cfg, key: real(cfg, jax.random.key(99))
  )
  assert 'fingerprint' in _refused(debug_config, tmp_path)
  monkeypatch.undo()
  import dataclasses

  other = dataclasses.replace(sizes.SIZES['debug'], num_layers=2)
  monkeypatch.setitem(sizes.SIZES, 'debug', other)
  assert 'num_layers' in _refused(debug_config, tmp_path)


def test_other_data_is_refused(debug_config, tmp_path):
  data = tmp_path / 'data'
  for split, n in (('train', 40), ('valid', 5)):
    (data / split).mkdir(parents=True)
    name = f'{split}/{split}.en-fr.tsv'
    text = (corpus.SAMPLE / name).read_text(encoding='utf-8')
    lines = text.splitlines(keepends=True)[:n]
    (data / name).write_text(''.join(lines), encoding='utf-8')
  debug_config.data.source = str(data)
  debug_config.train.max_steps = 2
  loop.run(debug_config, tmp_path / 'w')
  path = data / 'train' / 'train.en-fr.tsv'
  path.write_text(path.read_text('utf-8').upper(), encoding='utf-8')
  debug_config.train.max_steps = 4
  assert 'data' in _refused(debug_config, tmp_path / 'w')


@pytest.mark.parametrize(
  'content, words',
  [
    (None, ('cannot read',)),
    ('', ('no pair in it',)),
    ('1\tonly source\n1\ta\tb\n', ('1 more than 2 columns', 'line 2')),
    ('1\t' + 'word ' * 500 + '\tmot\n', ('none of its pairs', 'data.length')),
  ],
)
def test_bad_data_is_one_sentence(debug_config, tmp_path, content, words):
  for split in ('train', 'valid'):
    (tmp_path / split).mkdir()
    if content is not None:
      path = tmp_path / split / f'{split}.en-fr.tsv'
      path.write_text(content, encoding='utf-8')
  debug_config.data.source = str(tmp_path)
  text = _refused(debug_config, tmp_path / 'w')
  for word in words:
    assert word in text


def test_a_workdir_that_cannot_be_written(debug_config, tmp_path):
  (tmp_path / 'file').write_text('')
  assert '--workdir' in _refused(debug_config, tmp_path / 'file' / 'w')


def test_translate_without_a_run(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'mt.translate', f'--workdir={tmp_path}'],
    input=b'Hi\n',
    cwd=ROOT,
    capture_output=True,
  )
  assert done.returncode == 2
  assert done.stderr.decode().count('\n') == 1
  assert b'config.json' in done.stderr


def test_remembered_translations_are_of_one_pair_of_languages(
  debug_config, tmp_path, monkeypatch
):
  """The same English may have to become German, with the same template."""
  keys = []
  monkeypatch.setattr(
    evaluate, 'remember', lambda key, make: keys.append(key) or make()
  )
  debug_config.train.max_steps = 1
  texts = tmp_path / 'x.tsv'
  sample = (corpus.SAMPLE / 'train' / 'train.en-fr.tsv').read_text('utf-8')
  texts.write_text('\n'.join(sample.split('\n')[:30]), 'utf-8')
  debug_config.data.source = debug_config.data.valid = str(texts)
  for pair in ('en-fr', 'en-de'):
    debug_config.data.pair = pair
    loop.run(debug_config, tmp_path / pair)
  assert len(keys) == 2 and keys[0] != keys[1]


def test_a_run_goes_on_with_other_workers(debug_config, tmp_path):
  """Which the sentence about a worker that was killed advises."""
  run_folder.claim(tmp_path, debug_config)
  (tmp_path / 'checkpoints' / 'step_1').mkdir(parents=True)
  debug_config.data.workers, debug_config.data.max_bad_fraction = 2, 0.5
  run_folder.claim(tmp_path, debug_config)
  debug_config.data.length += 1
  refusal(lambda: run_folder.claim(tmp_path, debug_config), 'data.length')
