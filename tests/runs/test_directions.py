"""A run with several directions: data.pair='en-fr,fr-en'."""

import shutil

import pytest

from mt.base import files
from mt.evaluate import __main__ as evaluate
from mt.evaluate import comparison
from mt.evaluate import report
from mt.evaluate import scores as scores_lib
from mt.train import run as run_lib
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.runs import small

DIRECTIONS = ('en-fr', 'fr-en')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  config, folder = small.get_config(), tmp_path_factory.mktemp('run') / 'run'
  config.data.pair = ','.join(DIRECTIONS)
  config.train.max_steps = config.eval.translate_every = 2
  config.eval.texts = ('Hello!',)
  run_lib.run(config, folder)
  return folder


def _texts(run, direction, name):
  path = run / 'translations' / f'valid-{direction}.{name}.txt'
  return files.read_lines(path)


def test_each_direction_is_scored_and_all_together(run):
  found = folders.scores(run)
  assert list(found) == ['valid-en-fr', 'valid-fr-en', 'valid']
  parts = [found[f'valid-{d}']['before']['chrf'] for d in DIRECTIONS]
  assert found['valid']['before']['chrf'] == round(sum(parts) / 2, 2) > 0
  assert found['valid']['after']['sentences'] == 6
  # The sample, read turned round.
  assert _texts(run, 'en-fr', 'source') == _texts(run, 'fr-en', 'reference')
  assert (run / 'translations' / 'texts-fr-en.after.txt').exists()
  page = (run / 'report.html').read_text()
  assert page.count('<h2>Sentences: valid-') == 2
  assert 'mean of 2 directions' in page


def test_the_curve_is_the_mean_of_the_directions(run):
  chrf = [
    scores_lib.chrf(_texts(run, d, 'before'), _texts(run, d, 'reference'))
    for d in DIRECTIONS
  ]
  first = next(m for m in folders.metrics(run) if 'valid_chrf' in m)
  assert first['step'] == 0
  assert first['valid_chrf'] == sum(chrf) / 2 > 0


def test_directions_are_compared(run, tmp_path):
  other = shutil.copytree(run, tmp_path / 'other')
  path = other / 'translations' / 'valid-fr-en.after.txt'
  files.write_lines(path, ['one', 'two', 'three'])
  page = comparison.page([run, other])
  assert 'valid-en-fr: other against run' in page
  assert 'Sentences: valid-fr-en' in page


def test_evaluate_takes_one_direction(run, tmp_path, monkeypatch):
  run = shutil.copytree(run, tmp_path / 'run')
  made = []

  def translate(folder, step, name, sources, pair):
    made.append((name, pair, sources[0]))
    return sources, []

  monkeypatch.setattr(evaluate, '_translate', translate)
  found = evaluate.evaluate(run, evaluate.Text('valid', pair='fr-en'))
  own = folders.scores(run)['valid-fr-en']['after']
  assert found['scores']['chrf'] == own['chrf'] and made == []
  assert (run / 'evaluation' / 'valid-fr-en.json').exists()
  noisy = evaluate.evaluate(run, evaluate.Text('valid', 'fr-en', noise=1.0))
  assert noisy['text'] == 'valid-fr-en, noise 1'
  ((name, _, source),) = made
  assert name == 'valid-fr-en-noise100'
  assert source != _texts(run, 'fr-en', 'source')[0]
  assert (run / 'evaluation' / f'{name}.json').exists()
  assert 'valid-fr-en, noise 1' in report.page(run)
  refusal(
    lambda: evaluate.evaluate(run, evaluate.Text('valid', 'en-ja')),
    "--pair is 'en-ja'",
  )
  text = evaluate.Text('valid')
  refusal(lambda: evaluate.evaluate(run, text), 'en-fr, fr-en')
  text = tmp_path / 'x.tsv'
  text.write_text('chat\tcat\n')
  evaluate.evaluate(
    run, evaluate.Text('valid', 'fr-en', data={'valid': str(text)})
  )
  assert made[-1][1:] == ('fr-en', 'chat')  # As it stands, not turned round.
