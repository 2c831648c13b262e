"""`python -m mt.evaluate` on a run of the debug model."""

import json
import pathlib
import shutil
import subprocess
import sys
import weakref

import jax
import pytest

from configs import debug
from mt.base import errors
from mt.base import files
from mt.data import corpus
from mt.evaluate import __main__ as evaluate
from mt.evaluate import cached
from mt.evaluate import comet
from mt.evaluate import report
from mt.evaluate import scores
from mt.train import run as run_lib
from mt.translate import translator
from tests.fixtures.refusal import refusal
from tests.runs import small

ROOT = pathlib.Path(__file__).parents[2]
VALID, TEST = evaluate.Text('valid'), evaluate.Text('test')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run that has scored valid and test."""
  config = small.get_config()
  config.train.max_steps = config.eval.every = 2
  config.eval.test = True
  folder = tmp_path_factory.mktemp('run') / 'finished'
  run_lib.run(config, folder)
  return folder


@pytest.fixture
def run(finished, tmp_path):
  """A copy, to be changed."""
  return shutil.copytree(finished, tmp_path / 'run')


def test_scores_are_left_before_comet_is_asked(run, monkeypatch):
  def fail(*_):
    raise errors.UserError('no memory.')

  monkeypatch.setattr(comet, 'find', lambda: None)
  monkeypatch.setattr(comet, 'segments', fail)
  refusal(lambda: evaluate.evaluate(run, VALID, comet_model='x'), 'no memory')
  assert 'chrf' in files.read_json(run / 'evaluation' / 'valid.json')['scores']


def _lines(run, name):
  return files.read_lines(run / f'{name}.txt')


def _change(path, change):
  value = files.read_json(path)
  change(value)
  files.write_json(path, value)


@pytest.fixture
def translations(monkeypatch):
  """Nothing is translated: the folders whose model would do it."""
  folders = []

  def translate(folder, step, split, sources, pair):
    folders.append(folder)
    return [f'made of {source}' for source in sources], [1]

  monkeypatch.setattr(evaluate, '_translate', translate)
  return folders


@pytest.mark.parametrize('split', ['valid', 'test'])
def test_what_the_run_translated_is_not_translated_again(
  run, translations, split
):
  got = evaluate.evaluate(run, evaluate.Text(split))
  assert translations == []
  after = _lines(run, f'translations/{split}.after')
  assert _lines(run, f'evaluation/{split}.hypothesis') == after
  own = files.read_json(run / 'scores.json')[split]['after']
  assert own.pop('step') == got['step'] == 2
  for key in ('noise', 'loops', 'cut_off'):
    assert got[key] == own.pop(key)
  assert got['scores'] == own and got['cut_off'] == [0, 1, 2]
  assert files.read_json(run / 'evaluation' / f'{split}.json') == got


def test_a_split_that_the_run_left_out_is_translated_once(run, monkeypatch):
  for file in (run / 'translations').glob('test.*'):
    file.rename(run / file.name)
  evaluate.evaluate(run, TEST)
  made = _lines(run, 'evaluation/test.hypothesis')
  assert made == _lines(run, 'test.after')
  assert len(set(made)) > 1 or made[0]
  assert _lines(run, 'evaluation/test.source') == _lines(run, 'test.source')
  reference = _lines(run, 'evaluation/test.reference')
  assert reference == _lines(run, 'test.reference')
  monkeypatch.delattr(evaluate, '_translate')
  evaluate.evaluate(run, TEST)


def test_the_weights_are_in_memory_once(run, monkeypatch):
  """As they are decoded with; the stacked ones are gone by then."""
  real, stacked = evaluate.checkpoint.load_finetuned, []

  def load(*args):
    *rest, params = real(*args)
    stacked.extend(map(weakref.ref, jax.tree.leaves(params['layers'])))
    return *rest, params

  def translate(self, params, texts, on_progress):
    assert len(stacked) > 5 and not any(x() is not None for x in stacked)
    return list(texts), []

  monkeypatch.setattr(evaluate.checkpoint, 'load_finetuned', load)
  monkeypatch.setattr(translator.Translator, 'translate', translate)
  assert evaluate._translate(run, 2, 'valid', ['a'], 'en-fr') == (['a'], [])


def _another_step(run):
  steps = run / 'checkpoints'
  shutil.copytree(steps / 'step_2', steps / 'step_3')


def _another_decoding(run):
  def change(config):
    config['decode']['max_extra'] = 4

  _change(run / 'config.json', change)


def _other_texts(run):
  def change(about):
    about['sources'] = 'other'

  _change(run / 'translations' / 'valid.after.json', change)


def _damaged(run):
  (run / 'translations' / 'valid.after.json').write_text('{"st')


def _an_older_run(run):
  (run / 'translations' / 'valid.after.json').unlink()


@pytest.mark.parametrize(
  'change',
  [_another_step, _another_decoding, _other_texts, _damaged, _an_older_run],
)
def test_translations_of_something_else_are_made_again(
  run, translations, change
):
  change(run)
  got = evaluate.evaluate(run, VALID)
  assert translations == [run]
  assert got['step'] == (3 if change is _another_step else 2)


def test_the_first_pairs(run, translations):
  before = {f: f.read_bytes() for f in (run / 'translations').iterdir()}
  got = evaluate.evaluate(run, evaluate.Text('valid', pairs=2))
  assert got['scores']['sentences'] == 2 and translations == [run]
  assert {f: f.read_bytes() for f in (run / 'translations').iterdir()} == before
  whole = corpus.read_splits(debug.get_config().data, ['valid'])['valid'][0]
  assert len(
    evaluate.translate_split(run, evaluate.Text('valid', pairs=0)).sources
  ) == len(whole)


def test_another_checkpoint_of_the_same_step_translates_anew(run, translations):
  text = evaluate.Text('valid', pairs=2)
  for _ in range(2):
    assert evaluate.evaluate(run, text)['cut_off'] == [1]
  assert translations == [run]
  path = run / 'checkpoints' / 'step_2' / 'manifest.json'
  path.write_text('{"of": [1, 2]}')
  evaluate.evaluate(run, text)
  assert translations == [run] * 2
  path.unlink()
  refusal(lambda: evaluate.evaluate(run, text), run, 'step 2 is damaged')


def test_two_runs_are_compared(run, translations, tmp_path):
  other = shutil.copytree(run, tmp_path / 'other')
  path = other / 'translations' / 'valid.after.txt'
  made = files.read_json(path.with_suffix('.json'))
  del made['texts']
  cached.write(path, made, (['une', 'deux', 'trois'], []))
  got = evaluate.evaluate(run, VALID, against=other)
  assert translations == []
  assert got['against'] == {
    'workdir': str(other),
    'step': 2,
    'scores': scores.compare(
      ['une', 'deux', 'trois'],
      _lines(run, 'translations/valid.after'),
      _lines(run, 'translations/valid.reference'),
      'fr',
    ),
  }
  assert 'against' not in evaluate.evaluate(run, VALID)


def test_runs_of_other_sentences_are_not_compared(run, translations, tmp_path):
  other = shutil.copytree(run, tmp_path / 'other')

  def change(config):
    config['eval']['translate_pairs'] = 2

  _change(other / 'config.json', change)
  refusal(
    lambda: evaluate.evaluate(run, VALID, against=other),
    other,
    'valid',
    '(2)',
    '(3)',
    '--pairs',
  )


def test_a_run_of_fewer_directions_is_compared_in_those_of_both(run, tmp_path):
  other = shutil.copytree(run, tmp_path / 'other')

  def change(config):
    config['data']['pair'] = 'en-fr,fr-en'

  _change(other / 'config.json', change)
  of_both = evaluate.Text('valid', 'en-fr')
  assert evaluate._of_each_pair(run, VALID, other) == [of_both]
  assert evaluate._of_each_pair(other, of_both, run) == [of_both]
  assert len(evaluate._of_each_pair(other, VALID, None)) == 2
  refusal(
    lambda: evaluate._of_each_pair(other, VALID, run),
    f'--against={run}: that run has learned en-fr, and not fr-en; a --pair',
  )


def test_what_is_no_run(run, tmp_path):
  empty = tmp_path / 'empty'
  empty.mkdir()
  refusal(lambda: evaluate.evaluate(empty, VALID), empty / 'config.json')
  assert list(empty.iterdir()) == []
  none = "no checkpoint '7'"
  refusal(lambda: evaluate.evaluate(run, VALID, which='7'), run, none)
  shutil.rmtree(run / 'checkpoints')
  refusal(lambda: evaluate.evaluate(run, VALID), run, 'no checkpoint')


def test_any_text_is_scored(run, translations, tmp_path):
  text = tmp_path / 'web text.tsv'
  text.write_text('fr\ten\nUn\tOne\nDeux\tTwo\n', encoding='utf-8')
  data = {'valid': str(text), 'columns': ('en', 'fr')}
  of_run = evaluate.evaluate(run, VALID)
  got = evaluate.evaluate(run, evaluate.Text('valid', data=data), against=run)
  assert translations == [run]  # The comparison takes what is there.
  assert got['text'] == str(text) and got['scores']['sentences'] == 2
  (path,) = (run / 'evaluation').glob('valid-*web_text_tsv.json')
  assert files.read_json(path) == got
  assert _lines(run, f'evaluation/{path.stem}.source') == ['One', 'Two']
  assert files.read_json(run / 'evaluation' / 'valid.json') == of_run
  assert f'Evaluation: {text}' in report.page(run)
  gone = evaluate.Text('test', data={'test': f'{text}.gone'})
  refusal(lambda: evaluate.evaluate(run, gone), text)


def test_texts_with_line_breaks_have_the_same_scores_again(
  run, monkeypatch, tmp_path
):
  data, french = tmp_path / 'x.jsonl', 'un bien-\nconnu et une chose'
  data.write_text(json.dumps({'en': 'a\nb', 'fr': french}), encoding='utf-8')
  monkeypatch.setattr(evaluate, '_translate', lambda *_: ([french], [0]))
  data = {'valid': str(data), 'columns': ('en', 'fr')}
  text = evaluate.Text('valid', data=data)
  first = evaluate.translate_split(run, text)
  assert first.hypotheses == ['un bien- connu et une chose']
  assert evaluate.evaluate(run, text)['scores']['bleu'] == 100
  monkeypatch.delattr(evaluate, '_translate')
  assert evaluate.translate_split(run, text) == first


def test_each_share_of_noise_has_files_and_a_title_of_its_own():
  names = {'': 0.0, '-noise0_1': 0.001, '-noise7': 0.07}
  names |= {'-noise30': 0.3, '-noise30_4': 0.304, '-noise100': 1.0}
  for suffix, share in names.items():
    text = evaluate.Text('valid', noise=share)
    assert text.suffix == suffix  # The report's names have no dot.
    assert text.title('x') == (f'x, noise {share:g}' if share else 'x')
  text = evaluate.Text('valid', data={'valid': 'a.tsv'}, noise=0.001)
  assert text.title('x') == 'a.tsv, noise 0.001'


def test_a_split_that_there_is_not(run):
  def change(config):
    config['data']['source'] = __file__

  _change(run / 'config.json', change)
  refusal(lambda: evaluate.evaluate(run, TEST), 'data.test', '--data')


@pytest.mark.parametrize('flag', ['--columns=1,2,3', '--columns=en,fr'])
def test_columns_are_two_of_a_text(flag, tmp_path):
  data = [f'--data={tmp_path}'] if '3' in flag else []
  done = _command(f'--workdir={tmp_path}', flag, *data)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert flag in done.stderr and '--data' in done.stderr


def _command(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'mt.evaluate', *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_the_command(run):
  done = _command(f'--workdir={run}', '--split=test', f'--against={run}')
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  result = json.loads((run / 'evaluation' / 'test.json').read_text())
  assert done.stdout == evaluate.describe(result) + '\n'
  page = (run / 'report.html').read_text()
  assert 'Evaluation: test' in page and f'against {run}' in page
  done = _command(f'--workdir={run}', '--split=test', '--json')
  printed = json.loads(done.stdout)['test']
  assert printed['scores'] == result['scores']
  assert printed['cut_off'] == result['cut_off'] == [0, 1, 2]
  for side in ('source', 'reference', 'hypothesis'):
    path = run / 'evaluation' / f'test.{side}.txt'
    assert path.exists() and printed['texts'][side] == str(path)


def test_the_lines_of_the_command():
  texts = ['lol', 'an ordinary little sentence'], ['mdr', 'x'], ['mdr', 'y']
  result = {
    'text': 'valid',
    'step': 1200,
    'scores': scores.score(*texts[1:], 'fr'),
    'noise': scores.by_noise(*texts, 'ja'),
    'loops': scores.looping(['', 'oui oui'], ['oui ' * 9, 'oui oui']),
    'cut_off': [1],
    'against': {
      'workdir': 'runs/b',
      'step': 7,
      'scores': scores.compare(texts[2], *texts[1:], 'fr'),
    },
  }
  shown = evaluate.describe(result).splitlines()
  assert shown[0] == 'valid, step 1200, 2 sentences, compared in NFC'
  assert shown[3].startswith('chrf        91.67  nrefs:1|case:mixed|eff:yes')
  assert '  emoji              0  no sentence' in shown
  assert '  typos              -  no rule for the source language' in shown
  assert '  very short         1  100.00' in shown
  assert 'go round and round: 1 (number 1)' in shown
  cut_off = '1 of 2 translations reached their limit and are cut off'
  assert any(line.startswith(cut_off) for line in shown)
  assert 'against runs/b, step 7' in shown
  assert shown[-2].startswith('chrf       100.00 ±0.00 ->  91.67 ±')
  assert '(-8.33, p = ' in shown[-2] and 'seed:12345' in shown[-2]


def test_runs_are_compared_on_one_page(run, tmp_path):
  other = shutil.copytree(run, tmp_path / 'other')
  done = _command('--report', run, other)
  assert done.returncode == 0, done.stderr
  page = (run / 'comparison.html').read_text(encoding='utf-8')
  assert 'valid: other against run' in page and 'test: other' in page


def test_a_bad_flag_ends_in_one_line():
  done = _command('--report', 'A', 'B', '--split=valid', '--json')
  assert done.returncode == 2 and done.stdout == ''
  assert 'takes no --json or --split' in done.stderr
  done = _command('--workdir=W', 'word')
  assert done.returncode == 2 and "'word' is no flag" in done.stderr
  done = _command('--workdir=W')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.count('\n') == 1, done.stderr
  assert 'W/config.json' in done.stderr and '--workdir' in done.stderr
