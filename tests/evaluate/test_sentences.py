"""Sentences side by side."""

import re

import pytest

from mt.evaluate import sentences
from tests.evaluate import pages


def test_samples_are_spread_over_the_split():
  columns = [[f'{name}{i}' for i in range(100)] for name in 'srba']
  text = sentences.samples(*columns)
  blocks = text.split('\n\n')
  assert len(blocks) == 8
  assert blocks[0].split() == (
    ['source', 's0', 'reference', 'r0', 'before', 'b0', 'after', 'a0']
  )
  assert 's99' in blocks[-1] and 's50' not in blocks[-1]
  # Fewer sentences than asked for: each once.
  text = sentences.samples(*(c[:3] for c in columns))
  assert text.count('source') == 3


@pytest.mark.parametrize(
  'reference, text, expected',
  [
    ('le chat dort', 'le chat dort', 'le chat dort'),
    ('le chat dort', 'le chien dort', 'le <mark>chien</mark> dort'),
    ('a b c d', 'a x y d', 'a <mark>x y</mark> d'),
    ('le gros chat', 'le chat', 'le<span class="gap">‸</span> chat'),
    ('un chat', 'un  chat .', 'un  chat <mark>.</mark>'),
    ('chat', '', '<span class="gap">‸</span>'),
    ('', 'chat', '<mark>chat</mark>'),
    ('l’ami', "l'ami", 'l&#x27;ami'),
    ('l’ami', "l'amie", 'l&#x27;<mark>amie</mark>'),
    ("l'ami", 'l’ami', 'l’ami'),
    ('x' + ' de' * 300, 'y' + ' de' * 300, '<mark>y</mark>' + ' de' * 300),
    ('私は猫が好き', '私は犬が好き', '私は<mark>犬</mark>が好き'),
    ('a', '<b>', '<mark>&lt;b&gt;</mark>'),
    ('a 😂', 'a 😭 ', 'a <mark>😭</mark> '),
  ],
)
def test_differences_are_marked(reference, text, expected):
  assert sentences.marked(reference, text) == expected


def test_nothing_of_a_text_is_lost():
  for reference, text in zip(
    pages.REFERENCES * 2, pages.BEFORE + pages.AFTER, strict=True
  ):
    page = pages.Page(sentences.marked(reference, text))
    shown = ''.join(t for tag, t in page.texts if tag != 'span')
    assert shown == text


def _tables(*columns, **marked):
  texts = [*zip(sentences.COLUMNS, columns, strict=True)]
  return sentences.tables(texts, ('en', 'fr'), **marked)


def test_sentences_are_spread_and_the_worst_are_shown():
  number = 200
  sources = [f'source {i}' for i in range(number)]
  references = [f'la phrase numéro {i}' for i in range(number)]
  before, after = references[:], references[:]
  before[0] = 'xxx'  # Gained.
  after[7] = 'zzz'  # Lost all.
  after[9] = 'la phrase'  # Lost some.
  marked = {'loops': [3], 'cut_off': range(100, 200)}
  text = _tables(sources, references, before, after, **marked)
  assert '40 of 200, evenly spread' in text
  assert text.count('<tr>') == 1 + 40 + 1 + 2 + 1 + 1 + 1 + 10
  titles = 'Those that lost most|1 that go round|100 that are cut off'
  spread, lost, loops, cut_off = re.split(titles, text)
  assert 'source 3<' in loops and 'source 3<' not in lost
  assert 'source 199<' in cut_off
  assert 'source 0<' in spread and 'source 199<' in spread
  assert 'source 7<' not in spread
  assert lost.index('source 7<') < lost.index('source 9<')
  assert 'source 0<' not in lost


def test_few_sentences_are_all_shown():
  text = _tables(pages.SOURCES, pages.REFERENCES, pages.BEFORE, pages.AFTER)
  assert '3 of 3, evenly spread' in text
  page = pages.Page(text)
  assert [a['lang'] for tag, a in page.tags if tag == 'p' and 'lang' in a][
    :4
  ] == ['en', 'fr', 'fr', 'fr']
  assert 'emoji' in page.text('span')


def test_a_text_for_each_source():
  with pytest.raises(AssertionError):
    _tables(pages.SOURCES, pages.REFERENCES, pages.BEFORE, pages.AFTER[:2])
