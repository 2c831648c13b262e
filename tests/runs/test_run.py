"""Whole runs of the debug model: what they leave, and what kills them."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from mt.base import errors
from mt.base import journal
from mt.base import run_folder
from mt.data import corpus
from mt.evaluate import cached
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import checkpoint
from mt.train import loop
from mt.train import machine
from mt.train import run as run_lib
from mt.train import step
from mt.translate import __main__ as terminal
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.runs import small
from tests.translate.test_terminal import VALUES

ROOT = folders.ROOT


def test_a_run_leaves_everything(finished):
  config, folder, said = finished
  lines = folders.metrics(folder)
  assert [m['step'] for m in lines if 'loss' in m] == [1, 2, 3, 4, 5, 6]
  validated = [m for m in lines if 'valid_loss' in m]
  assert [m['step'] for m in validated] == [0, 3, 6]
  assert all('minitrain_loss' in m for m in validated)
  curve = {m['step']: m['valid_chrf'] for m in lines if 'valid_chrf' in m}
  assert curve.keys() == {0, 6}
  scores = folders.scores(folder)
  assert scores.keys() == {'valid', 'test'}
  for split in scores.values():
    assert split.keys() == {'before', 'after'}
    for s in split.values():
      assert s['sentences'] == 3
      assert s.keys() >= {'bleu', 'bleu_intl', 'chrf', 'chrf_signature'}
      assert s['noise']['emoji'].keys() == {'sentences', 'chrf'}
  kept = run_folder.read_config(folder)
  # What was `auto` has its value.
  assert kept.to_dict() == machine.here(config).to_dict()
  assert said.startswith('machine: CPU, ') and '\nauto: dtype=float32 ' in said
  environment = json.loads((folder / 'environment.json').read_text())
  assert environment['packages']['jax']
  pairs = json.loads((folder / 'data.json').read_text())['pairs']
  assert pairs > 10 and f'{pairs:,} pairs' in said
  page = (folder / 'report.html').read_text('utf-8')
  assert 'step 6 of 6, done' in page and 'Sentences: test' in page
  assert 'key2">● minitrain' in page
  (events,) = (folder / 'tensorboard').iterdir()
  for name in (b'valid_chrf', b'minitrain_loss'):
    assert name in events.read_bytes()
  for word in ('best: step 6 of 6', ', minitrain ', 'valid chrf', 'before '):
    assert word in said
  assert f', chrF {curve[6]:.2f}, ' in said
  assert ' dropped (more than' in said


def test_the_same_command_again_shows_the_scores(finished_copy, capsys):
  config, folder = finished_copy
  before = (folder / 'metrics.jsonl').read_bytes()
  run_lib.run(config, folder)
  assert (folder / 'metrics.jsonl').read_bytes() == before
  out = capsys.readouterr().out
  assert 'valid chrf' in out and 'step 6/6' not in out


def test_the_curve_of_chrf_is_of_the_first_pairs(finished, plain, monkeypatch):
  """Of as many as are scored at the end, it is the same number."""
  _, folder, _ = finished
  before = (folder / 'translations/valid.before.txt').read_text().splitlines()
  seen = []

  def chrf(texts, references):
    seen.append((texts, references))
    return 5.0

  monkeypatch.setattr(loop.scores, 'chrf', chrf)
  pairs = corpus.read_splits(finished[0].data, ['valid'])['valid'][0].read()
  run = _Stub(finished[0], folder, pairs[:3])
  assert loop.valid_chrf(run, _Stub.State(0)) == 5.0
  run.config.eval.chrf_pairs = 0
  loop.valid_chrf(run, _Stub.State(0))
  assert [len(texts) for texts, _ in seen] == [2, 3]
  assert seen[1][0] == before and seen[0][0] == before[:2]
  assert seen[1][1] == [p.target for p in pairs[:3]]
  assert not any('valid_chrf' in m for m in folders.metrics(plain[1]))


class _Stub:
  """Of a run, what valid_chrf reads at step 0."""

  class State:
    def __init__(self, at):
      self.at = at

  def __init__(self, config, folder, pairs):
    self.config = config.copy_and_resolve_references()
    self.folder = folder
    self.data = type('Data', (), {'scored': {'valid': pairs}})

  def translations(self, split, name):
    return self.folder / 'translations' / f'{split}.{name}.txt'


def _spy_steps(monkeypatch, see):
  """`see(state)` before each step."""
  real_make = step.make_train_step

  def make_train_step(*args, **kwargs):
    train_step = real_make(*args, **kwargs)

    def wrapped(state, batch):
      see(state)
      return train_step(state, batch)

    wrapped.lower = train_step.lower
    return wrapped

  monkeypatch.setattr(step, 'make_train_step', make_train_step)


def test_the_order_of_the_loop(debug_config, tmp_path, monkeypatch):
  """Evaluate, save, step, log; a step is logged once the next is under way.

  And the page is there before the first step.
  """
  events = []

  def spy(module, name, label):
    real = getattr(module, name)

    def wrapped(*args):
      text = label(*args)
      events.extend([text] if text else [])
      return real(*args)

    monkeypatch.setattr(module, name, wrapped)

  spy(
    loop,
    'evaluate',
    lambda run, state, translate: (
      f'evaluate {state.step}{" in words" * translate}'
    ),
  )
  spy(checkpoint, 'save', lambda m, state, *_: f'save {state.step}')
  spy(
    journal,
    'add_metrics',
    lambda path, line: f'log {line["step"]}' if 'loss' in line else None,
  )

  def see(state):
    events.append(f'step {int(state.step) + 1}')
    if events == ['evaluate 0 in words', 'step 1']:
      page = (tmp_path / 'report.html').read_text('utf-8')
      assert 'step 0 of 5, running' in page

  _spy_steps(monkeypatch, see)
  debug_config.train.max_steps = 5
  debug_config.eval.every, debug_config.checkpoint.every = 3, 4
  debug_config.eval.translate_every = 2
  run_lib.run(debug_config, tmp_path)
  assert ', '.join(events) == (
    'evaluate 0 in words, step 1, step 2, log 1, log 2, evaluate 2 in words, '
    'save 2, step 3, log 3, evaluate 3, step 4, log 4, evaluate 4 in words, '
    'save 4, step 5, log 5, evaluate 5 in words, save 5'
  )


def test_what_is_due():
  """At 6 of 12 steps, each thing alone; at the end all; at a resume nothing."""
  config = small.get_config()
  config.train.max_steps = 12
  config.eval.every, config.checkpoint.every = 4, 5
  config.eval.translate_every = 6

  def due(at, first=0, asked=0):
    found = loop.schedule(config, at, first, asked)
    names = [k for k in ('evaluate', 'translate', 'save') if getattr(found, k)]
    return ' '.join(names), found.leave

  assert due(0) == ('evaluate translate', 0)
  assert due(0, asked=15) == ('evaluate translate', 15)
  assert due(1) == due(3) == ('', 0)
  assert due(1, asked=15) == ('save', 15)
  assert due(4) == ('evaluate', 0)
  assert due(5) == ('save', 0)
  assert due(6) == ('evaluate translate save', 0)
  assert due(6, first=6) == ('', 0)
  assert due(6, first=6, asked=2) == ('', 2)
  assert due(12, asked=15) == ('evaluate translate save', 0)
  assert due(12, first=12) == ('', 0)
  config.eval.translate_every = 0
  assert due(6) == ('', 0)
  assert due(12) == ('evaluate save', 0)


def _die_after(monkeypatch, at):
  """KeyboardInterrupt once the loss of step `at` is logged."""
  real = journal.add_metrics

  def add_then_die(path, line):
    real(path, line)
    if line['step'] == at and 'loss' in line:
      raise KeyboardInterrupt

  monkeypatch.setattr(journal, 'add_metrics', add_then_die)


def _interrupted(config, folder, at):
  """A run that dies after a step and is started again."""
  with pytest.MonkeyPatch.context() as patch:
    _die_after(patch, at)
    with pytest.raises(KeyboardInterrupt):
      run_lib.run(config, folder)
  run_lib.run(config, folder)


@pytest.mark.parametrize('stop', [5, pytest.param(1, marks=pytest.mark.heavy)])
def test_an_interrupted_run_goes_on_bit_for_bit(finished, tmp_path, stop):
  """And with the programs of the whole run: none is compiled anew."""
  config, whole, _ = finished
  compiled = []

  def hear(event, **_):
    compiled.extend([event] if event.endswith('/cache_misses') else [])

  jax.monitoring.register_event_listener(hear)
  _interrupted(config, tmp_path, stop)
  jax.monitoring.unregister_event_listener(hear)
  assert not compiled
  folders.assert_same_run(whole, tmp_path)


def test_so_does_one_of_lora_in_four_bits_without_packing(
  debug_config, tmp_path
):
  debug_config.train.parts, debug_config.data.packing = 'lora', False
  debug_config.train.frozen_dtype = 'int4'
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path / 'whole')
  _interrupted(debug_config, tmp_path / 'cut', 3)
  folders.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def _command(workdir, *flags):
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT}/tests/runs/small.py',
    f'--workdir={workdir}',
    *flags,
  ]


def _stop_at(workdir, flags, at, sent):
  """Starts the command, sends a signal once a step is logged; its exit code."""
  process = subprocess.Popen(
    _command(workdir, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  deadline = time.monotonic() + 120
  path = workdir / 'metrics.jsonl'
  while not (path.exists() and f'"step": {at},' in path.read_text()):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(sent)
  return process.wait(), process.stderr.read().decode()


def test_killed_twice_and_the_same_command_again(debug_config, tmp_path):
  """A process of its own each time, and the end of one that ran here."""
  debug_config.train.max_steps, debug_config.eval.every = 20, 10
  run_lib.run(debug_config, tmp_path / 'whole')
  cut = tmp_path / 'cut'
  flags = '--config.train.max_steps=20', '--config.eval.every=10'
  code, text = _stop_at(cut, flags, 3, signal.SIGINT)
  assert code == 130 and text.count('\n') == 1 and 'interrupted' in text
  at = int(re.search(r'at step (\d+), which is saved', text)[1])
  assert at == folders.steps(cut)[-1]
  code, _ = _stop_at(cut, flags, max(7, at + 1), signal.SIGKILL)
  assert code == -signal.SIGKILL
  done = subprocess.run(
    _command(cut, *flags), check=True, capture_output=True, text=True
  )
  assert 'resumed' in done.stdout
  folders.assert_same_run(tmp_path / 'whole', cut)


def test_a_first_short_try_simply_runs(debug_config, tmp_path, capsys):
  """What has no effect is a note: warm-up, pairs for chrF, patience."""
  debug_config.train.max_steps, debug_config.optim.warmup_steps = 1, 10
  debug_config.eval.chrf_pairs, debug_config.eval.patience = 2, 4
  run_lib.run(debug_config, tmp_path)
  assert capsys.readouterr().out.count('note: ') == 3
  assert folders.steps(tmp_path) == [1]


def test_more_steps_go_on_from_the_last(plain_copy, capsys):
  config, folder = plain_copy
  config.train.max_steps = 5
  before = (folder / 'config.json').read_bytes()
  refusal(lambda: run_lib.run(config, folder), 'at step 6', 'max_steps=5')
  assert (folder / 'config.json').read_bytes() == before
  config.train.max_steps, config.eval.every = 8, 4
  run_lib.run(config, folder)
  lines = folders.metrics(folder)
  assert [m['step'] for m in lines if 'loss' in m] == list(range(1, 9))
  assert folders.scores(folder)['valid']['after']['step'] == 8
  out = capsys.readouterr().out
  assert 'changed: eval.every=4 (was 3), train.max_steps=8 (was 6); the' in out
  assert 'rate jumps' not in out


def test_translate_reads_the_last_checkpoint(plain, tmp_path):
  _, folder, _ = plain
  given = str(folder / 'translations' / 'valid.source.txt')
  flags = {'workdir': folder, 'input': given, 'output': str(tmp_path / 'x')}
  terminal.run(VALUES | flags)
  after = (folder / 'translations' / 'valid.after.txt').read_bytes()
  assert (tmp_path / 'x').read_bytes() == after


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--config.optim.learning_rat=1', ('did you mean optim.learning_rate',)),
    ('--config.train.max_steps=1.5', ('train.max_steps', "'1.5'")),
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


def test_a_folder_of_another_run_is_refused(finished_copy):
  config, folder = finished_copy
  config.optim.learning_rate = 0.5
  refusal(
    lambda: run_lib.run(config, folder), folder, 'learning_rate=0.01', '0.5'
  )


def test_a_start_that_failed_claims_nothing(debug_config, tmp_path):
  debug_config.data.length = 8  # Nothing fits.
  refusal(lambda: run_lib.run(debug_config, tmp_path), 'data.length')
  assert (tmp_path / 'tokenizer.model').exists()
  debug_config.data.length = 128
  run_folder.claim(tmp_path, debug_config)
  assert not (tmp_path / 'tokenizer.model').exists()


def test_a_checkpoint_of_another_model_is_refused(plain_copy, monkeypatch):
  # The same name, other weights: only the fingerprint tells them apart.
  config, folder = plain_copy
  real = parameters.init
  with monkeypatch.context() as patch:
    patch.setattr(
      parameters, 'init', lambda cfg, key: real(cfg, jax.random.key(99))
    )
    refusal(lambda: run_lib.run(config, folder), folder, 'fingerprint')
  other = dataclasses.replace(sizes.SIZES['debug'], num_layers=2)
  monkeypatch.setitem(sizes.SIZES, 'debug', other)
  refusal(lambda: run_lib.run(config, folder), folder, 'num_layers')


def test_other_data_is_refused(debug_config, tmp_path):
  data = tmp_path / 'data'
  for split, n in (('train', 40), ('valid', 5)):
    (data / split).mkdir(parents=True)
    name = f'{split}/{split}.en-fr.tsv'
    text = (corpus.SAMPLE / name).read_text(encoding='utf-8')
    lines = text.splitlines(keepends=True)[:n]
    (data / name).write_text(''.join(lines), encoding='utf-8')
  debug_config.data.source = str(data)
  debug_config.train.max_steps = 1
  run_lib.run(debug_config, tmp_path / 'w')
  path = data / 'train' / 'train.en-fr.tsv'
  path.write_text(path.read_text('utf-8').upper(), encoding='utf-8')
  refusal(
    lambda: run_lib.run(debug_config, tmp_path / 'w'), path, 'has changed'
  )


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
  with pytest.raises(errors.UserError) as e:
    run_lib.run(debug_config, tmp_path / 'w')
  for word in words:
    assert word in str(e.value)


def test_a_workdir_that_cannot_be_written(debug_config, tmp_path):
  (tmp_path / 'file').write_text('')
  refusal(
    lambda: run_lib.run(debug_config, tmp_path / 'file' / 'w'), '--workdir'
  )


def test_remembered_translations_are_of_one_pair_of_languages(
  debug_config, tmp_path, monkeypatch
):
  """The same English may have to become German, with the same template."""

  class Seen(Exception):
    """All that this test needs."""

  def see(key, make):
    raise Seen(repr(key))

  monkeypatch.setattr(cached, 'cached', see)
  texts = tmp_path / 'x.tsv'
  sample = (corpus.SAMPLE / 'train' / 'train.en-fr.tsv').read_text('utf-8')
  texts.write_text('\n'.join(sample.split('\n')[:30]), 'utf-8')
  debug_config.data.source = debug_config.data.valid = str(texts)
  keys = []
  for pair in ('en-fr', 'en-de'):
    debug_config.data.pair = pair
    with pytest.raises(Seen) as e:
      run_lib.run(debug_config, tmp_path / pair)
    keys.append(str(e.value))
  assert keys[0] != keys[1]


# Run folders of older versions, and what a resume may change.


def _started(folder, config):
  """As if a run had got to its first checkpoint."""
  run_folder.claim(folder, config)
  (folder / 'checkpoints' / 'step_1').mkdir(parents=True)


def test_what_a_resume_may_change(debug_config, tmp_path):
  _started(tmp_path, debug_config)
  debug_config.data.max_bad_fraction, debug_config.train.max_skipped = 0.5, 3
  run_folder.claim(tmp_path, debug_config)
  debug_config.data.length += 1
  refusal(lambda: run_folder.claim(tmp_path, debug_config), 'data.length')


def test_a_run_of_a_gpu_goes_on_here_if_its_formats_are_asked_for(tmp_path):
  config = small.get_config()
  _started(tmp_path, machine.resolve(config, 'gpu', 'NVIDIA L4', 10**10))
  refusal(
    lambda: run_folder.claim(tmp_path, machine.here(config)),
    "train.dtype='bfloat16'",
    '--config.train.dtype=bfloat16',
  )
  config.train.update(dtype='bfloat16', frozen_dtype='bfloat16')
  run_folder.claim(tmp_path, machine.here(config))  # Remat and tiles are free.


def test_what_is_compared_by_chrf_stays_the_same(debug_config, tmp_path):
  config = debug_config
  config.eval.translate_every = 2
  _started(tmp_path, config)

  def again(**values):
    config.update_from_flattened_dict(
      {k.replace('_', '.', 1): v for k, v in values.items()}
    )
    run_folder.claim(tmp_path, config)

  again(eval_patience=3, eval_every=7, decode_batch_size=2)
  refusal(lambda: again(eval_chrf_pairs=1), tmp_path, 'eval.chrf_pairs=0')
  config.eval.chrf_pairs = 0
  refusal(lambda: again(decode_beam=2), tmp_path, 'decode.beam=1')
  config.decode.beam = 1
  # Where there is nothing to compare they may change.
  again(eval_translate_every=0)
  again(eval_chrf_pairs=1, decode_beam=2)


def test_knobs_that_are_no_more_are_passed_over(debug_config, tmp_path):
  _started(tmp_path, debug_config)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  config['data'] |= {'workers': 2, 'max_wait': 9.0}
  path.write_text(json.dumps(config))
  assert run_folder.read_config(tmp_path) == debug_config
  run_folder.claim(tmp_path, debug_config)
