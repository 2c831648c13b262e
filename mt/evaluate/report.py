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
from mt.evaluate import chart
from mt.evaluate import noise
from mt.evaluate import scores as scores_lib
from mt.evaluate import sentences

_METRICS = {'bleu': 'BLEU', 'bleu_intl': 'BLEU intl', 'chrf': 'chrF'}
_CURVES = 'loss', 'valid_loss', 'minitrain_loss', 'valid_chrf', 'targets_per_s'
_ABOUT_NOISE = (
  '<p class="dim">A sentence may be in several classes; the rules are '
  'in mt/evaluate/noise.py.</p>'
)
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1c20;--dim:#5e5e6a;
--line:#dcdce2;--card:#f6f6f9;--a:#1d5fbf;--b:#b4500f;--mark:#ffe0c7;
--good:#17693a;--bad:#a8261d}
@media(prefers-color-scheme:dark){:root{--bg:#141519;--fg:#e7e7ea;--dim:#a0a0ac;
--line:#35363d;--card:#1d1f25;--a:#7fb2ff;--b:#ffb077;--mark:#5c3410;
--good:#7dd39b;--bad:#ff9c92}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:75rem;background:var(--bg);
color:var(--fg);font:1rem/1.5 system-ui,sans-serif;
-webkit-text-size-adjust:100%}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0}.dim,small,figcaption,.empty{color:var(--dim)}
.grid{display:grid;gap:1rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
figure{margin:0;padding:.6rem;background:var(--card);border-radius:.5rem}
figcaption{font-size:.85rem}figcaption b{color:var(--fg)}
svg{display:block;width:100%;height:auto;overflow:visible;
stroke-linejoin:round}
.key0{color:var(--a)}.key1{color:var(--b)}.key2{color:var(--good)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600}thead th{color:var(--dim);font-size:.85rem}
.num{text-align:right}.numbers{max-width:40rem}
.numbers th,.numbers td{white-space:nowrap}
@media(max-width:30rem){.numbers th,.numbers td{padding:.3rem .2rem;
font-size:.85rem}}
.up{color:var(--good)}.down{color:var(--bad)}
code{font:.85rem/1.4 ui-monospace,monospace;overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:.2rem;padding:0 .1em}
.gap{color:var(--b);font-weight:700}
.tag{display:inline-block;border:1px solid var(--line);border-radius:1rem;
padding:0 .5rem;margin-right:.3rem;font-size:.75rem;color:var(--dim)}
.sentences{table-layout:fixed}.sentences p{margin:0;white-space:pre-wrap}
@media(max-width:48rem){.sentences,.sentences tbody,.sentences tr,.sentences td{
display:block}.sentences thead{display:none}
.sentences tr{padding:.6rem;margin:.6rem 0;background:var(--card);
border-radius:.5rem}.sentences td{border:0;padding:.2rem 0}
.sentences td::before{content:attr(data-name);display:block;font-size:.75rem;
color:var(--dim)}}
"""


def write(workdir: pathlib.Path) -> None:
  """Writes report.html of what a run has left so far.

  Raises:
    errors.UserError: no run there, a damaged file, or no place to write.
  """
  files.write(workdir / 'report.html', page(workdir))


def page(workdir: pathlib.Path) -> str:
  """The page, see `write`."""
  config = files.read_json(workdir / 'config.json')
  curves, last = _read_curves(workdir / 'metrics.jsonl')
  scores = {}
  if (workdir / 'scores.json').exists():
    scores = files.read_json(workdir / 'scores.json')
  name = workdir.absolute().name
  steps = config['train']['max_steps']
  title = ', '.join(
    config[group][knob]
    for group, knob in (
      ('weights', 'source'),
      ('data', 'pair'),
      ('train', 'parts'),
    )
  )
  state = 'done' if scores else 'running: scores come at the end'
  out = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<title>{_text(name)}</title><style>{_STYLE}</style></head><body>'
    f'<h1>{_text(name)}</h1><p class="dim">{_text(title)}; '
    f'step {last:,} of {steps:,}, {state}</p>'
  ]
  if scores:
    tables = [(split, _scores(both)) for split, both in scores.items()]
    out += ['<h2>Scores</h2>', _grid(tables)]
    out.append(_signatures(next(iter(scores.values()))['after']))
  out += ['<h2>Curves</h2>', _curves(curves, scores, steps)]
  if scores:
    tables = [
      (split, _noise(both['before']['noise'], both['after']['noise']))
      for split, both in scores.items()
      if 'noise' in both['after']  # Runs of old have none.
    ]
    out += ['<h2>chrF by noise</h2>', _ABOUT_NOISE, _grid(tables)]
  for path in sorted((workdir / 'evaluation').glob('*.json')):
    if '.' not in path.stem:
      out.append(_evaluation(path.stem, files.read_json(path)))
  for split in scores:
    out.append(f'<h2>Sentences: {_text(split)}</h2>')
    texts = [
      files.read_lines(workdir / 'translations' / f'{split}.{name}.txt')
      for name in sentences.COLUMNS
    ]
    out.append(sentences.tables(*texts, *config['data']['pair'].split('-')))
  defaults = default.get_config().to_dict()
  old = json.loads(json.dumps(defaults))
  rows = [
    (f'<code>{_text(knob)}</code>', _code(now), _code(was))
    for knob, was, now in run_folder.differences(old, config)
  ]
  out.append('<h2>Config that differs from the default</h2>')
  out.append(_table(('knob', 'here', 'default'), rows) if rows else _nothing())
  rows = [
    (_text(key), _code(value))
    for key, value in files.read_json(workdir / 'environment.json').items()
  ]
  out += ['<h2>Environment</h2>', _table(('', ''), rows), '</body></html>\n']
  return '\n'.join(out)


def _text(value: Any) -> str:
  return html.escape(str(value))


def _code(value):
  shown = value if isinstance(value, str) else json.dumps(value)
  return f'<code>{_text(shown)}</code>'


def _nothing():
  return '<p class="dim">nothing</p>'


def _table(head, rows, numbers: Sequence[int] = ()) -> str:
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
  for key, name in _METRICS.items():
    before, after = both['before'][key], both['after'][key]
    cells = f'{before:.2f}', f'{after:.2f}', sentences.change(before, after)
    rows.append((f'<b>{name}</b>', *cells))
  head = (
    f'{both["after"]["sentences"]:,} sentences',
    'before',
    f'after{_of_step(both["after"])}',
    'change',
  )
  return _table(head, rows, (1, 2, 3))


def _of_step(scores) -> str:
  """Runs of old have no step in their scores."""
  return f', step {scores["step"]:,}' if 'step' in scores else ''


def _signatures(scores) -> str:
  return ''.join(
    f'<p class="dim"><small>{name}: <code>'
    f'{_text(scores[key + "_signature"])}</code></small></p>'
    for key, name in _METRICS.items()
  )


def _grid(parts) -> str:
  """Parts with titles, side by side where there is room."""
  sections = ''.join(
    f'<section><h3>{_text(title)}</h3>{part}</section>' for title, part in parts
  )
  return f'<div class="grid">{sections}</div>'


def _read_curves(path):
  """Points (step, number) of each curve in metrics.jsonl; the last step."""
  curves, last = {key: [] for key in _CURVES}, 0
  for line in journal.read_metrics(path, most=5000):
    last = max(last, line['step'])
    for key, points in curves.items():
      if isinstance(line.get(key), int | float):
        points.append((line['step'], line[key]))
  return curves, last


def _curves(curves, scores, steps) -> str:
  loss = [('training', curves['loss']), ('validation', curves['valid_loss'])]
  if minitrain := curves['minitrain_loss']:
    loss.append(('minitrain: memorised?', minitrain))

  def at(both, when):  # Runs of old have no step in their scores.
    return both[when].get('step', {'before': 0, 'after': steps}[when])

  chrf = [('validation', curves['valid_chrf'])]
  if not chrf[0][1]:
    chrf = [
      (split, [(at(both, when), both[when]['chrf']) for when in both])
      for split, both in scores.items()
    ]
  speed = [('target tokens per second', curves['targets_per_s'])]
  out = []
  for title, unit, series in (
    ('Loss', 'nats per target token', loss),
    ('chrF', '0 to 100', chrf),
    ('Throughput', '', speed),
  ):
    keys = ', '.join(
      f'<span class="key{i}">● {_text(name)}</span>'
      for i, (name, _) in enumerate(series)
    )
    unit = f', {unit}' if unit else ''
    out.append(
      f'<figure><figcaption><b>{title}</b>{unit}<br>{keys}</figcaption>'
      f'{chart.lines(title, series)}</figure>'
    )
  return f'<div class="charts">{"".join(out)}</div>'


def _noise(before, after) -> str:
  """`before` may be None."""
  rows = []
  for name in (*noise.CLASSES, scores_lib.NO_CLASS):
    row = after.get(name)
    if row is None:
      cells = '–', *[''] * (2 * bool(before)), 'no rule'
    elif not row['sentences']:
      cells = '0', *[''] * (2 * bool(before)), 'no sentence'
    else:
      cells = [f'{row["sentences"]:,}']
      if before:
        cells += [f'{before[name]["chrf"]:.2f}']
      cells += [f'{row["chrf"]:.2f}']
      if before:
        cells += [sentences.change(before[name]['chrf'], row['chrf'])]
    rows.append((_text(name), *cells))
  head = ['class', 'sentences', 'before', 'after', 'change']
  if not before:
    head = ['class', 'sentences', 'chrF']
  return _table(head, rows, range(1, len(head)))


def _evaluation(split, result) -> str:
  """What mt.evaluate left."""
  found = result['scores']
  rows = [(f'<b>{n}</b>', f'{found[k]:.2f}') for k, n in _METRICS.items()]
  head = f'{found["sentences"]:,} sentences', 'score'
  parts = [
    ('scores', _table(head, rows, (1,)) + _signatures(found)),
    ('chrF by noise', _noise(None, result['noise'])),
  ]
  if 'against' in result:
    other = result['against']
    rows = [
      (
        f'<b>{name}</b>',
        f'{row["baseline"]:.2f} ±{row["baseline_interval"]:.2f}',
        f'{row["score"]:.2f} ±{row["interval"]:.2f}',
        sentences.change(row['baseline'], row['score']),
        f'{row["p"]:.3f}',
      )
      for key, name in _METRICS.items()
      for row in [other['scores'][key]]
    ]
    note = (
      '<p class="dim">Paired bootstrap. ± is half of the 95 % interval, p how '
      'likely chance alone makes such a difference.</p>'
    )
    table = _table(('', 'there', 'here', 'change', 'p'), rows, range(1, 5))
    title = f'against {other["workdir"]}, step {other["step"]:,}'
    parts.append((title, note + table))
  title = f'Evaluation: {_text(split)}, step {result["step"]:,}'
  return f'<h2>{title}</h2>{_grid(parts)}'
