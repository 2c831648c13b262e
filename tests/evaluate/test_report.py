"""report.html, out of a folder written for it and out of a run."""

import html.parser
import json
import os
import re
import shutil
import time

import pytest

from configs import default
from mt.base import files
from mt.evaluate import comparison
from mt.evaluate import report
from mt.evaluate import scores
from mt.evaluate import sentences
from tests.fixtures.refusal import refusal

SOURCES = [
  '<script>alert(1)</script> lol',
  'A "quoted" & plain <b>sentence</b>.',
  'the third one 😂',
]
REFERENCES = ['<img src=x onerror=alert(1)> mdr', 'Une phrase simple.', 'Trois']
BEFORE = ['the script', 'A sentence', "</p></td><script src='//x.y'>"]
AFTER = ['mdr', 'Une phrase très simple.', 'Quatre']


class _Page(html.parser.HTMLParser):
  """Tags with their attributes, texts by the tag around them."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.texts, self.bad = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'br'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.bad.append(tag)

  def handle_data(self, data):
    self.texts.append((self.open[-1] if self.open else '', data))

  def text(self, *tags):
    return ' '.join(t for tag, t in self.texts if not tags or tag in tags)


@pytest.fixture
def folder(tmp_path):
  """A run's folder, without a run."""
  config = default.get_config()
  config.train.max_steps = 20
  config.optim.learning_rate = 0.5
  config.data.source = '<script>evil()</script>'
  files.write_json(tmp_path / 'config.json', config.to_dict())
  environment = {'python': '3.11', 'command': ['train.py', '--x=</table>']}
  files.write_json(tmp_path / 'environment.json', environment)
  for step in range(21):
    line = {'step': step, 'loss': 3 - step / 10, 'targets_per_s': 50 + step}
    _add_metrics(tmp_path, line)
  return tmp_path


def _add_metrics(folder, line):
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps(line) + '\n')


def _finish(folder):
  columns = SOURCES, REFERENCES, BEFORE, AFTER
  for name, lines in zip(sentences.COLUMNS, columns, strict=True):
    path = folder / 'translations' / f'valid.{name}.txt'
    files.write_lines(path, lines)
  found = {
    when: scores.score(texts, REFERENCES, 'fr')
    | {'noise': scores.by_noise(SOURCES, texts, REFERENCES, 'en')}
    for when, texts in (('before', BEFORE), ('after', AFTER))
  }
  found['after'] |= {'loops': [0], 'cut_off': [0, 1]}
  files.write_json(folder / 'scores.json', {'valid': found})
  return found


def _page(folder):
  report.write(folder)
  return _Page((folder / 'report.html').read_text(encoding='utf-8'))


def test_a_page_stands_alone(folder):
  _finish(folder)
  page = _page(folder)
  assert not page.bad and not page.open
  assert {tag for tag, _ in page.tags}.isdisjoint(
    ('script', 'link', 'img', 'iframe', 'object', 'base', 'form', 'a')
  )
  curves = {'g', 'path', 'use', 'text'}
  for tag, attributes in page.tags:
    assert attributes.keys().isdisjoint(('src', 'href', 'srcset'))
    assert not any(name.startswith('on') for name in attributes)
    assert 'style' not in attributes or tag in curves, tag
    # Of a curve, a mark that is drawn again.
    assert attributes.get('xlink:href', '#').startswith('#')
  style = page.text('style')
  assert 'url(' not in style and '@import' not in style
  assert 'prefers-color-scheme: dark' in style and '(max-width' in style
  metas = [a for tag, a in page.tags if tag == 'meta']
  (policy,) = [a['content'] for a in metas if 'http-equiv' in a]
  assert policy == "default-src 'none'; style-src 'unsafe-inline'"
  assert any(a.get('name') == 'viewport' for a in metas)
  assert {'charset': 'utf-8'} in metas


def test_texts_are_shown_and_never_obeyed(folder):
  _finish(folder)
  page = _page(folder)
  shown = page.text()
  for text in [*SOURCES, *REFERENCES]:
    assert text in shown
  assert '<script>evil()</script>' in shown and '--x=</table>' in shown
  # Before and after are cut up by marks.
  joined = ''.join(t for _, t in page.texts)
  assert "</p></td><script src='//x.y'>" in joined


def test_scores_come_with_their_signatures(folder):
  found = _finish(folder)
  page = _page(folder)
  shown = page.text()
  for when in ('before', 'after'):
    for name in scores.names(found['after']):
      assert f'{found[when][name]:.2f}' in shown
  for name in scores.names(found['after']):
    assert found['after'][f'{name}_signature'] in shown
  difference = found['after']['chrf'] - found['before']['chrf']
  assert f'{difference:+.2f}' in page.text('span')
  assert 'step 20 of 20, done' in shown
  assert '1 that go round' in shown and '2 that are cut off' in shown


def test_noise_classes_are_counted(folder):
  _finish(folder)
  shown = _page(folder).text('td')
  assert 'emoji 1 ' in shown and 'slang 1 ' in shown
  assert 'very long 0 no sentence' in ' '.join(shown.split())


def test_a_class_without_a_rule_says_so(folder):
  found = _finish(folder)
  for when in found.values():
    del when['noise']['typos']
  files.write_json(folder / 'scores.json', {'valid': found})
  shown = ' '.join(_page(folder).text('td').split())
  assert 'typos – no rule' in shown


def test_the_config_that_differs(folder):
  shown = _page(folder).text('code')
  assert 'optim.learning_rate 0.5 0.0001' in shown
  assert 'train.max_steps 20 1000' in shown
  assert 'optim.beta1' not in shown
  # A run of before a knob was there has its default.
  fields = files.read_json(folder / 'config.json')
  del fields['data']['noise'], fields['log']
  files.write_json(folder / 'config.json', fields)
  assert _page(folder).text('code') == shown


@pytest.fixture
def curves(monkeypatch):
  """title -> name -> number of points, of what a page shows."""
  shown = {}

  def lines(title, series):
    shown[title] = {name: len(points) for name, points in series}
    return '<svg></svg>'

  monkeypatch.setattr(report.chart, 'lines', lines)
  return shown


def test_curves_are_read_on(tmp_path, monkeypatch):
  """The same as from the beginning, however often they were looked at."""
  monkeypatch.setattr(report, '_MOST', 5)
  path = tmp_path / 'metrics.jsonl'
  curves = report.Curves(path)
  assert curves.read() == report.Curves(path).read()
  read = []
  real = report.journal.read_metrics

  def read_metrics(path, first=0):
    for line in real(path, first):
      read.append(line['step'])
      yield line

  monkeypatch.setattr(report.journal, 'read_metrics', read_metrics)
  with path.open('a') as file:
    for n in range(1, 41):
      file.write(f'{{"step": {n}, "loss": {n % 7}}}\n')
      if n % 6 == 0:
        file.flush()
        found = curves.read()
        assert found[1] == n
  assert read == [*range(1, 37)]
  assert curves.read() == report.Curves(path).read()


def test_the_curves_of_a_long_run_are_means(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  lines = [f'{{"step": {n}, "loss": {n % 7}}}\n' for n in range(1, 1001)]
  path.write_text(''.join(lines) + '{"step": 1000, "valid_loss": 2.0}\n')
  exact, last = report.Curves(path).read()
  assert exact['loss'] == [(n, n % 7) for n in range(1, 1001)]
  monkeypatch.setattr(report, '_MOST', 50)
  found, same = report.Curves(path).read()
  assert last == same == 1000 and found['valid_loss'] == [(1000, 2.0)]
  # Of 16 steps each, and of the last 8.
  assert len(found['loss']) == 63
  for i, point in enumerate(found['loss']):
    part = exact['loss'][16 * i : 16 * (i + 1)]
    mean = [sum(x) / len(part) for x in zip(*part, strict=True)]
    assert point == pytest.approx(mean)


def test_curves(folder, curves):
  report.page(folder)
  assert curves == {
    'Loss': {'training': 21, 'validation': 0},
    'chrF': {},  # Only scores would have some.
    'Throughput': {'target tokens': 21},
  }
  for step in (0, 10, 20):
    line = {'step': step, 'valid_loss': 3.0, 'valid_chrf': float(step)}
    line |= {'minitrain_loss': 2.0, 'mfu': 0.4, 'memory_gb': 1.0}
    line |= {'peak_memory_gb': 2.0, 'learning_rate': 1e-4, 'tokens_per_s': 9}
    _add_metrics(folder, line)
  page = _page(folder)
  assert curves['Loss']['minitrain: memorised?'] == 3
  assert curves['chrF'] == {'validation': 3}
  assert curves['Throughput'] == {'target tokens': 21, 'all tokens': 3}
  assert curves['Learning rate'] == {'of the step': 3}
  assert curves['MFU'] == {'useful FLOPs of the peak': 3}
  assert curves['Device memory'] == {'in use': 3, 'at the peak': 3}
  assert 'minitrain: memorised?' in page.text('span')


def test_the_step_that_was_scored_is_named(folder):
  found = _finish(folder)
  assert 'after, step 20' in _page(folder).text('th')  # A run of old.
  found['before']['step'], found['after']['step'] = 0, 10
  files.write_json(folder / 'scores.json', {'valid': found})
  page = _page(folder)
  assert 'after, step 10' in page.text('th')


def test_chrf_before_and_after_is_a_curve_of_two_points(folder, curves):
  found = _finish(folder)
  report.page(folder)
  assert curves['chrF'] == {'valid': 2}
  directions = ('valid-en-fr', 'valid-fr-en', 'test-en-fr', 'test-fr-en')
  scored = dict.fromkeys((*directions, 'valid', 'test'), found)
  files.write_json(folder / 'scores.json', scored)
  for name in directions:
    for path in (folder / 'translations').glob('valid.*'):
      shutil.copy(path, path.with_name(path.name.replace('valid', name)))
  fields = files.read_json(folder / 'config.json')
  fields['data']['pair'] = 'en-fr,fr-en'
  files.write_json(folder / 'config.json', fields)
  report.page(folder)
  assert curves['chrF'] == {'valid': 2, 'test': 2}


def test_a_run_under_way(folder):
  shown = _page(folder).text()
  assert 'running' in shown and 'Sentences' not in shown


def test_metrics_that_are_no_numbers(folder):
  with open(folder / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 21, "loss": null}\n{"step": 22, "loss": NaN}\n{"step": 2')
  page = _page(folder)
  assert 'nan' not in page.text().lower()
  marks = [a for tag, a in page.tags if tag == 'use' and 'var(--a)' in str(a)]
  assert len(marks) == 2 * 21


def test_what_mt_evaluate_found(folder):
  found = _finish(folder)['after']
  result = {
    'step': 20,
    'scores': found,
    'noise': found['noise'],
    'against': {
      'workdir': 'runs/<other>',
      'step': 7,
      'scores': scores.compare(BEFORE, AFTER, REFERENCES, 'fr'),
    },
  }
  files.write_json(folder / 'evaluation' / 'test.json', result)
  files.write_json(folder / 'evaluation' / 'test.hypothesis.json', {})
  page = _page(folder)
  assert 'sentences score class' in page.text('th')  # One, without a change.
  shown = page.text()
  assert 'Evaluation: test, step 20' in shown
  assert 'against runs/<other>, step 7' in shown
  row = result['against']['scores']['chrf']
  assert f'{row["baseline"]:.2f} ±{row["baseline_interval"]:.2f}' in shown


def test_a_page_is_written_whole_or_not_at_all(folder, monkeypatch):
  report.write(folder)
  old = (folder / 'report.html').read_bytes()
  _finish(folder)

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', fail)
  refusal(lambda: report.write(folder), folder / 'report.html', 'No space')
  assert (folder / 'report.html').read_bytes() == old


def test_a_folder_without_a_run(tmp_path):
  refusal(lambda: report.write(tmp_path), tmp_path / 'config.json', '--workdir')


def test_long_runs_have_small_pages(folder):
  short = len(report.page(folder))
  with open(folder / 'metrics.jsonl', 'a') as f:
    for step in range(21, 20_000):
      line = {'step': step, 'loss': 1 / step, 'targets_per_s': step}
      f.write(json.dumps(line) + '\n')
  start = time.monotonic()
  text = report.page(folder)
  assert time.monotonic() - start < 5
  assert len(text) < short + 20_000


# Sentences.


@pytest.mark.parametrize(
  'reference, text, expected',
  [
    ('le chat dort', 'le chat dort', 'le chat dort'),
    ('le chat dort', 'le chien dort', 'le <mark>chien</mark> dort'),
    ('a b c d', 'a x y d', 'a <mark>x y</mark> d'),
    ('le gros chat', 'le chat', 'le<span class="gap">‸</span> chat'),
    ('un chat', 'un  chat .', 'un  chat <mark>.</mark>'),
    ('chat', '', '<span class="gap">‸</span>'),
    ('', 'chat', '<mark>chat</mark>'),
    ('l’ami', "l'ami", 'l&#x27;ami'),
    ('l’ami', "l'amie", 'l&#x27;<mark>amie</mark>'),
    ("l'ami", 'l’ami', 'l’ami'),
    ('x' + ' de' * 300, 'y' + ' de' * 300, '<mark>y</mark>' + ' de' * 300),
    ('私は猫が好き', '私は犬が好き', '私は<mark>犬</mark>が好き'),
    ('a', '<b>', '<mark>&lt;b&gt;</mark>'),
    ('a 😂', 'a 😭 ', 'a <mark>😭</mark> '),
  ],
)
def test_differences_are_marked(reference, text, expected):
  assert sentences.marked(reference, text) == expected


def test_nothing_of_a_text_is_lost():
  for reference, text in zip(REFERENCES * 2, BEFORE + AFTER, strict=True):
    page = _Page(sentences.marked(reference, text))
    shown = ''.join(t for tag, t in page.texts if tag != 'span')
    assert shown == text


def _tables(*columns, **marked):
  texts = [*zip(sentences.COLUMNS, columns, strict=True)]
  return sentences.tables(texts, ('en', 'fr'), **marked)


def test_sentences_are_spread_and_the_worst_are_shown():
  number = 200
  sources = [f'source {i}' for i in range(number)]
  references = [f'la phrase numéro {i}' for i in range(number)]
  before, after = references[:], references[:]
  before[0] = 'xxx'  # Gained.
  after[7] = 'zzz'  # Lost all.
  after[9] = 'la phrase'  # Lost some.
  marked = {'loops': [3], 'cut_off': range(100, 200)}
  text = _tables(sources, references, before, after, **marked)
  assert '40 of 200, evenly spread' in text
  assert text.count('<tr>') == 1 + 40 + 1 + 2 + 1 + 1 + 1 + 10
  titles = 'Those that lost most|1 that go round|100 that are cut off'
  spread, lost, loops, cut_off = re.split(titles, text)
  assert 'source 3<' in loops and 'source 3<' not in lost
  assert 'source 199<' in cut_off
  assert 'source 0<' in spread and 'source 199<' in spread
  assert 'source 7<' not in spread
  assert lost.index('source 7<') < lost.index('source 9<')
  assert 'source 0<' not in lost


def test_few_sentences_are_all_shown():
  text = _tables(SOURCES, REFERENCES, BEFORE, AFTER)
  assert '3 of 3, evenly spread' in text
  page = _Page(text)
  assert [a['lang'] for tag, a in page.tags if tag == 'p' and 'lang' in a][
    :4
  ] == ['en', 'fr', 'fr', 'fr']
  assert 'emoji' in page.text('span')


def test_a_text_for_each_source():
  with pytest.raises(AssertionError):
    _tables(SOURCES, REFERENCES, BEFORE, AFTER[:2])


# Several runs.


def _other(folder, tmp_path_factory, after):
  """A copy of a finished run with other translations, at another rate."""
  other = tmp_path_factory.mktemp('runs') / '<b>other'
  shutil.copytree(folder, other)
  files.write_lines(other / 'translations' / 'valid.after.txt', after)
  config = files.read_json(other / 'config.json')
  config['optim']['learning_rate'] = 0.25
  files.write_json(other / 'config.json', config)
  return other


def test_runs_on_one_page(folder, tmp_path_factory, curves):
  _finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, BEFORE)
  page = _Page(comparison.page([folder, other]))
  assert not page.bad and not page.open
  shown = ' '.join(page.text().split())
  found = scores.compare(AFTER, BEFORE, REFERENCES, 'fr')
  for row in found.values():
    assert f'{row["baseline"]:.2f}' in shown
    assert f'{row["p"]:.3f}' in shown
  assert found['chrf']['signature'].split('|')[-1] in shown
  assert '3 of 3 translations differ' in shown
  both = folder.name, '<b>other'
  assert curves['Training loss'] == dict.fromkeys(both, 21)
  assert curves['chrF of validation'] == dict.fromkeys(both, 0)
  assert 'optim.learning_rate 0.5 0.25' in page.text('code')
  assert 'train.max_steps' not in page.text('code')
  assert comparison.page([folder, other, folder]) == comparison.page(
    [folder, other]
  )


def test_runs_of_other_directions_are_compared_in_those_of_both(
  folder, tmp_path_factory
):
  _finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, BEFORE)
  for path in (other / 'translations').glob('valid.*'):
    path.rename(path.with_name(path.name.replace('valid', 'valid-en-fr')))
  fields = files.read_json(other / 'config.json')
  fields['data']['pair'] = 'en-fr,fr-en'
  files.write_json(other / 'config.json', fields)
  for runs, split in (
    ([folder, other], 'valid'),
    ([other, folder], 'valid-en-fr'),
  ):
    shown = _Page(comparison.page(runs)).text()
    assert f'Sentences: {split} ' in shown and 'not done' not in shown


def test_runs_of_other_sentences_are_not_compared(folder, tmp_path_factory):
  _finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, BEFORE)
  files.write_lines(other / 'translations' / 'valid.source.txt', REFERENCES)
  shown = _Page(comparison.page([folder, other])).text()
  assert 'other sentences' in shown and 'differ.' not in shown
  (other / 'translations' / 'valid.after.json').unlink()
  assert 'other has no scores' in _Page(comparison.page([other, folder])).text()
  refusal(lambda: comparison.page([folder]), '--report', 'two to four')
