"""Rows to batches: the position in the data, mixtures, processes."""

import itertools
import json
import multiprocessing
import os
import signal
import time

from absl import flags
import numpy as np
import pytest

from mt.base import errors
from mt.data import batches
from mt.data import bitext
from mt.data import store
from mt.data import template as template_lib
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal


def test_training_batches_are_the_rows_in_order():
  rows = numbered_rows.make_rows()
  got = list(batches.train_iterator([rows], [1], 4, 12))
  assert len(got) == 12
  for n, batch in enumerate(got):
    for name, dtype in {
      'tokens': np.int32,
      'positions': np.int32,
      'segment_ids': np.int32,
      'target_mask': bool,
    }.items():
      assert (
        batch[name].shape == (4, numbered_rows.LENGTH)
        and batch[name].dtype == dtype
      )
      want = [rows[4 * n + i][name] for i in range(4)]
      np.testing.assert_array_equal(batch[name], np.stack(want))


def _three(**options):
  """Sources of 40, 43 and 9 examples, told apart by their numbers."""
  second = {
    'sizes': numbered_rows.BLOCKED,
    'bounds': numbered_rows.BOUNDS,
    'first': 100,
  }
  third = {'sizes': np.arange(2, 11), 'seed': 3, 'first': 200}
  return [
    numbered_rows.make_rows(**part, **options) for part in ({}, second, third)
  ]


# Sources and weights: all that a position has to work with.
MIXTURES = {
  'packed': lambda: ([numbered_rows.make_rows()], [40]),
  'padded': lambda: ([numbered_rows.make_rows(packing=False)], [40]),
  'buckets': lambda: (
    [numbered_rows.make_rows(**numbered_rows.KINDS['buckets, blocks'])],
    [43],
  ),
  'blocks': lambda: (
    [numbered_rows.make_rows(**numbered_rows.KINDS['packed, blocks'])],
    [43],
  ),
  'mixed': lambda: (_three(), [5, 0.5, 2]),
  'mixed, padded': lambda: (_three(packing=False), [40, 43, 9]),
}
STEPS = 40


def _iterator(mixture, batch_size=4, steps=STEPS, **kwargs):
  return batches.train_iterator(
    *MIXTURES[mixture](), batch_size, steps, **kwargs
  )


@pytest.mark.parametrize('mixture', MIXTURES)
def test_a_state_brings_back_the_very_next_batches(mixture):
  sources, _ = MIXTURES[mixture]()
  border = numbered_rows.epoch_size(sources[0], 0)
  if 'buckets' not in mixture:  # Whose epochs are whole batches.
    assert border % 4 or 'padded' in mixture
  assert (
    numbered_rows.epoch_size(sources[0], 0)
    + numbered_rows.epoch_size(sources[0], 1)
    < 4 * STEPS
  )
  whole = list(_iterator(mixture))
  assert len(whole) == STEPS
  at = [0, 1, 2, border // 4, border // 4 + 1, STEPS - 1, STEPS]

  states = {}
  used = _iterator(mixture)
  for n in range(STEPS + 1):
    if n in at:
      # As the checkpoint keeps it.
      states[n] = json.loads(json.dumps(used.get_state()))
    if n < STEPS:
      numbered_rows.equal(next(used), whole[n])
  with pytest.raises(StopIteration):
    next(used)

  for n, state in states.items():
    fresh = _iterator(mixture)
    if n % 2:  # An iterator that has read ahead must forget what it read.
      next(fresh)
    fresh.set_state(state)
    assert fresh.get_state() == state
    left = list(fresh)
    assert len(left) == STEPS - n
    for got, want in zip(left, whole[n:], strict=True):
      numbered_rows.equal(got, want)

  # Backwards, on an iterator at its end.
  used.set_state(states[2])
  numbered_rows.equal(next(used), whole[2])
  assert used.get_state() != states[2]


def test_a_state_is_set_while_the_next_rows_are_read(monkeypatch):
  """The thread that reads ahead may not get in the way of the next one."""
  monkeypatch.setattr(
    numbered_rows.Store,
    'block',
    lambda self, i: time.sleep(0.01) or self.blocks[i],
  )

  def make():
    rows = numbered_rows.make_rows(bounds=(*range(0, 40, 4), 40))
    return batches.train_iterator([rows], [1], 4, STEPS)

  whole, used = list(make()), make()
  for n in (0, 10, 3):
    used.set_state({'batches_taken': n})
    numbered_rows.equal(next(used), whole[n])
  used.set_state({'batches_taken': 1})
  numbered_rows.all_equal(list(used), whole[1:])


def test_more_steps_begin_with_the_same_batches():
  for mixture in MIXTURES:
    short = list(_iterator(mixture, steps=10))
    numbered_rows.all_equal(short, list(_iterator(mixture))[:10])


def test_closing_keeps_the_position():
  whole, used = list(_iterator('packed')), _iterator('packed')
  next(used)
  used.close()
  used.close()
  numbered_rows.equal(next(used), whole[1])


@pytest.mark.parametrize('mixture', MIXTURES)
def test_a_batch_knows_its_pairs(mixture):
  """For a message; by what its tokens say, padding aside."""
  iterator = _iterator(mixture)
  for number, batch in enumerate(itertools.islice(iterator, 9)):
    begins = (batch['positions'] == 0) & (batch['segment_ids'] > 0)
    want = [str(token) for token in batch['tokens'][begins]]
    assert iterator.pair_ids(number) == want and want


@pytest.mark.parametrize('processes', [2, 4])
@pytest.mark.parametrize('mixture', MIXTURES)
def test_each_process_reads_its_part(mixture, processes):
  whole = list(_iterator(mixture))
  parts = [
    list(_iterator(mixture, own=own))
    for own in np.split(np.arange(4), processes)
  ]
  assert all(
    len(x) == 4 // processes for part in parts for b in part for x in b.values()
  )
  joined = [
    {k: np.concatenate([b[k] for b in bs]) for k in bs[0]}
    for bs in zip(*parts, strict=True)
  ]
  # The global batch, row for row; so the parts are disjoint.
  numbered_rows.all_equal(joined, whole)


@pytest.mark.parametrize('mixture', MIXTURES)
def test_a_state_does_not_depend_on_the_number_of_processes(mixture):
  whole = list(_iterator(mixture))
  used = _iterator(mixture, own=[2, 3])
  for _ in range(7):
    next(used)
  state = json.loads(json.dumps(used.get_state()))
  # Rows may be shared out in any way, as the devices of a mesh have them.
  for own in ([0, 1, 2, 3], [0, 1], [2, 3], [1], [3], [0, 2]):
    fresh = _iterator(mixture, own=own)
    fresh.set_state(state)
    left = list(fresh)
    assert len(left) == STEPS - 7
    for got, want in zip(left, whole[7:], strict=True):
      numbered_rows.equal(got, {k: v[own] for k, v in want.items()})


# Mixtures.


def _tagged(count, tag):
  """Rows of `count` examples of two tokens, the first of them `tag`."""
  tokens = np.array([[tag, 1 + i] for i in range(count)], np.int32)
  examples = store.make_examples(
    np.full(count, 2), np.ones(count, np.int32), tokens.reshape(-1)
  )
  return batches.Rows(numbered_rows.Store((examples,)), 2, tag, 1100)


def _tags(weights, counts=(50, 60, 70), steps=10):
  sources = [_tagged(count, tag) for tag, count in enumerate(counts)]
  got = list(batches.train_iterator(sources, weights, 100, steps))
  return np.concatenate([b['tokens'] for b in got])


@pytest.mark.parametrize(
  'weights',
  [(3, 1, 1), (0.6, 0.2, 0.2), (1, 1, 1), (0.5, 100, 7), (694, 90, 9)],
)
def test_sources_are_mixed_by_their_weights(weights):
  tokens = _tags(weights)
  assert tokens.shape == (1000, 2)
  shares = np.array(weights) / sum(weights)
  for tag, share in enumerate(shares):
    mine = tokens[tokens[:, 0] == tag]
    assert abs(len(mine) - 1000 * share) <= 1.5
    # At any time and not only in the end.
    for half in (tokens[:500], tokens[500:]):
      assert abs((half[:, 0] == tag).sum() - 500 * share) <= 2
    # Each source's own rows, all of an epoch before the next one's.
    epochs = mine[: len(mine) // (50 + 10 * tag) * (50 + 10 * tag), 1]
    for epoch in epochs.reshape(-1, 50 + 10 * tag):
      assert sorted(epoch) == list(range(1, 51 + 10 * tag))
  np.testing.assert_array_equal(_tags(weights), tokens)


def test_a_mixture_has_the_rows_of_its_sources_in_their_order():
  sources, weights = MIXTURES['mixed']()
  got = list(batches.train_iterator(sources, weights, 4, STEPS))
  at = [0, 0, 0]
  for batch in got:
    for i in range(4):
      row = {k: v[i] for k, v in batch.items()}
      source = row['tokens'][0] // 100_000
      numbered_rows.equal(row, sources[source][at[source]])
      at[source] += 1
  assert sum(at) == 4 * STEPS and min(at) > 0


# What goes wrong while reading ahead, and Grain's processes.


@pytest.fixture
def parsed_flags():
  """Grain's processes look at absl's flags, which a command has parsed."""
  parsed = flags.FLAGS.is_parsed()
  if not parsed:
    flags.FLAGS.mark_as_parsed()
  yield
  if not parsed:
    flags.FLAGS.unparse_flags()


def _text_rows(path, n):
  path.write_text(
    ''.join(f'{i} {i}\t{"mot " * (i % 7)}{i}\n' for i in range(n))
  )
  text = bitext.open_bitext([path], 'en-fr')
  template = template_lib.Template('{source}\n')
  made = store.open_store(text, numbered_rows.sample_tokenizer(), template)
  return batches.Rows(made, 64, seed=0, num_rows=500)


def test_processes_of_grain_change_nothing(tmp_path, parsed_flags):
  """Not the batches, not the position, not what goes wrong."""
  path = tmp_path / 'gone.tsv'
  sources = [_text_rows(tmp_path / 'a.tsv', 50), _text_rows(path, 49)]
  path.unlink()  # Its first row is needed after some batches.

  def make(workers):
    return batches.train_iterator(
      sources, [0.98, 0.02], 4, 100, workers=workers
    )

  thread, want = make(0), []
  with pytest.raises(errors.UserError):
    while True:
      want.append(next(thread))
  size = numbered_rows.epoch_size(sources[0], 0)
  assert size % 4 and 4 * len(want) > size + 8, 'two epochs expected'

  start = size // 4 - 2
  processes = make(2)
  processes.set_state({'batches_taken': start})
  for n in range(start, len(want)):
    if n == start + 3:
      state = json.loads(json.dumps(processes.get_state()))
      # An interrupt reaches all processes of a terminal. It is not for these:
      # each would die with a traceback.
      for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    numbered_rows.equal(next(processes), want[n])
  assert len(multiprocessing.active_children()) == 2
  # In a process or in a thread, it is the same sentence, at the same place.
  refusal(lambda: next(processes), path, 'changed or gone')
  processes.close()
  assert not multiprocessing.active_children()
  thread.set_state(thread.get_state())
  refusal(lambda: next(thread), path, 'changed or gone')
  thread.set_state(state)
  numbered_rows.equal(next(thread), want[start + 3])


# Batches for validation.


@pytest.mark.parametrize('size', [1, 4, 64])
def test_evaluation_has_every_example_that_fits_once(size):
  examples = numbered_rows.make_examples(numbered_rows.BLOCKED)
  got = list(batches.eval_batches(examples, numbered_rows.LENGTH, size))
  found = []
  for batch in got:
    assert all(v.shape == (size, numbered_rows.LENGTH) for v in batch.values())
    for i in range(size):
      found += numbered_rows.recover(
        numbered_rows.BLOCKED, {k: v[i] for k, v in batch.items()}
      )
  assert (
    sorted(found)
    == np.flatnonzero(numbered_rows.BLOCKED <= numbered_rows.LENGTH).tolist()
  )
  # Only the end is filled up, and by less than a batch.
  used = [bool(row.any()) for b in got for row in b['segment_ids']]
  assert used == sorted(used, reverse=True)
  assert used.count(False) < size
  numbered_rows.all_equal(
    got, list(batches.eval_batches(examples, numbered_rows.LENGTH, size))
  )


def test_evaluation_fills_up_the_last_batch():
  (batch,) = batches.eval_batches(numbered_rows.make_examples([5, 5, 4]), 5, 4)
  assert batch['segment_ids'].any(axis=1).tolist() == [True, True, True, False]
  assert not batch['target_mask'][3].any()
  assert (
    list(batches.eval_batches(numbered_rows.make_examples([6, 7]), 5, 4)) == []
  )
