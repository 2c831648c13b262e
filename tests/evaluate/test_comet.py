"""COMET, with a tiny random checkpoint of its real class."""

import pathlib
import re
import subprocess

import numpy as np
import pytest

from mt.evaluate import __main__ as evaluate
from mt.evaluate import comet
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ['ngl 😂 this is fine', 'who are you', 'the cat']
REFERENCES = ['c’est 😂 bien', 'qui es-tu ?', 'le chat']
MADE = ['c’est bien', 'qui êtes-vous ?', 'le chat dort']


@pytest.mark.comet
def test_scores_are_those_of_its_own_command(tmp_path):
  texts = {'source': SOURCES, 'reference': REFERENCES, 'hypothesis': MADE}
  for name, lines in texts.items():
    path = tmp_path / f'valid.{name}.txt'
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  program = ROOT / 'tests' / 'fixtures' / 'tiny_comet.py'
  source = tmp_path / 'valid.source.txt'
  subprocess.run([comet.find(), program, tmp_path, source], check=True)
  model = str(tmp_path / 'checkpoints' / 'model.ckpt')
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
  own = evaluate.Evaluated('valid', ('en', 'fr'), 1, [], [], [])
  result = {'scores': {}, 'against': {'scores': {}}}
  evaluate.add_comet(result, 'm', own, own)
  assert result['scores']['comet'] == got['score']
  row = result['against']['scores']['comet']
  assert row['score'] == got['score'] and row['baseline'] == got['baseline']
