import math
import re
from xml.etree import ElementTree

import pytest

from mt.evaluate import chart


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
  """The element, the dots of each curve and how many points each line has."""
  root = ElementTree.fromstring(text)
  dots, lines = {}, {}
  for e in root.iter():
    color = re.search(
      r'stroke: var\((--a|--b|--good|--dim)\)', e.get('style', '')
    )
    if color and e.tag.endswith('use'):
      place = float(e.get('x')), float(e.get('y'))
      dots.setdefault(color[1], []).append(place)
    elif color and 'fill: none' in e.get('style'):
      lines[color[1]] = len(re.findall('[ML]', e.get('d')))
  return root, dots, lines


def test_higher_is_higher_and_later_is_further_right():
  text = chart.lines('Loss', [('a', [(0, 1.0), (10, 3.0), (20, 2.0)])])
  root, dots, _ = _svg(text)
  xs, ys = zip(*dots['--a'], strict=True)
  assert list(xs) == sorted(xs)
  assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], 0.01)
  assert ys[1] < ys[2] < ys[0]
  assert ys[2] == pytest.approx((ys[0] + ys[1]) / 2, abs=0.1)
  _, _, width, height = map(float, root.get('viewBox').split())
  assert all(0 <= x <= width and 0 <= y <= height for x, y in dots['--a'])


def test_it_belongs_into_a_page():
  """Text is text, colours are the page's, nothing is fetched or changed."""
  text = chart.lines('<script>"&', [('a', [(0, 1.0), (1, 2.0)])])
  root, _, _ = _svg(text)
  assert root[0].text == '<script>"&' and root[0].tag.endswith('title')
  texts = [e.text for e in root.iter() if e.tag.endswith('text')]
  assert 'step' in texts and '1' in texts and '1.0' in texts
  assert not re.search(
    '#00000|<style|metadata|font-family|width="[0-9.]+pt', text
  )
  assert all(x[0] == '#' for x in re.findall('href="([^"]*)', text))
  assert text == chart.lines('<script>"&', [('a', [(0, 1.0), (1, 2.0)])])


def test_each_series_has_its_colour_and_many_points_have_no_dots():
  many = [(x, x) for x in range(10**4)]
  _, dots, lines = _svg(
    chart.lines('t', [('a', many), ('b', [(0, 2), (1, 3)]), ('c', [(0, 1)])])
  )
  assert {name: len(d) for name, d in dots.items()} == {'--b': 2, '--good': 1}
  assert lines['--a'] < 500 and lines['--b'] == 2


def test_a_curve_without_a_colour_is_no_curve():
  series = [(name, [(0, 1.0), (1, 2.0)]) for name in 'abcde']
  _, dots, _ = _svg(chart.lines('t', series[:4]))
  assert {*dots} == {'--a', '--b', '--good', '--dim'}
  with pytest.raises(ValueError, match='zip'):
    chart.lines('t', series)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(value):
  points = [(0, 1.0), (1, value), (2, 2.0)]
  _, dots, _ = _svg(chart.lines('t', [('a', points)]))
  assert len(dots['--a']) == 2


def test_a_curve_has_two_points():
  for series in ([], [('a', [])], [('a', [(3, 1.0)]), ('b', [(3, 2.0)])]):
    assert 'no curve yet' in chart.lines('t', series)
  for value in (0, 5.0, -5.0, 1e12):
    points = [(3, value), (4, value)]
    assert len(_svg(chart.lines('t', [('a', points)]))[1]['--a']) == 2
