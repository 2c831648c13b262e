"""Curves as SVG, to stand inside an HTML page.

Colours come from the page: CSS classes `series0`, `series1`, …; lines, labels
and axes inherit `currentColor`.
"""

from collections.abc import Sequence
import html
import math

Point = tuple[float, float]
Series = tuple[str, Sequence[Point]]  # Its name, its points by growing x.

_WIDTH, _HEIGHT = 400, 230  # A phone shows it one to one.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30
_MOST = 120  # Points in a line; more would be in the same pixels.


def ticks(low: float, high: float) -> list[float]:
  """One to six round numbers from `low` to `high`."""
  if not high > low:
    return [low]
  raw = (high - low) / 5
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [n * step for n in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = _MOST) -> list[Point]:
  """At most `most` points: means of neighbours, in x and in y."""
  if len(points) <= most:
    return list(points)
  out = []
  for i in range(most):
    part = points[i * len(points) // most : (i + 1) * len(points) // most]
    out.append(tuple(sum(v) / len(part) for v in zip(*part, strict=True)))
  return out


def lines(title: str, series: Sequence[Series], x_name: str = 'step') -> str:
  """A chart of one or more curves.

  Args:
    title: for those who cannot see it.
    series: points that are not finite are left out. A curve of up to 40 points
      shows each of them as a dot.
    x_name: under the axis.

  Returns:
    An <svg> element; its width is that of what it stands in.
  """
  series = [
    (name, [p for p in points if all(map(math.isfinite, p))])
    for name, points in series
  ]
  every = [p for _, points in series for p in points]
  if not every:
    return '<p class="empty">nothing yet</p>'
  (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every, strict=True))
  if y0 == y1:
    y0, y1 = y0 - (abs(y0) or 1) / 10, y1 + (abs(y1) or 1) / 10

  def x(value):
    share = (value - x0) / (x1 - x0) if x1 > x0 else 0.5
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

  def y(value):
    share = (value - y0) / (y1 - y0)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

  out = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    f'<title>{html.escape(title)}</title>'
  ]
  for tick in ticks(y0, y1):
    out.append(
      f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
      f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
      f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">'
      f'{tick:.6g}</text>'
    )
  for tick in ticks(x0, x1):
    out.append(
      f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 14}" '
      f'text-anchor="middle">{tick:.10g}</text>'
    )
  out.append(
    f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" '
    f'text-anchor="middle">{html.escape(x_name)}</text>'
  )
  for number, (_, points) in enumerate(series):
    places = [f'{x(a):.1f},{y(b):.1f}' for a, b in thin(points)]
    many = ' many' if len(places) > 40 else ''
    if len(places) > 1:
      out.append(
        f'<polyline class="series{number}{many}" points="{" ".join(places)}"/>'
      )
    for place in () if many else places:
      a, b = place.split(',')
      out.append(f'<circle class="series{number}" cx="{a}" cy="{b}" r="2.5"/>')
  out.append('</svg>')
  return ''.join(out)
