import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
import pytest

from mt.evaluate import chart


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (0.31, 2.4, [0.5, 1.0, 1.5, 2.0]),
    (1, 7, [2, 4, 6]),
    (0, 0.004, [0, 0.001, 0.002, 0.003, 0.004]),
    (5, 5, [5]),
  ],
)
def test_ticks(low, high, expected):
  assert chart.ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_within(low, size):
  found = chart.ticks(low, low + size)
  assert 1 <= len(found) <= 6
  slack = size * 1e-6 + abs(low) * 1e-9
  assert all(low - slack <= t <= low + size + slack for t in found)


def test_thin_keeps_the_mean():
  points = [(float(x), float(x % 7)) for x in range(1000)]
  thinned = chart.thin(points, 100)
  assert len(thinned) == 100
  assert sum(y for _, y in thinned) / 100 == pytest.approx(
    sum(y for _, y in points) / 1000
  )
  assert thinned[0] == (4.5, sum(range(7)) / 10 + (0 + 1 + 2) / 10)
  assert chart.thin(points[:100], 100) == points[:100]


def _svg(text):
  root = ElementTree.fromstring(text)
  return root, [e for e in root if e.tag == 'circle']


def test_higher_is_higher_and_later_is_further_right():
  _, dots = _svg(chart.lines('Loss', [('a', [(0, 1.0), (10, 3.0), (20, 2.0)])]))
  xs = [float(d.get('cx')) for d in dots]
  ys = [float(d.get('cy')) for d in dots]
  assert xs == sorted(xs) and xs[1] - xs[0] == pytest.approx(
    xs[2] - xs[1], 0.01
  )
  assert ys[1] < ys[2] < ys[0]
  assert ys[2] == pytest.approx((ys[0] + ys[1]) / 2, abs=0.1)


def test_all_of_it_is_inside():
  series = [('a', [(x, math.sin(x) * 1e3) for x in range(30)])]
  root, dots = _svg(chart.lines('t', series))
  _, _, width, height = map(float, root.get('viewBox').split())
  for dot in dots:
    assert 0 <= float(dot.get('cx')) <= width
    assert 0 <= float(dot.get('cy')) <= height


def test_series_have_their_own_class():
  root, dots = _svg(
    chart.lines('t', [('a', [(0, 1)]), ('b', [(0, 2), (1, 3)])])
  )
  assert [d.get('class') for d in dots] == ['series0', 'series1', 'series1']
  assert [e.get('class') for e in root if e.tag == 'polyline'] == ['series1']


def test_many_points_are_a_line_without_dots():
  root, dots = _svg(chart.lines('t', [('a', [(x, x) for x in range(10**4)])]))
  (line,) = [e for e in root if e.tag == 'polyline']
  assert not dots and len(line.get('points').split()) < 500


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(value):
  _, dots = _svg(chart.lines('t', [('a', [(0, 1.0), (1, value), (2, 2.0)])]))
  assert len(dots) == 2


def test_nothing_and_one_value():
  assert 'nothing yet' in chart.lines('t', [('a', [])])
  assert 'nothing yet' in chart.lines('t', [])
  for value in (0, 5.0, -5.0):
    assert len(_svg(chart.lines('t', [('a', [(3, value)])]))[1]) == 1


def test_names_are_text():
  root, _ = _svg(chart.lines('<script>"&', [('a', [(0, 1)])], 'a<b'))
  assert root.find('title').text == '<script>"&'
  assert 'a<b' in [e.text for e in root]
