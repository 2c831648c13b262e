"""Minimum Bayes risk, and translations that go round."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import sacrebleu

from mt.translate import loops
from mt.translate import mbr

_TEXTS = st.lists(st.text('abc é日 ', max_size=12), min_size=1, max_size=5)


@hypothesis.given(_TEXTS)
def test_chrf_is_sacrebleus(texts):
  found, metric = mbr.chrf(texts), sacrebleu.CHRF()
  for i, hypothesis_ in enumerate(texts):
    for j, reference in enumerate(texts):
      want = metric.sentence_score(hypothesis_, [reference]).score
      assert found[i, j] == pytest.approx(want, abs=1e-9)


@hypothesis.given(_TEXTS)
def test_rank_is_brute_force(texts):
  metric = sacrebleu.CHRF()

  def expected(text):
    return np.mean([metric.sentence_score(text, [t]).score for t in texts])

  (scores,) = mbr.expected_chrf(['not looked at'], [texts])
  ranked = mbr.rank(texts, scores)
  assert sorted(texts[i] for i in ranked) == sorted(set(texts))
  best = scores[ranked].tolist()
  assert best == sorted(best, reverse=True)
  for i in ranked:
    assert scores[i] == pytest.approx(expected(texts[i]), abs=1e-9)


def test_what_is_drawn_twice_counts_twice():
  texts = ['un chat noir', 'deux chiens', 'deux chiens']
  more = [texts[0], *texts]
  once, twice = mbr.expected_chrf(['', ''], [texts, more])
  assert mbr.rank(texts, once)[0] == 1
  assert mbr.rank(more, twice)[0] == 0  # The first of equals.
  with pytest.raises(AssertionError):
    mbr.rank(texts, twice)


@pytest.mark.parametrize(
  'source, text, round_',
  [
    # As a fine-tuned 270M writes it.
    ('He did all he could.', "qu'il a tout fait pour prouver " * 4, True),
    ('Why?', 'Pourquoi ? ' * 9, True),
    ('Why?', 'a' * 40, True),
    ('Why?', '你好吗' * 12, True),
    ('nooooooooooo!!!!!!!!', 'nooooooooooooooon !!!!!!!!', False),
    ('hahahahahahaha', 'hahahahahahahahaha', False),
    ('Very, very, very good', 'Très, très, très bon', False),
    ('Day after day', 'Jour après jour après jour', False),
    ('A very long day, a very long day', 'Une longue journée, ' * 2, False),
    ('', '', False),
  ],
)
def test_what_goes_round(source, text, round_):
  assert loops.goes_round(source, text) == round_
