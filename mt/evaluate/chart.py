"""Curves as SVG, to stand inside an HTML page.

Colours come from the page: its CSS variables --a, --b and --good of the curves,
--dim of a fourth one and of the text, and --line of the grid.
"""

from collections.abc import Sequence
import html
import io
import math
import pathlib
import re

Point = tuple[float, float]
Series = tuple[str, Sequence[Point]]  # Its name, its points by growing x.

_MOST = 120  # Points in a line; more would be in the same pixels.
# Matplotlib knows no variables: each has a colour of its own in its output.
_NAMES = '--a', '--b', '--good', '--dim', '--line'
_VARIABLES = {f'#00000{i}': name for i, name in enumerate(_NAMES, 1)}
_NO_METADATA = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
# Left, bottom, width, height. A layout that fits itself takes twice the time.
_PLACE = 0.13, 0.18, 0.86, 0.79
_STYLE = pathlib.Path(__file__).with_suffix('.mplstyle')


def thin(points: Sequence[Point], most: int = _MOST) -> list[Point]:
  """At most `most` points: means of neighbours, in x and in y."""
  if len(points) <= most:
    return list(points)
  out = []
  for i in range(most):
    part = points[i * len(points) // most : (i + 1) * len(points) // most]
    out.append(tuple(sum(v) / len(part) for v in zip(*part, strict=True)))
  return out


def figure(title: str, unit: str, series: Sequence[Series]) -> str:
  """A chart under its title, with what each colour stands for."""
  keys = ', '.join(
    f'<span class="key{i}">● {html.escape(name)}</span>'
    for i, (name, _) in enumerate(series)
  )
  return (
    f'<figure><figcaption><b>{title}</b>, {unit}<br>{keys}</figcaption>'
    f'{lines(title, series)}</figure>'
  )


def lines(title: str, series: Sequence[Series]) -> str:
  """A chart of one to four curves.

  Args:
    title: for those who cannot see it.
    series: points that are not finite are left out. A curve of up to 40 points
      shows each of them as a dot.

  Returns:
    An <svg> element; its width is that of what it stands in.
  """
  series = [
    (name, [p for p in points if all(map(math.isfinite, p))])
    for name, points in series
  ]
  if all(len(points) < 2 for _, points in series):
    return '<p class="empty">no curve yet</p>'
  import matplotlib as mpl  # Here: loading it takes half a second.
  from matplotlib import figure as mpl_figure

  with mpl.rc_context(fname=_STYLE):
    fig = mpl_figure.Figure(figsize=(5.4, 3.1))
    axes = fig.add_axes(_PLACE)
    colors = [*_VARIABLES][:4][: len(series)]
    for (_, points), color in zip(series, colors, strict=True):
      x, y = zip(*thin(points), strict=True) if points else ((), ())
      marker, alpha = ('o', 1) if len(points) <= 40 else ('', 0.6)
      axes.plot(x, y, color=color, marker=marker, alpha=alpha)
    axes.set_xlabel('step')
    axes.locator_params('x', integer=True)
    axes.locator_params(nbins=6)
    out = io.StringIO()
    fig.savefig(out, format='svg', transparent=True, metadata=_NO_METADATA)
  return _for_page(title, out.getvalue())


def _for_page(title, svg):
  """An SVG file as an element of a page that has others like it."""
  svg = svg[svg.index('<svg') :]
  drop = (
    r' (?:width|height)="[\d.]+pt"',
    r'(?<=<g) id="[^"]*"',
    r'(?s:<style.*?</style>)',  # It would hold for all of the page.
    r' font-family: [^;]*;',
  )
  svg = re.sub('|'.join(drop), '', svg)
  for color, variable in _VARIABLES.items():
    svg = svg.replace(color, f'var({variable})')
  head, rest = svg.split('>', 1)
  return f'{head} role="img"><title>{html.escape(title)}</title>{rest}'
