"""COMET, with a tiny random checkpoint of its real class."""

import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from mt.base import errors
from mt.evaluate import __main__ as evaluate
from mt.evaluate import comet
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ['ngl 😂 this is fine', 'who are you', 'the cat']
REFERENCES = ['c’est 😂 bien', 'qui es-tu ?', 'le chat']
MADE = ['c’est bien', 'qui êtes-vous ?', 'le chat dort']


def _checkpoint(folder, kind, texts):
  """The path of a tiny random model."""
  source = folder / 'valid.source.txt'
  source.write_text('\n'.join(texts) + '\n', encoding='utf-8')
  program = ROOT / 'tests' / 'fixtures' / 'tiny_comet.py'
  subprocess.run([comet.find(), program, folder, source, kind], check=True)
  return str(folder / 'checkpoints' / 'model.ckpt')


@pytest.mark.comet
def test_scores_are_those_of_its_own_command(tmp_path):
  model = _checkpoint(tmp_path, 'regression_metric', SOURCES)
  for name, lines in ('reference', REFERENCES), ('hypothesis', MADE):
    path = tmp_path / f'valid.{name}.txt'
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  scores, signature = comet.segments(model, SOURCES, MADE, REFERENCES)
  assert signature == f'model:{model}|version:2.2.7'
  assert scores.shape == (3,) and np.ptp(scores) > 1
  # What mt.evaluate leaves in evaluation/ is what the command reads.
  names = ('-s', 'source'), ('-t', 'hypothesis'), ('-r', 'reference')
  flags = [x for o, n in names for x in (o, tmp_path / f'valid.{n}.txt')]
  command = comet.find().with_name('comet-score')
  done = subprocess.run(
    [command, *flags, '--model', model, '--gpus', '0'],
    capture_output=True,
    text=True,
    check=True,
  )
  found = [float(x) for x in re.findall(r'score: (-?[\d.]+)', done.stdout)]
  # It computes in float16.
  np.testing.assert_allclose(scores / 100, found[:3], atol=2e-3)
  assert scores.mean() / 100 == pytest.approx(found[-1], abs=2e-3)
  refusal(lambda: comet.segments(f'{model}x', *[SOURCES] * 3), '--comet', model)


@pytest.mark.comet
def test_expected_scores_are_those_of_all_pairs(tmp_path):
  model = _checkpoint(tmp_path, 'regression_metric', SOURCES)
  candidates = [[*MADE, MADE[0]], REFERENCES[:1], ['', 'le chat', 'le chat']]
  with comet.expected(model) as expected:
    found = expected(SOURCES, candidates)
    # A second request of the same process, as texts come through a pipe.
    again = expected(SOURCES[:1], candidates[:1])
  np.testing.assert_allclose(again[0], found[0], atol=1e-3)
  for source, texts, scores in zip(SOURCES, candidates, found, strict=True):
    pairs = [(source, text, ref) for text in texts for ref in texts]
    every, _ = comet.segments(model, *zip(*pairs, strict=True))
    want = every.reshape(len(texts), -1).mean(1)
    np.testing.assert_allclose(scores, want, atol=1e-3)
  assert np.ptp(found[0]) > 0.5 and found[0][0] == found[0][3]


@pytest.mark.comet
def test_other_models_have_no_expected_scores(tmp_path):
  model = _checkpoint(tmp_path, 'unified_metric', SOURCES)
  assert comet.segments(model, SOURCES, MADE, REFERENCES)[0].shape == (3,)
  refusal(comet.expected(model).__enter__, model, 'is a unified_metric')


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Puts in the place of COMET what says what it is, and then does this."""

  def put(then):
    path = tmp_path / 'program.py'
    about = '{"version": "1", "kind": "regression_metric"}'
    path.write_text(f"import sys\nprint('{about}', flush=True)\n{then}\n")
    monkeypatch.setattr(comet, 'PYTHON', pathlib.Path(sys.executable))
    monkeypatch.setattr(comet, '_PROGRAM', path)

  return put


@pytest.mark.parametrize(
  'then, words',
  [
    ('sys.exit("no memory")', 'no memory'),  # Before anything is asked.
    ('sys.stdin.readline(); sys.exit("no memory")', 'no memory'),
    ('sys.stdin.readline(); print(\'{"scores": [[NaN]]}\')', 'no number'),
    ('sys.stdin.readline(); print(\'{"scores": [[0.5]]}\')', ''),
  ],
)
def test_a_process_that_ends(program, then, words):
  program(then)

  def ask():
    with comet.expected('m.ckpt') as expected:
      if 'readline' not in then:
        time.sleep(1)  # It is gone by then.
      return expected(['a'], [['b']])

  if words:
    refusal(ask, '--comet=m.ckpt', words)
  else:
    np.testing.assert_array_equal(ask(), [[50.0]])


def test_a_command_that_is_to_end_waits_for_no_answer(program):
  program('import time; time.sleep(30)')
  start = time.monotonic()
  with pytest.raises(errors.Interrupted), comet.expected('m.ckpt'):
    raise errors.Interrupted('terminated', 143)
  assert time.monotonic() - start < 20


def test_without_its_environment(tmp_path, monkeypatch):
  monkeypatch.setattr(comet, 'PYTHON', tmp_path / 'python')

  def score():
    evaluate.evaluate(tmp_path, evaluate.Text('valid'), comet_model='x')

  refusal(score, tmp_path / 'python', 'make comet')


def test_two_systems(monkeypatch):
  rng = np.random.default_rng(0)
  old = rng.normal(70, 10, 200)
  new = old + rng.normal(2, 4, 200)
  got = comet.compare(old, new, 'model:m|version:1')
  assert got['baseline'] == round(old.mean(), 2)
  assert got['score'] == round(new.mean(), 2)
  # Half of the 95 % interval of a mean: 1.96 standard errors.
  error = 1.96 * new.std(ddof=1) / len(new) ** 0.5
  assert got['interval'] == pytest.approx(error, rel=0.1)
  assert got['p'] < 0.01 < comet.compare(old, old[::-1], '')['p']
  assert comet.compare(old, old, '')['p'] == 1.0
  both = [(old, 'v'), (new, 'v')]
  monkeypatch.setattr(comet, 'segments', lambda *_: both.pop())
  own = evaluate.Evaluated('valid', ('en', 'fr'), 1, [], [], [], [])
  result = {'scores': {}, 'against': {'scores': {}}}
  evaluate.add_comet(result, 'm', own, own)
  assert result['scores']['comet'] == got['score']
  row = result['against']['scores']['comet']
  assert row['score'] == got['score'] and row['baseline'] == got['baseline']
