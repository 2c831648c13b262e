"""Examples to rows: packing, what a row holds, what neighbours see of it."""

import functools
import itertools

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from configs import debug
from mt.data import batches
from mt.data import bitext
from mt.data import corpus
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import model
from mt.gemma import sizes
from mt.train import step
from tests.fixtures import numbered_rows

PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')


# Which examples share a row.


@st.composite
def _items(draw):
  length = draw(st.integers(1, 70))  # Past 64: the bits of the free space.
  sizes = draw(st.lists(st.integers(1, length), max_size=60))
  return np.array(sizes, np.int64), length


@given(_items())
def test_best_fit(items):
  sizes, length = items
  rows = batches.best_fit(sizes, length)
  assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
  assert all(0 < sum(sizes[i] for i in row) <= length for row in rows)
  assert len(rows) <= len(sizes)
  assert batches.best_fit(sizes, length) == rows
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
  assert batches.best_fit(sizes, 5) == [[0, 1], [2, 4], [3, 6], [5]]


@pytest.mark.parametrize('name', ['train', 'sample'])
def test_little_of_a_packed_row_is_padding(name):
  """Of the rows of an epoch, with Gemma 3's tokenizer."""
  path = numbered_rows.SHARED / 'data' / 'MTNT' / 'train' / 'train.en-fr.tsv'
  if name == 'sample':
    path = corpus.SAMPLE / 'train' / 'train.en-fr.tsv'
  if not path.exists():
    pytest.skip(f'no {path}')
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.01)
  made = store.open_store(text, numbered_rows.gemma('gemma3'), PLAIN)
  rows = batches.Rows(made, 256, seed=0, num_rows=1)
  examples, _ = rows.part(0)
  fits = examples.sizes <= 256
  assert fits.mean() > 0.99
  padding = 1 - examples.sizes[fits].sum() / (
    256 * numbered_rows.epoch_size(rows, 0)
  )
  assert 0 <= padding < 0.03


# What stands in a row.


def test_a_row_by_hand():
  examples = store.Examples(
    tokens=np.array([2, 7, 8, 1, 2, 0, 9, 9, 1], np.int32),
    offsets=np.array([0, 4, 9]),
    target_starts=np.array([2, 3], np.int32),
  )
  row = batches.build_row(examples, [1, 0], 11)
  want = {
    # A token 0 inside an example is text and stays in its segment.
    'tokens': [2, 0, 9, 9, 1, 2, 7, 8, 1, 0, 0],
    'positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
    'segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    'target_mask': [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0],
  }
  assert {k: v.astype(int).tolist() for k, v in row.items()} == want
  assert row.pop('target_mask').dtype == bool
  assert {v.dtype for v in row.values()} == {np.dtype(np.int32)}
  empty = batches.build_row(examples, [], 4)
  assert all(v.shape == (4,) and not v.any() for v in empty.values())


def test_the_row_in_the_docstring():
  shown = {
    words[0]: words[1:]
    for line in batches.__doc__.splitlines()
    if (words := line.split()) and len(words) == 9
  }
  examples = store.Examples(
    tokens=np.array([2, 7, 8, 1, 2, 9, 1], np.int32),
    offsets=np.array([0, 4, 7]),
    target_starts=np.array([2, 1], np.int32),
  )
  row = batches.build_row(examples, [0, 1], 8)
  assert len(shown) == 4
  for name in ('segment_ids', 'positions', 'target_mask'):
    assert row[name].astype(int).tolist() == list(map(int, shown[name])), name
  names = ['<bos>', 'A', 'B', '<eos>', '<bos>', 'C', '<eos>', '0']
  assert shown['tokens'] == names


# Packed and alone.


def test_a_packed_batch_costs_what_its_examples_cost_alone():
  """Loss and gradients: neighbours in a row must not be seen."""
  cfg, train = sizes.SIZES['debug'], debug.get_config().train
  short = sorted(
    numbered_rows.sample_pairs(), key=lambda p: len(p.source + p.target)
  )[:6]
  tok = tokenizer.train(
    [t for p in numbered_rows.sample_pairs() for t in (p.source, p.target)],
    cfg.vocab_size,
  )
  examples = store.encode(short, tok, PLAIN)
  length = 128
  plan = batches.best_fit(examples.sizes, length)
  assert len(plan) <= len(short) / 2, 'little is packed'

  params = model.init_params(cfg, jax.random.key(1))

  @functools.partial(  # Compiling is most of the time.
    jax.jit,
    compiler_options={
      'xla_backend_optimization_level': 0,
      'xla_llvm_disable_expensive_passes': True,
    },
  )
  def value_and_grad(batch):
    def nll(p):
      return step.batch_nll(cfg, p, batch, train)

    return jax.value_and_grad(nll)(params)

  def run(rows):
    rows = rows + [[]] * (len(short) - len(rows))  # One shape for both.
    built = [batches.build_row(examples, row, length) for row in rows]
    batch = {k: np.stack([b[k] for b in built]) for k in built[0]}
    return jax.tree.map(np.float64, value_and_grad(batch))

  packed, alone = run(plan), run([[i] for i in range(len(short))])
  assert packed[0] == pytest.approx(alone[0], rel=1e-6)
  for path, want in jax.tree.leaves_with_path(alone[1]):
    got = functools.reduce(lambda t, k: t[k.key], path, packed[1])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-6, (jax.tree_util.keystr(path), error)
