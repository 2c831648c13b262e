"""Minimum Bayes risk: of several translations, the one most like all of them.

The expected score of a candidate is its mean over all candidates as references:
samples stand for what the model thinks possible (Eikema and Aziz, arXiv
2108.04718). Candidates that are drawn twice count twice. The score is chrF, or
another one, such as that of mt/evaluate/comet.py.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence

import chex
import numpy as np

# Sources, candidates of each -> expected scores of each's candidates.
Expected = Callable[
  [Sequence[str], Sequence[Sequence[str]]], Sequence[np.ndarray]
]
_ORDER, _BETA2 = 6, 4.0  # Of chrF2: character n-grams, recall counts double.


def chrf(texts: Sequence[str]) -> np.ndarray:
  """chrF2 of each text against each: [n, n] float64, 0 to 100.

  Row i has text i as the hypothesis. As sacreBLEU's sentence_chrf (Popovic,
  W15-3049), but n-grams are counted once for all pairs.
  """
  n = len(texts)
  plain = [''.join(text.split()) for text in texts]
  precision, recall, orders = (np.zeros((n, n)) for _ in range(3))
  for size in range(1, _ORDER + 1):
    counts = _counts(plain, size)
    total = counts.sum(1)
    match = np.stack([np.minimum(row, counts).sum(1) for row in counts])
    both = (total[:, None] > 0) & (total > 0)
    precision += np.where(both, match / np.maximum(total, 1)[:, None], 0)
    recall += np.where(both, match / np.maximum(total, 1), 0)
    orders += both
  # Means over the orders that both have: F is of the same degree in both.
  weighed = _BETA2 * precision + recall
  score = (1 + _BETA2) * precision * recall / np.where(weighed, weighed, 1)
  return 100 * score / np.maximum(orders, 1)


def _counts(texts, size):
  """[n, number of different n-grams]: how often each text has each."""
  numbers = {}
  found = []
  for text in texts:
    grams = Counter(text[i : i + size] for i in range(len(text) - size + 1))
    found.append(
      {numbers.setdefault(g, len(numbers)): c for g, c in grams.items()}
    )
  out = np.zeros((len(texts), len(numbers)), np.int32)
  for row, grams in zip(out, found, strict=True):
    row[list(grams)] = list(grams.values())
  return out


def expected_chrf(
  sources: Sequence[str], candidates: Sequence[Sequence[str]]
) -> list[np.ndarray]:
  """Expected chrF of each candidate: [candidates] float64 for each source."""
  del sources  # Other metrics look at them.
  return [chrf(texts).mean(1) for texts in candidates]


def rank(texts: Sequence[str], expected: np.ndarray) -> list[int]:
  """Numbers of the different texts [n], by their expected scores [n].

  The best comes first, and of equally good ones the first.
  """
  chex.assert_shape(expected, (len(texts),))
  first = {}
  for i, text in enumerate(texts):
    first.setdefault(text, i)
  return sorted(first.values(), key=lambda i: (-expected[i], i))
