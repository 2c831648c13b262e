"""Whole runs of the debug model: what they leave, and what kills them."""

import json
import subprocess

import pytest

from mt.base import errors
from mt.base import journal
from mt.base import run_folder
from mt.data import corpus
from mt.evaluate import cached
from mt.train import checkpoint
from mt.train import components
from mt.train import loop
from mt.train import machine
from mt.train import run as run_lib
from mt.train import step
from mt.train import validation
from mt.translate import __main__ as terminal
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.runs import small
from tests.translate.test_terminal import VALUES


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
  references = folder / 'translations' / 'valid.reference.txt'
  found = references.read_bytes()
  references.write_text('As it was before it was corrected.\n')
  run_lib.run(config, folder)
  assert (folder / 'metrics.jsonl').read_bytes() == before
  assert references.read_bytes() == found
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

  monkeypatch.setattr(validation.scores, 'chrf', chrf)
  pairs = corpus.read_splits(finished[0].data, ['valid'])['valid'][0].read()
  run = _Stub(finished[0], folder, pairs[:3])
  assert validation.chrf(run, _Stub.State(0)) == 5.0
  run.config.eval.chrf_pairs = 0
  validation.chrf(run, _Stub.State(0))
  assert [len(texts) for texts, _ in seen] == [2, 3]
  assert seen[1][0] == before and seen[0][0] == before[:2]
  assert seen[1][1] == [p.target for p in pairs[:3]]
  assert not any('valid_chrf' in m for m in folders.metrics(plain[1]))


class _Stub:
  """Of a run, what validation.chrf reads at step 0."""

  of_chrf = components.Run.of_chrf

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
    validation,
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
    found = loop.what_is_due(config, at, first, asked)
    return ' '.join(name for name, now in found._asdict().items() if now)

  assert due(0) == due(0, asked=15) == 'evaluate translate'
  assert due(1) == due(3) == ''
  assert due(1, asked=15) == 'save'
  assert due(4) == 'evaluate'
  assert due(5) == 'save'
  assert due(6) == 'evaluate translate save'
  assert due(6, first=6) == due(6, first=6, asked=2) == ''
  assert due(12, asked=15) == 'evaluate translate save'
  assert due(12, first=12) == ''
  config.eval.translate_every = 0
  assert due(6) == ''
  assert due(12) == 'evaluate save'


def test_a_first_short_try_simply_runs(debug_config, tmp_path, capsys):
  """What has no effect is a note: warm-up, pairs for chrF, patience."""
  debug_config.train.max_steps, debug_config.optim.warmup_steps = 1, 10
  debug_config.eval.chrf_pairs, debug_config.eval.patience = 2, 4
  run_lib.run(debug_config, tmp_path)
  assert capsys.readouterr().out.count('note: ') == 3
  assert folders.steps(tmp_path) == [1]


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
    folders.command(tmp_path, flag), capture_output=True, text=True, timeout=60
  )
  assert done.returncode in (1, 2)
  assert done.stderr.count('\n') == 1, done.stderr
  for word in words:
    assert word in done.stderr


def test_a_start_that_failed_claims_nothing(debug_config, tmp_path):
  debug_config.data.length = 8  # Nothing fits.
  refusal(lambda: run_lib.run(debug_config, tmp_path), 'data.length')
  assert (tmp_path / 'tokenizer.model').exists()
  debug_config.data.length = 128
  run_folder.claim(tmp_path, debug_config)
  assert not (tmp_path / 'tokenizer.model').exists()


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


def test_remembered_translations_are_of_what_decides_them(
  debug_config, tmp_path, monkeypatch
):
  """The same English may have to become German, with the same template.

  And 4 bits are those of the matrices that are frozen.
  """

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
  for pair, frozen, parts in (
    ('en-fr', 'int4', 'lora'),
    ('en-de', 'int4', 'lora'),
    ('en-fr', 'int4', 'layers/(q|k)'),
    ('en-fr', 'float32', 'lora'),
    ('en-fr', 'float32', 'layers/(q|k)'),
  ):
    debug_config.data.pair = pair
    debug_config.train.update(frozen_dtype=frozen, parts=parts)
    with pytest.raises(Seen) as e:
      run_lib.run(debug_config, tmp_path / f'w{len(keys)}')
    keys.append(str(e.value))
  assert len({*keys}) == 4 and keys[3] == keys[4]
