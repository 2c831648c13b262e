"""Examples to rows, rows to batches: order, position, mixtures, processes."""

import dataclasses
import functools
import hashlib
import itertools
import json
import time

import numpy as np
import pytest

from mt.data import batches
from mt.data import bitext
from mt.data import epochs
from mt.data import store
from mt.data import template
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal

PLAIN = template.Template('English: {source}\nFrench:', ' ')
KINDS = numbered_rows.KINDS
# A row.


def test_a_row_by_hand():
  examples = template.Examples(
    tokens=np.array([2, 7, 8, 1, 2, 0, 9, 9, 1], np.int32),
    sizes=np.array([4, 5], np.int32),
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


# Epochs.


@pytest.mark.parametrize('kind', KINDS)
def test_an_epoch_has_every_example_once(kind):
  options = KINDS[kind]
  sizes = options.get('sizes', numbered_rows.SIZES)
  fitting = np.flatnonzero(sizes <= numbered_rows.LENGTH)
  epochs = numbered_rows.epochs(numbered_rows.make_rows(**options), 4, sizes)
  for epoch in epochs:
    assert sorted(itertools.chain(*epoch)) == fitting.tolist()
  # Another order each time, of examples and not only of rows.
  orders = [list(itertools.chain(*e)) for e in epochs]
  assert len(set(map(tuple, orders))) == 4
  assert orders[0] != sorted(orders[0])
  if options.get('packing', True):
    full = -(-int(numbered_rows.SIZES.sum()) // numbered_rows.LENGTH)
    assert all(full <= len(e) < 0.7 * len(fitting) for e in epochs)
    assert len({frozenset(map(frozenset, e)) for e in epochs}) == 4
  else:
    assert all(len(row) <= 1 for e in epochs for row in e)
  if 'bounds' in options:  # The blocks' order, too: out of six, there are some.
    rows = numbered_rows.make_rows(**options)
    bounds = numbered_rows.BOUNDS[1:]
    orders = {
      tuple(
        dict.fromkeys(np.searchsorted(bounds, [*itertools.chain(*e)], 'right'))
      )
      for e in numbered_rows.epochs(rows, 12, sizes)
    }
    assert len(orders) > 2 and all(len(o) == 3 for o in orders)


@pytest.mark.parametrize('kind', KINDS)
def test_a_row_is_decided_by_seed_and_number(kind):
  options = KINDS[kind]
  sizes = options.get('sizes', numbered_rows.SIZES)

  def found(rows, numbers):
    return [
      numbered_rows.recover(sizes, numbered_rows.make_row(rows, i))
      for i in numbers
    ]

  forward = found(numbered_rows.make_rows(**options), range(120))
  other = numbered_rows.make_rows(**options)
  assert found(other, reversed(range(120))) == forward[::-1]
  shuffled = np.random.default_rng(0).permutation(120).tolist()
  assert found(other, shuffled) == [forward[i] for i in shuffled]
  assert len(other._blocks) <= 2  # Few stay in memory.
  seeded = numbered_rows.make_rows(seed=1, **options)
  assert found(seeded, range(120)) != forward


def test_seed_and_epoch_do_not_add_up():
  """Were the order drawn from seed + epoch, runs would share their epochs."""
  zero, one = (
    numbered_rows.epochs(numbered_rows.make_rows(seed=seed), 3)
    for seed in (0, 1)
  )
  assert not any(a == b for a in zero for b in one)


def test_half_empty_rows_are_spread_over_the_epoch():
  """Best fit opens them last; steps at an epoch's end would see less."""
  places = []
  for epoch in numbered_rows.epochs(numbered_rows.make_rows(), 40):
    fill = [sum(numbered_rows.SIZES[i] for i in row) for row in epoch]
    places.append(np.argmin(fill) / (len(fill) - 1))
  # Uniform would be 0.5, with a deviation of 0.29 / sqrt(40) = 0.05.
  assert 0.3 < np.mean(places) < 0.7


def test_without_packing_empty_rows_fill_up_a_batch():
  rows = numbered_rows.make_rows(sizes=[3, 4, 5, 6, 7], packing=False, group=3)
  for epoch in numbered_rows.epochs(rows, 3, np.array([3, 4, 5, 6, 7])):
    groups = sorted([len(r) for r in epoch[at : at + 3]] for at in (0, 3))
    assert groups == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize('blocks', [1, 2])
def test_no_pair_fits(blocks, tmp_path, monkeypatch):
  monkeypatch.setattr(store, '_BLOCK', -(-4 // blocks))
  path = tmp_path / 'a.tsv'
  path.write_text('long text, really\tun texte\nshort\tcourt\n' * 2)
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, numbered_rows.sample_tokenizer(), PLAIN)
  assert len(made) == blocks
  shortest = min(int(made.block(i).sizes.min()) for i in range(blocks))
  rows = epochs.Epochs(made, shortest - 1, 0)
  for index in (0, 1):  # A thread that reads ahead asks again.
    refusal(
      lambda i=index: rows.row(i),
      path,
      'none of its pairs fits',
      f'data.length={shortest - 1} ',
      f'the shortest needs {shortest})',
    )
  # The advice works.
  assert epochs.Epochs(made, shortest, 0).row(0)[1]


# Batches and the position.


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
  'blocks': lambda: (
    [numbered_rows.make_rows(**KINDS['packed, blocks'])],
    [43],
  ),
  'mixed': lambda: (_three(), [5, 0.5, 2]),
  'mixed, padded': lambda: (_three(packing=False), [40, 43, 9]),
}
STEPS = 40


def _iterator(mixture, steps=STEPS, **kwargs):
  return batches.TrainBatches(*MIXTURES[mixture](), 4, steps, **kwargs)


@functools.cache
def _whole(mixture):
  return list(_iterator(mixture))


# All batches of each mixture. They change if another order or packing is drawn:
# a run of an earlier version would go on with other data. Change them only
# together with the version in a run's manifest.
GOLDEN = {
  'packed': '59056f77e75fa631',
  'padded': 'eb6cf282c0f300b6',
  'blocks': 'c3881c8329904c46',
  'mixed': 'ac3893a99bf41b35',
  'mixed, padded': 'f9c73e58d3e95c65',
}


@pytest.mark.parametrize('mixture', MIXTURES)
def test_batches_are_those_of_earlier_versions(mixture):
  digest = hashlib.sha256()
  for batch in _whole(mixture):
    digest.update(b''.join(batch[k].tobytes() for k in sorted(batch)))
  assert digest.hexdigest()[:16] == GOLDEN[mixture]


@pytest.mark.parametrize('mixture', MIXTURES)
def test_a_state_brings_back_the_very_next_batches(mixture):
  sources, _ = MIXTURES[mixture]()
  border = numbered_rows.epoch_size(sources[0], 0)
  assert border + numbered_rows.epoch_size(sources[0], 1) < 4 * STEPS
  whole = _whole(mixture)
  at = [0, 1, border // 4, border // 4 + 1, STEPS - 1, STEPS]
  states = {}
  used = _iterator(mixture)
  for n in range(STEPS + 1):
    if n in at:  # As the checkpoint keeps it.
      states[n] = json.loads(json.dumps(used.get_state()))
      assert states[n] == {'batches_taken': n}
    if n < STEPS:
      numbered_rows.equal(next(used), whole[n])
  with pytest.raises(StopIteration):
    next(used)
  for n, state in states.items():
    fresh = _iterator(mixture)
    if n % 2:  # An iterator that has read ahead must forget what it read.
      next(fresh)
    fresh.set_state(state)
    numbered_rows.all_equal([*fresh, whole[0]], [*whole[n:], whole[0]])
  # Backwards, on an iterator at its end; closing keeps the position.
  used.set_state({'batches_taken': 2})
  numbered_rows.equal(next(used), whole[2])
  used.close()
  used.close()
  numbered_rows.equal(next(used), whole[3])
  # More steps begin with the same batches.
  numbered_rows.all_equal(list(_iterator(mixture, steps=10)), whole[:10])


@pytest.mark.parametrize('packing', [True, False])
def test_a_shard_has_its_rows_of_each_batch_from_its_blocks(packing):
  bounds, sizes = (0, 10, 20, 30, 40), numbered_rows.SIZES

  def make(own=None):
    rows = numbered_rows.make_rows(bounds=bounds, packing=packing, group=2)
    asked, block = set(), rows.store.block

    def count(number, epoch):
      asked.add(number)
      return block(number, epoch)

    object.__setattr__(rows.store, 'block', count)
    made = batches.TrainBatches([rows], [1], 4, STEPS, own=own, shards=2)
    return made, asked

  whole, seen = list(make()[0]), [[], []]
  for batch in whole:
    for i in range(4):
      row = {k: v[i] for k, v in batch.items()}
      seen[i // 2] += numbered_rows.recover(sizes, row)
  for shard, own in enumerate(([0, 1], [2, 3])):
    blocks = {shard, shard + 2}
    members = {i for b in blocks for i in range(bounds[b], bounds[b + 1])}
    for epoch in range(2):  # Each example once, then all of them again.
      examples = seen[shard][epoch * 20 :][:20]
      assert len(examples) == 20 and {*examples} == members
    # A process that has these rows never opens another block.
    made, asked = make(own)
    made.set_state({'batches_taken': 7})
    rows = [{k: v[own] for k, v in batch.items()} for batch in whole]
    numbered_rows.all_equal(list(made), rows[7:])
    assert asked == blocks


@pytest.mark.parametrize('shards', [1, 2])
def test_blocks_that_are_packed_already_change_no_batch(shards):
  bounds = 0, 10, 20, 30, 40

  def make(ask):
    rows = numbered_rows.make_rows(bounds=bounds, group=2)
    rows = dataclasses.replace(rows, shard=(0, shards))
    if ask:  # As a run does, to describe its text.
      rows.block(0)
    return list(batches.TrainBatches([rows], [1], 4, STEPS, shards=shards))

  numbered_rows.all_equal(make(ask=True), make(ask=False))


def test_a_state_is_set_while_the_next_rows_are_read(monkeypatch):
  """The thread that reads ahead may not get in the way of the next one."""
  monkeypatch.setattr(
    numbered_rows.Store,
    'block',
    lambda self, i, epoch: time.sleep(0.002) or self.blocks[i],
  )

  def make():
    rows = numbered_rows.make_rows(bounds=(*range(0, 40, 4), 40))
    return batches.TrainBatches([rows], [1], 4, STEPS)

  whole, used = list(make()), make()
  for n in (0, 10, 3):
    used.set_state({'batches_taken': n})
    numbered_rows.equal(next(used), whole[n])
  used.set_state({'batches_taken': 1})
  numbered_rows.all_equal(list(used), whole[1:])


@pytest.mark.parametrize('mixture', MIXTURES)
def test_a_batch_knows_its_pairs(mixture):
  """For a message; by what its tokens say, padding aside."""
  iterator = _iterator(mixture)
  for number, batch in enumerate(_whole(mixture)[:9]):
    begins = (batch['positions'] == 0) & (batch['segment_ids'] > 0)
    want = [str(token) for token in batch['tokens'][begins]]
    assert iterator.pair_ids(number) == want and want


@pytest.mark.parametrize('mixture', MIXTURES)
def test_each_process_reads_its_part_from_any_position(mixture):
  used = _iterator(mixture, own=[2, 3])
  for _ in range(7):
    next(used)
  state = used.get_state()
  # Rows may be shared out in any way, as the devices of a mesh have them.
  for own in ([0, 1, 2, 3], [0, 1], [2, 3], [1], [0, 2]):
    fresh = _iterator(mixture, own=own)
    fresh.set_state(state)
    want = [{k: v[own] for k, v in b.items()} for b in _whole(mixture)[7:]]
    numbered_rows.all_equal(list(fresh), want)


def test_an_error_while_reading_ahead_is_raised(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('a\tb\n')
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, numbered_rows.sample_tokenizer(), PLAIN)
  path.unlink()
  iterator = batches.TrainBatches([epochs.Epochs(made, 64, 0)], [1], 4, 9)
  refusal(lambda: next(iterator), path, 'changed or gone')


# Mixtures.


def _tagged(count, tag):
  """Rows of `count` examples of two tokens, the first of them `tag`."""
  tokens = np.array([[tag, 1 + i] for i in range(count)], np.int32)
  ones = np.ones(count, np.int32)
  examples = template.Examples(tokens.reshape(-1), 2 * ones, ones)
  return epochs.Epochs(numbered_rows.Store((examples,)), 2, tag)


@pytest.mark.parametrize(
  'weights',
  [(3, 1, 1), (0.6, 0.2, 0.2), (1, 1, 1), (0.5, 100, 7), (694, 90, 9)],
)
def test_sources_are_mixed_by_their_weights(weights):
  sources = [_tagged(count, tag) for tag, count in enumerate((50, 60, 70))]
  got = batches.TrainBatches(sources, weights, 100, 10)
  tokens = np.concatenate([b['tokens'] for b in got])
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


def test_a_mixture_has_the_rows_of_its_sources_in_their_order():
  sources, _ = MIXTURES['mixed']()
  at = [0, 0, 0]
  for batch in _whole('mixed'):
    for i in range(4):
      row = {k: v[i] for k, v in batch.items()}
      source = row['tokens'][0] // 100_000
      want = numbered_rows.make_row(sources[source], at[source])
      numbered_rows.equal(row, want)
      at[source] += 1
  assert sum(at) == 4 * STEPS and min(at) > 0


# Batches for validation.


@pytest.mark.parametrize('size', [1, 4, 64])
def test_evaluation_has_every_example_that_fits_once(size):
  sizes, length = numbered_rows.BLOCKED, numbered_rows.LENGTH
  examples = numbered_rows.make_examples(sizes)
  got = list(batches.eval_batches(examples, length, size))
  found = []
  for batch in got:
    assert all(v.shape == (size, length) for v in batch.values())
    for i in range(size):
      row = {k: v[i] for k, v in batch.items()}
      found += numbered_rows.recover(sizes, row)
  assert sorted(found) == np.flatnonzero(sizes <= length).tolist()
  # Only the end is filled up, and by less than a batch.
  used = [bool(row.any()) for b in got for row in b['segment_ids']]
  assert used == sorted(used, reverse=True)
  assert used.count(False) < size
  long = numbered_rows.make_examples([length + 1])
  assert not [*batches.eval_batches(long, length, size)]
