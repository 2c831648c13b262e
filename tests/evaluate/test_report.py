"""report.html, out of a folder written for it and out of a run."""

import json
import os
import shutil
import time

import pytest

from mt.base import files
from mt.evaluate import report
from mt.evaluate import scores
from tests.evaluate import pages
from tests.fixtures.refusal import refusal


def _page(folder):
  report.write(folder)
  return pages.Page((folder / 'report.html').read_text(encoding='utf-8'))


def test_a_page_stands_alone(folder):
  pages.finish(folder)
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
  pages.finish(folder)
  page = _page(folder)
  shown = page.text()
  for text in [*pages.SOURCES, *pages.REFERENCES]:
    assert text in shown
  assert '<script>evil()</script>' in shown and '--x=</table>' in shown
  # Before and after are cut up by marks.
  joined = ''.join(t for _, t in page.texts)
  assert "</p></td><script src='//x.y'>" in joined


def test_scores_come_with_their_signatures(folder):
  found = pages.finish(folder)
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
  pages.finish(folder)
  shown = _page(folder).text('td')
  assert 'emoji 1 ' in shown and 'slang 1 ' in shown
  assert 'very long 0 no sentence' in ' '.join(shown.split())


def test_a_class_without_a_rule_says_so(folder):
  found = pages.finish(folder)
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
    pages.add_metrics(folder, line)
  page = _page(folder)
  assert curves['Loss']['minitrain: memorised?'] == 3
  assert curves['chrF'] == {'validation': 3}
  assert curves['Throughput'] == {'target tokens': 21, 'all tokens': 3}
  assert curves['Learning rate'] == {'of the step': 3}
  assert curves['MFU'] == {'useful FLOPs of the peak': 3}
  assert curves['Device memory'] == {'in use': 3, 'at the peak': 3}
  assert 'minitrain: memorised?' in page.text('span')


def test_the_step_that_was_scored_is_named(folder):
  found = pages.finish(folder)
  assert 'after, step 20' in _page(folder).text('th')  # A run of old.
  found['before']['step'], found['after']['step'] = 0, 10
  files.write_json(folder / 'scores.json', {'valid': found})
  page = _page(folder)
  assert 'after, step 10' in page.text('th')


def test_chrf_before_and_after_is_a_curve_of_two_points(folder, curves):
  found = pages.finish(folder)
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
  found = pages.finish(folder)['after']
  result = {
    'step': 20,
    'scores': found,
    'noise': found['noise'],
    'against': {
      'workdir': 'runs/<other>',
      'step': 7,
      'scores': scores.compare(
        pages.BEFORE, pages.AFTER, pages.REFERENCES, 'fr'
      ),
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
  pages.finish(folder)

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
