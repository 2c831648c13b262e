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
_MORE_CHARTS = (
  (
    'Throughput',
    'a second',
    1,
    {'targets_per_s': 'target tokens', 'tokens_per_s': 'all tokens'},
  ),
  ('Learning rate', 'millionths', 1e6, {'learning_rate': 'of the step'}),
  ('MFU', '%', 100, {'mfu': 'useful FLOPs of the peak'}),
  (
    'Device memory',
    'GB',
    1,
    {'memory_gb': 'in use', 'peak_memory_gb': 'at the peak'},
  ),
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
_STYLE = pathlib.Path(__file__).with_suffix('.css').read_text('utf-8')


def write(workdir: pathlib.Path) -> None:
  """Writes report.html of what a run has left so far."""
  files.write(workdir / 'report.html', page(workdir))


def page(workdir: pathlib.Path) -> str:
  """The page, see `write`."""
  config = files.read_json(workdir / 'config.json')
  scores = {}
  if (workdir / 'scores.json').exists():
    scores = files.read_json(workdir / 'scores.json')
  curves, last = read_curves(workdir / 'metrics.jsonl')
  out = [_head(workdir.absolute().name, config, last, bool(scores))]
  if scores:
    tables = [(split, _scores(both)) for split, both in scores.items()]
    out += ['<h2>Scores</h2>', grid(tables)]
    out += {signatures(both['after']): None for both in scores.values()}
  out += ['<h2>Curves</h2>', _curves(curves, scores, last)]
  if scores:
    tables = [
      (split, _noise(both['before']['noise'], both['after']['noise']))
      for split, both in scores.items()
      if 'noise' in both['after']  # Runs of old have none.
    ]
    out += ['<h2>chrF by noise</h2>', _ABOUT_NOISE, grid(tables)]
  for path in sorted((workdir / 'evaluation').glob('*.json')):
    if '.' not in path.stem:
      out.append(_evaluation(path.stem, files.read_json(path)))
  pair = config['data']['pair']
  of = directions.named(pair, 'valid', 'test')
  for split in filter(of.get, scores):
    texts = [
      files.read_lines(workdir / 'translations' / f'{split}.{name}.txt')
      for name in sentences.COLUMNS
    ]
    out.append(f'<h2>Sentences: {_text(split)}</h2>')
    languages = directions.languages(of[split])
    out.append(sentences.tables(*texts, *languages))
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
  was = json.loads(json.dumps(default.get_config().to_dict()))
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


def _scores(both) -> str:
  rows = []
  for key, name in scores_lib.names(both['after']).items():
    before, after = both['before'][key], both['after'][key]
    cells = f'{before:.2f}', f'{after:.2f}', sentences.change(before, after)
    rows.append((f'<b>{name}</b>', *cells))
  size, after = f'{both["after"]["sentences"]:,} sentences', 'after'
  if 'step' in both['after']:  # Runs of old have none.
    after += f', step {both["after"]["step"]:,}'
  return table((size, 'before', after, 'change'), rows, (1, 2, 3))


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


def read_curves(path):
  """Points (step, number) of each curve in metrics.jsonl; the last step."""
  curves, last = {key: [] for key in _CURVES}, 0
  for line in journal.read_metrics(path):
    last = max(last, line['step'])
    for key, points in curves.items():
      if isinstance(line.get(key), int | float):
        points.append((line['step'], line[key]))
  return curves, last


def _curves(curves, scores, last) -> str:
  loss = [('training', curves['loss']), ('validation', curves['valid_loss'])]
  if minitrain := curves['minitrain_loss']:
    loss.append(('minitrain: memorised?', minitrain))
  chrf = [('validation', curves['valid_chrf'])]
  if not curves['valid_chrf']:
    chrf = [
      (
        split,
        [
          (0, both['before']['chrf']),
          (both['after'].get('step', last), both['after']['chrf']),
        ],
      )
      for split, both in scores.items()
    ]
  charts = [('Loss', 'nats per target token', loss), ('chrF', '0 to 100', chrf)]
  for title, unit, factor, names in _MORE_CHARTS:
    series = [
      (name, [(step, y * factor) for step, y in curves[key]])
      for key, name in names.items()
      if curves[key]
    ]
    charts += [(title, unit, series)] if series else []
  out = []
  for title, unit, series in charts:
    keys = ', '.join(
      f'<span class="key{i}">● {_text(name)}</span>'
      for i, (name, _) in enumerate(series)
    )
    out.append(
      f'<figure><figcaption><b>{title}</b>, {unit}<br>{keys}</figcaption>'
      f'{chart.lines(title, series)}</figure>'
    )
  return f'<div class="charts">{"".join(out)}</div>'


def _noise(before, after) -> str:
  """`before` may be None."""
  head = ['class', 'sentences', 'before', 'after', 'change']
  if before is None:
    head = ['class', 'sentences', 'chrF']
  rows = []
  for name in (*noise.CLASSES, scores_lib.NO_CLASS):
    row = after.get(name)
    if row and row['sentences']:
      ends = [both[name]['chrf'] for both in (before, after) if both]
      cells = [f'{row["sentences"]:,}', *(f'{chrf:.2f}' for chrf in ends)]
      if before:
        cells.append(sentences.change(*ends))
    else:
      cells = ['0', 'no sentence'] if row else ['–', 'no rule']
      cells[1:1] = [''] * (len(head) - 3)
    rows.append((_text(name), *cells))
  return table(head, rows, range(1, len(head)))


def _evaluation(split, result) -> str:
  """What mt.evaluate left."""
  found = result['scores']
  names = scores_lib.names(found).items()
  rows = [(f'<b>{n}</b>', f'{found[k]:.2f}') for k, n in names]
  head = f'{found["sentences"]:,} sentences', 'score'
  parts = [
    ('scores', table(head, rows, (1,)) + signatures(found)),
  ]
  if 'noise' in result:  # A mean has none.
    parts.append(('chrF by noise', _noise(None, result['noise'])))
  if 'against' in result:
    parts.append(_against(result['against']))
  text = _text(result.get('text', split))
  title = f'Evaluation: {text}, step {result["step"]:,}'
  return f'<h2>{title}</h2>{grid(parts)}'


def _against(other) -> tuple[str, str]:
  title = f'against {other["workdir"]}, step {other["step"]:,}'
  return title, ABOUT_BOOTSTRAP + bootstrap(other['scores'])


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
