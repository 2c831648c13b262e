"""Several runs on one page, as report.py shows one."""

from collections.abc import Sequence
import html
import itertools
import pathlib

from mt.base import errors
from mt.base import files
from mt.base import run_folder
from mt.data import directions
from mt.evaluate import chart
from mt.evaluate import report
from mt.evaluate import scores as scores_lib
from mt.evaluate import sentences

_CURVES = (
  ('loss', 'Training loss', 'nats per target token'),
  ('valid_loss', 'Validation loss', 'nats per target token'),
  ('valid_chrf', 'chrF of validation', '0 to 100'),
)


def page(workdirs: Sequence[pathlib.Path]) -> str:
  """A page with two to four runs; all are compared with the first.

  Scores are computed anew from the runs' translations, so that all of them have
  the same tokeniser, whatever the machine had that made them.

  Raises:
    errors.UserError: too few runs, too many, or one that has no config.
  """
  workdirs = [*dict.fromkeys(workdirs)]  # `runs/a runs/*` has one twice.
  if not 2 <= len(workdirs) <= 4:
    raise errors.UserError(
      f'--report: {len(workdirs)} folders; those of two to four runs expected.'
    )
  names = [w.absolute().name for w in workdirs]
  if len(set(names)) < len(names):
    names = [str(w) for w in workdirs]
  runs = dict(zip(names, workdirs, strict=True))
  configs = [run_folder.read_config(w).to_dict() for w in workdirs]
  tables, texts = [], []
  pair, *_ = of_runs = [config['data']['pair'] for config in configs]
  for what, direction in itertools.product(
    ('valid', 'test'), directions.each(pair)
  ):
    split = directions.name(pair, what, direction)
    languages = directions.languages(direction)
    made = {  # In each run under its own name, as others have more directions.
      name: _made(w, directions.name(of_run, what, direction))
      for (name, w), of_run in zip(runs.items(), of_runs, strict=True)
    }
    if made[names[0]] is not None:
      tables.append(_compared(split, made, languages[1]))
      texts += _differing(split, made, languages)
  none = f'<p class="dim">{html.escape(names[0])} has no scores yet.</p>'
  curves = [report.Curves(w / 'metrics.jsonl').read()[0] for w in workdirs]
  charts = (
    chart.figure(
      title, unit, [(n, c[key]) for n, c in zip(names, curves, strict=True)]
    )
    for key, title, unit in _CURVES
  )
  out = [report.top('Runs compared'), '<h2>Scores</h2>']
  out += [report.ABOUT_BOOTSTRAP, *(tables or [none]), '<h2>Curves</h2>']
  out += ['<div class="charts">', *charts, '</div>']
  out += ['<h2>Config that differs</h2>', _configs(names, configs), *texts]
  return '\n'.join([*out, '</body></html>\n'])


def _made(workdir, split):
  """Sources, references and translations of a finished run, or None."""
  folder = workdir / 'translations'
  if not (folder / f'{split}.after.json').exists():
    return None
  return [
    files.read_lines(folder / f'{split}.{name}.txt')
    for name in ('source', 'reference', 'after')
  ]


def _compared(split, made, language) -> str:
  """Scores of the runs beside those of the first."""
  first, *others = made
  *pairs, baseline = made[first]
  parts = []
  for name in others:
    part = '<p class="dim">not done, or of other sentences</p>'
    if made[name] and made[name][:2] == pairs:
      found = scores_lib.compare(baseline, made[name][2], pairs[1], language)
      part = report.bootstrap(found)
    parts.append((f'{split}: {name} against {first}', part))
  signatures = report.signatures(scores_lib.score(baseline, pairs[1], language))
  return report.grid(parts) + signatures


def _differing(split, made, languages):
  *pairs, _ = next(iter(made.values()))
  same = {k: v[2] for k, v in made.items() if v and v[:2] == pairs}
  if len(same) > 1:
    texts = [*zip(('source', 'reference'), pairs, strict=True), *same.items()]
    yield f'<h2>Sentences: {split}</h2>'
    yield sentences.differing(texts, languages)


def _configs(names, configs) -> str:
  """The knobs that are not the same in all runs, marked where they differ."""
  flat = [run_folder.flat(config) for config in configs]
  rows = []
  for knob in sorted({knob for config in flat for knob in config}):
    first, *others = (config.get(knob) for config in flat)
    if any(value != first for value in others):
      cells = [report.code(knob), report.code(first)]
      for value in others:
        cell = report.code(value)
        cells.append(cell if value == first else f'<mark>{cell}</mark>')
      rows.append(cells)
  return report.table(('knob', *map(html.escape, names)), rows)
