"""Several runs on one page."""

import shutil

from mt.base import files
from mt.evaluate import comparison
from mt.evaluate import scores
from tests.evaluate import pages
from tests.fixtures.refusal import refusal


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
  pages.finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, pages.BEFORE)
  page = pages.Page(comparison.page([folder, other]))
  assert not page.bad and not page.open
  shown = ' '.join(page.text().split())
  found = scores.compare(pages.AFTER, pages.BEFORE, pages.REFERENCES, 'fr')
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
  pages.finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, pages.BEFORE)
  for path in (other / 'translations').glob('valid.*'):
    path.rename(path.with_name(path.name.replace('valid', 'valid-en-fr')))
  fields = files.read_json(other / 'config.json')
  fields['data']['pair'] = 'en-fr,fr-en'
  files.write_json(other / 'config.json', fields)
  for runs, split in (
    ([folder, other], 'valid'),
    ([other, folder], 'valid-en-fr'),
  ):
    shown = pages.Page(comparison.page(runs)).text()
    assert f'Sentences: {split} ' in shown and 'not done' not in shown


def test_runs_of_other_sentences_are_not_compared(folder, tmp_path_factory):
  pages.finish(folder)
  files.write_json(folder / 'translations' / 'valid.after.json', {})
  other = _other(folder, tmp_path_factory, pages.BEFORE)
  files.write_lines(
    other / 'translations' / 'valid.source.txt', pages.REFERENCES
  )
  shown = pages.Page(comparison.page([folder, other])).text()
  assert 'other sentences' in shown and 'differ.' not in shown
  (other / 'translations' / 'valid.after.json').unlink()
  assert (
    'other has no scores' in pages.Page(comparison.page([other, folder])).text()
  )
  refusal(lambda: comparison.page([folder]), '--report', 'two to four')
