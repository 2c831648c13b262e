"""report.html: a run on one page, out of the files in its folder.

The page needs nothing else: no script, no network, no fonts. Whatever stands in
a text is shown, never obeyed: all of it is escaped, and the page's own policy
forbids scripts on top of that.
"""

from collections.abc import Sequence
import html
import json
import pathlib
from typing import Any

from configs import default
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.data import directions
from mt.evaluate import chart
from mt.evaluate import noise
from mt.evaluate import scores as scores_lib
from mt.evaluate import sentences

# Of the machine and the schedule: title, unit, factor, name of each curve.
_RATES = {'targets_per_s': 'target tokens', 'tokens_per_s': 'all tokens'}
_MEMORY = {'memory_gb': 'in use', 'peak_memory_gb': 'at the peak'}
_MORE_CHARTS = (
  ('Throughput', 'a second', 1, _RATES),
  ('Learning rate', 'millionths', 1e6, {'learning_rate': 'of the step'}),
  ('MFU', '%', 100, {'mfu': 'useful FLOPs of the peak'}),
  ('Device memory', 'GB', 1, _MEMORY),
)
_CURVES = ('loss', 'valid_loss', 'minitrain_loss', 'valid_chrf') + tuple(
  key for *_, names in _MORE_CHARTS for key in names
)
_ABOUT_NOISE = (
  '<p class="dim">A sentence may be in several classes; the rules are '
  'in mt/evaluate/noise.py.</p>'
)
ABOUT_BOOTSTRAP = (
  '<p class="dim">Paired bootstrap. ± is half of the 95 % interval, p how '
  'likely chance alone makes such a difference.</p>'
)
_MOST = 2000  # Points of a curve, twice that at times.
_STYLE = pathlib.Path(__file__).with_suffix('.css').read_text('utf-8')


def write(workdir: pathlib.Path, curves: 'Curves | None' = None) -> None:
  """Writes report.html of what a run has left so far.

  Who writes it again and again keeps its `curves`, lest each reads all of them.
  """
  files.write(workdir / 'report.html', page(workdir, curves))


def page(workdir: pathlib.Path, curves: 'Curves | None' = None) -> str:
  """The page, see `write`."""
  curves = curves or Curves(workdir / 'metrics.jsonl')
  config = run_folder.read_config(workdir).to_dict()
  scores = {}
  if (workdir / 'scores.json').exists():
    scores = files.read_json(workdir / 'scores.json')
  points, last = curves.read()
  out = [_head(workdir.absolute().name, config, last, bool(scores))]
  for both in scores.values():
    both['after'].setdefault('step', last)  # Runs of old have none.
  if scores:
    tables = []
    for split, both in scores.items():
      title = f'after, step {both["after"]["step"]:,}'
      found = {'before': both['before'], title: both['after']}
      tables.append((split, _scores(found)))
    out += ['<h2>Scores</h2>', grid(tables)]
    out += {signatures(both['after']): None for both in scores.values()}
  out += ['<h2>Curves</h2>', _curves(points, scores)]
  if scores:
    tables = [
      (split, _noise({when: found['noise'] for when, found in both.items()}))
      for split, both in scores.items()
      if 'noise' in both['after']  # A mean has none.
    ]
    out += ['<h2>chrF by noise</h2>', _ABOUT_NOISE, grid(tables)]
  for path in sorted((workdir / 'evaluation').glob('*.json')):
    if '.' not in path.stem:
      out.append(_evaluation(path.stem, files.read_json(path)))
  pair = config['data']['pair']
  of = directions.named(pair, 'valid', 'test')
  for split in filter(of.get, scores):
    folder = workdir / 'translations'
    texts = [
      (name, files.read_lines(folder / f'{split}.{name}.txt'))
      for name in sentences.COLUMNS
    ]
    after = scores[split]['after']
    marked = [after.get(key, ()) for key in ('loops', 'cut_off')]
    out.append(f'<h2>Sentences: {_text(split)}</h2>')
    languages = directions.languages(of[split])
    out.append(sentences.tables(texts, languages, *marked))
  out += ['<h2>Config that differs from the default</h2>', _config(config)]
  environment = files.read_json(workdir / 'environment.json')
  rows = [(_text(key), code(value)) for key, value in environment.items()]
  out += ['<h2>Environment</h2>', table(('', ''), rows), '</body></html>\n']
  return '\n'.join(out)


def top(title) -> str:
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<title>{_text(title)}</title>'
    f'<style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>'
  )


def _head(name, config, last, done) -> str:
  title = config['weights']['source'], config['data']['pair']
  title = ', '.join((*title, config['train']['parts']))
  state = 'done' if done else 'running: scores come at the end'
  return (
    f'{top(name)}<p class="dim">{_text(title)}; '
    f'step {last:,} of {config["train"]["max_steps"]:,}, {state}</p>'
  )


def _config(config) -> str:
  was = default.get_config().to_dict()
  rows = [
    (code(knob), code(now), code(old))
    for knob, old, now in run_folder.differences(was, config)
  ]
  if not rows:
    return '<p class="dim">nothing</p>'
  return table(('knob', 'here', 'default'), rows)


def _text(value: Any) -> str:
  return html.escape(str(value))


def code(value):
  shown = value if isinstance(value, str) else json.dumps(value)
  return f'<code>{_text(shown)}</code>'


def table(head, rows, numbers: Sequence[int] = ()) -> str:
  """Cells are HTML already."""

  def cells(tag, row):
    return ''.join(
      f'<{tag}{" class=num" if i in numbers else ""}>{cell}</{tag}>'
      for i, cell in enumerate(row)
    )

  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  top = f'<thead><tr>{cells("th", head)}</tr></thead>' if any(head) else ''
  kind = ' class="numbers"' if numbers else ''
  return f'<table{kind}>{top}<tbody>{body}</tbody></table>'


def _scores(found: dict[str, Any]) -> str:
  """Scores of one translation, or of two and their change, under titles."""
  *_, last = found.values()
  rows = [
    (f'<b>{name}</b>', *_numbers([each[key] for each in found.values()]))
    for key, name in scores_lib.names(last).items()
  ]
  head = [f'{last["sentences"]:,} sentences', *found]
  head += ['change'] * (len(found) == 2)
  return table(head, rows, range(1, 4))


def _numbers(values: Sequence[float]) -> list[str]:
  change = [sentences.change(*values)] if len(values) == 2 else []
  return [f'{value:.2f}' for value in values] + change


def signatures(scores) -> str:
  return ''.join(
    f'<p class="dim"><small>{name} (of texts in NFC): <code>'
    f'{_text(scores[key + "_signature"])}</code></small></p>'
    for key, name in scores_lib.names(scores).items()
  )


def grid(parts) -> str:
  """Parts with titles, side by side where there is room."""
  sections = ''.join(
    f'<section><h3>{_text(title)}</h3>{part}</section>' for title, part in parts
  )
  return f'<div class="grid">{sections}</div>'


class _Curve:
  """Points; of a long run means of neighbours, so that memory stays."""

  def __init__(self):
    self._points, self._next, self._width = [], [], 1

  def add(self, point: chart.Point) -> None:
    self._next.append(point)
    if len(self._next) == self._width:
      self._points += chart.thin(self._next, 1)
      self._next = []
    if len(self._points) == 2 * _MOST:
      self._points = chart.thin(self._points, _MOST)
      self._width *= 2

  def points(self) -> list[chart.Point]:
    return self._points + chart.thin(self._next, 1)


class Curves:
  """Those of metrics.jsonl, which is read on from where it was read to."""

  def __init__(self, path: pathlib.Path):
    self._path, self._at, self._last = path, 0, 0
    self._curves = {key: _Curve() for key in _CURVES}

  def read(self) -> tuple[dict[str, list[chart.Point]], int]:
    """Points (step, number) of each curve; the last step."""
    first = self._at
    if self._path.exists():
      self._at = self._path.stat().st_size
    for line in journal.read_metrics(self._path, first):
      self._last = max(self._last, line['step'])
      for key, curve in self._curves.items():
        if isinstance(line.get(key), int | float):
          curve.add((line['step'], line[key]))
    return {k: curve.points() for k, curve in self._curves.items()}, self._last


def _curves(curves, scores) -> str:
  loss = [('training', curves['loss']), ('validation', curves['valid_loss'])]
  if minitrain := curves['minitrain_loss']:
    loss.append(('minitrain: memorised?', minitrain))
  chrf = [('validation', curves['valid_chrf'])]
  if not curves['valid_chrf']:
    chrf = [
      (split, [(x.get('step', 0), x['chrf']) for x in both.values()])
      for split, both in scores.items()
      if split in ('valid', 'test')  # Of several directions, their means.
    ]
  charts = [('Loss', 'nats per target token', loss), ('chrF', '0 to 100', chrf)]
  for title, unit, factor, names in _MORE_CHARTS:
    series = [
      (name, [(step, y * factor) for step, y in curves[key]])
      for key, name in names.items()
      if curves[key]
    ]
    charts += [(title, unit, series)] if series else []
  figures = ''.join(chart.figure(*each) for each in charts)
  return f'<div class="charts">{figures}</div>'


def _noise(found: dict[str, Any]) -> str:
  """chrF by noise of one translation, or of two, under titles."""
  head = ['class', 'sentences', *found] + ['change'] * (len(found) == 2)
  rows = []
  for name in (*noise.CLASSES, scores_lib.NO_CLASS):
    *_, row = (each.get(name) for each in found.values())
    if row and row['sentences']:
      chrf = [each[name]['chrf'] for each in found.values()]
      cells = [f'{row["sentences"]:,}', *_numbers(chrf)]
    else:
      cells = ['0', 'no sentence'] if row else ['–', 'no rule']
      cells[1:1] = [''] * (len(head) - 3)
    rows.append((_text(name), *cells))
  return table(head, rows, range(1, len(head)))


def _evaluation(split, result) -> str:
  """What mt.evaluate left."""
  found = result['scores']
  parts = [('scores', _scores({'score': found}) + signatures(found))]
  if 'noise' in result:  # A mean has none.
    parts.append(('chrF by noise', _noise({'chrF': result['noise']})))
  if other := result.get('against'):
    title = f'against {other["workdir"]}, step {other["step"]:,}'
    parts.append((title, ABOUT_BOOTSTRAP + bootstrap(other['scores'])))
  text = _text(result.get('text', split))
  title = f'Evaluation: {text}, step {result["step"]:,}'
  return f'<h2>{title}</h2>{grid(parts)}'


def bootstrap(found) -> str:
  """What scores.compare found, as a table."""
  rows = []
  for key, name in scores_lib.names(found).items():
    row = found[key]
    there = f'{row["baseline"]:.2f} ±{row["baseline_interval"]:.2f}'
    here = f'{row["score"]:.2f} ±{row["interval"]:.2f}'
    change = sentences.change(row['baseline'], row['score'])
    rows.append((f'<b>{name}</b>', there, here, change, f'{row["p"]:.3f}'))
  return table(('', 'there', 'here', 'change', 'p'), rows, range(1, 5))
