"""Which examples share a row."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from mt.data import bitext
from mt.data import corpus
from mt.data import epochs
from mt.data import packing
from mt.data import store
from mt.data import template as template_lib
from tests.fixtures import numbered_rows


@st.composite
def _items(draw):
  length = draw(st.integers(1, 70))  # Past 64: the bits of the free space.
  sizes = draw(st.lists(st.integers(1, length), max_size=60))
  return np.array(sizes, np.int64), length


@given(_items())
def test_best_fit(items):
  sizes, length = items
  rows = packing.best_fit(sizes, length)
  assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
  assert all(0 < sum(sizes[i] for i in row) <= length for row in rows)
  # Replayed in order: each item went into the fullest row that took it, and a
  # new row was opened only where none did. Ties are free.
  row_of = {i: r for r, row in enumerate(rows) for i in row}
  free = []
  for item, size in enumerate(sizes):
    fitting = [f for f in free if f >= size]
    if row_of[item] == len(free):
      assert not fitting
      free.append(length)
    assert free[row_of[item]] == min(fitting, default=length)
    free[row_of[item]] -= size


def test_best_fit_by_hand():
  # 3 opens a row, 2 closes it; 4, 3: a row each; 1 goes to 4 and not to 3.
  sizes = np.array([3, 2, 4, 3, 1, 5, 2])
  assert packing.best_fit(sizes, 5) == [[0, 1], [2, 4], [3, 6], [5]]


@pytest.mark.parametrize('name', ['train', 'sample'])
def test_little_of_a_packed_row_is_padding(name):
  """Of the rows of an epoch, with Gemma 3's tokenizer."""
  path = numbered_rows.SHARED / 'data' / 'MTNT' / 'train' / 'train.en-fr.tsv'
  if name == 'sample':
    path = corpus.SAMPLE / 'train' / 'train.en-fr.tsv'
  if not path.exists():
    pytest.skip(f'no {path}')
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.01)
  plain = template_lib.Template('English: {source}\nFrench:', ' ')
  made = store.open_store(text, numbered_rows.gemma('gemma3'), plain)
  examples, rows = epochs.Epochs(made, 256, seed=0).block(0)
  fits = examples.sizes <= 256
  assert fits.mean() > 0.99
  padding = 1 - examples.sizes[fits].sum() / (256 * len(rows))
  assert 0 <= padding < 0.03
