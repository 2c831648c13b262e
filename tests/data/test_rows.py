"""Rows by number: an epoch, its order, its blocks."""

import itertools

import numpy as np
import pytest

from mt.data import batches
from mt.data import bitext
from mt.data import store
from mt.data import template as template_lib
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal

PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')


@pytest.mark.parametrize('kind', numbered_rows.KINDS)
def test_an_epoch_has_every_example_once(kind):
  options = numbered_rows.KINDS[kind]
  sizes = options.get('sizes', numbered_rows.SIZES)
  fitting = np.flatnonzero(sizes <= numbered_rows.LENGTH)
  assert len(fitting) == len(numbered_rows.SIZES)
  epochs = numbered_rows.epochs(numbered_rows.make_rows(**options), 4, sizes)
  for epoch in epochs:
    assert sorted(itertools.chain(*epoch)) == fitting.tolist()
  if options.get('packing', True):
    full = -(-int(numbered_rows.SIZES.sum()) // numbered_rows.LENGTH)
    assert all(full <= len(e) < 0.7 * len(numbered_rows.SIZES) for e in epochs)
  elif 'buckets' not in options:
    assert all(len(e) == len(numbered_rows.SIZES) for e in epochs)
  if not options.get('packing', True):
    assert all(len(row) <= 1 for e in epochs for row in e)
  # Another order each time, of examples and not only of rows.
  orders = [list(itertools.chain(*e)) for e in epochs]
  assert len(set(map(tuple, orders))) == 4
  assert orders[0] != sorted(orders[0])
  if options.get('packing', True):
    packings = {frozenset(map(frozenset, e)) for e in epochs}
    assert len(packings) == 4
  if 'bounds' in options:
    # The blocks' order, too: out of six, 12 epochs have some.
    orders = {
      tuple(
        dict.fromkeys(np.searchsorted(numbered_rows.BOUNDS[1:], o, 'right'))
      )
      for epoch in numbered_rows.epochs(
        numbered_rows.make_rows(**options), 12, sizes
      )
      for o in [list(itertools.chain(*epoch))]
    }
    assert len(orders) > 2 and all(len(o) == 3 for o in orders)


@pytest.mark.parametrize('kind', numbered_rows.KINDS)
def test_a_row_is_decided_by_seed_and_number(kind):
  options = numbered_rows.KINDS[kind]

  def row(rows, i):
    found = rows[i]
    return numbered_rows.recover(
      options.get('sizes', numbered_rows.SIZES), found
    ), len(found['tokens'])

  forward = [row(numbered_rows.make_rows(**options), i) for i in range(120)]
  # Another object, asked backwards and by NumPy's numbers; how long training
  # lasts does not change what it starts with.
  other = numbered_rows.make_rows(num_rows=120, **options)
  backward = [row(other, np.int64(i)) for i in reversed(range(120))]
  assert forward == backward[::-1]
  shuffled = np.random.default_rng(0).permutation(120).tolist()
  assert [row(other, i) for i in shuffled] == [forward[i] for i in shuffled]
  assert len(other) == 120
  seeded = numbered_rows.make_rows(seed=1, **options)
  assert forward != [row(seeded, i) for i in range(120)]


def test_seed_and_epoch_do_not_add_up():
  """Were the order drawn from seed + epoch, runs would share their epochs."""
  zero, one = (
    numbered_rows.epochs(numbered_rows.make_rows(seed=0), 3),
    numbered_rows.epochs(numbered_rows.make_rows(seed=1), 3),
  )
  assert not any(a == b for a in zero for b in one)


def test_half_empty_rows_are_spread_over_the_epoch():
  """Best fit opens them last; steps at an epoch's end would see less."""
  epochs = numbered_rows.epochs(numbered_rows.make_rows(), 40)
  places = []
  for epoch in epochs:
    fill = [sum(numbered_rows.SIZES[i] for i in row) for row in epoch]
    places.append(np.argmin(fill) / (len(fill) - 1))
  # Uniform would be 0.5, with a deviation of 0.29 / sqrt(40) = 0.05.
  assert 0.3 < np.mean(places) < 0.7


def test_the_next_block_is_prepared():
  """While one is trained on; with one block alone there is nothing to do."""
  rows = numbered_rows.make_rows(**numbered_rows.KINDS['packed, blocks'])
  order = [np.random.default_rng([0, e]).permutation(3) for e in range(2)]
  order = np.concatenate(order).tolist()
  first = len(rows.part(0)[1])
  assert rows.store.prepared == []
  rows[first // 2 - 1]
  assert rows.store.prepared == []
  # Past its middle; a process that reads every other row may not see that row.
  rows[first // 2 + 1]
  rows[first - 1]
  assert rows.store.prepared == order[1:2]
  for i in range(numbered_rows.epoch_size(rows, 0) + first // 4):
    rows[i]
  assert rows.store.prepared == order[1:4]
  rows = numbered_rows.make_rows()
  rows[0]
  assert rows.store.prepared == []


def test_few_blocks_stay_in_memory():
  rows = numbered_rows.make_rows(**numbered_rows.KINDS['packed, blocks'])
  for i in range(300):
    rows[i]
    assert len(rows._parts) <= 2


@pytest.mark.parametrize('blocks', [1, 2])
def test_no_pair_fits(blocks, tmp_path, monkeypatch):
  monkeypatch.setattr(store, '_BLOCK', -(-4 // blocks))
  path = tmp_path / 'a.tsv'
  path.write_text('long text, really\tun texte\nshort\tcourt\n' * 2)
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, numbered_rows.sample_tokenizer(), PLAIN)
  assert len(made) == blocks
  shortest = min(int(made.block(i).sizes.min()) for i in range(blocks))
  rows = batches.Rows(made, shortest - 1, 0, 10)
  refusal(
    lambda: rows[0],
    path,
    'none of its pairs fits',
    f'data.length={shortest - 1} ',
    f'the shortest needs {shortest})',
  )
  # The advice works.
  assert batches.Rows(made, shortest, 0, 10)[0]['segment_ids'].any()


# Rows of one example each.


def _groups(rows, sizes, epochs, group):
  """[epoch][group]: its width, and the example of each row or None."""
  at, out = 0, []
  for epoch in range(epochs):
    end = at + numbered_rows.epoch_size(rows, epoch)
    assert (end - at) % group == 0
    groups = []
    for low in range(at, end, group):
      members = [rows[i] for i in range(low, low + group)]
      (width,) = {len(m['tokens']) for m in members}
      found = [numbered_rows.recover(sizes, m) for m in members]
      groups.append((width, [f[0] if f else None for f in found]))
    out.append(groups)
    at = end
  return out


@pytest.mark.parametrize('group', [1, 4, 5])
@pytest.mark.parametrize('kind', ['buckets', 'buckets, blocks'])
def test_a_group_of_rows_has_one_width(kind, group):
  options = numbered_rows.KINDS[kind] | {'group': group}
  sizes = options.get('sizes', numbered_rows.SIZES)
  blocks = len(options.get('bounds', (0, 1))) - 1
  for groups in _groups(numbered_rows.make_rows(**options), sizes, 3, group):
    assert {width for width, _ in groups} == {6, 12, numbered_rows.LENGTH}
    for width, members in groups:
      assert all(i is None or sizes[i] <= width for i in members)
      # Empty rows stand at a group's end, which is not all empty.
      empty = [i is None for i in members]
      assert empty == sorted(empty) and not empty[0]
      # Only what is left over in the end leaves rows empty.
      assert not any(empty) or width == numbered_rows.LENGTH
    assert sum(None in members for _, members in groups) <= blocks


def test_what_is_left_over_moves_up():
  """By hand: widths 6, 12 and 20 in groups of three."""
  sizes = np.array([3, 4, 5, 6, 7, 12, 9, 13, 20])
  rows = numbered_rows.make_rows(
    sizes=sizes, packing=False, buckets=(6, 12), group=3, num_rows=9
  )
  (groups,) = _groups(rows, sizes, 1, 3)
  assert sorted(width for width, _ in groups) == [6, 12, 20]
  for width, members in groups:
    found = sorted(sizes[members])
    if width == 6:  # Three of the four that fit; the other moves up …
      assert found[-1] <= 6
    elif width == 12:  # … where one more than a group is, as well.
      assert sum(size <= 6 for size in found) == 1
    else:
      assert found[1:] == [13, 20] and found[0] in (7, 9, 12)
  # The last rows are empty where nothing is left to move up.
  rows = numbered_rows.make_rows(
    sizes=sizes[:4], packing=False, buckets=(6,), group=3
  )
  (groups,) = _groups(rows, sizes[:4], 1, 3)
  assert sorted(
    (w, len([m for m in ms if m is not None])) for w, ms in groups
  ) == [
    (6, 3),
    (20, 1),
  ]


def test_a_bucket_wider_than_a_row_is_a_row():
  rows = numbered_rows.make_rows(packing=False, buckets=(64, 12, 12), group=2)
  widths = {len(rows[i]['tokens']) for i in range(80)}
  assert widths == {12, numbered_rows.LENGTH}


def test_groups_are_in_random_order():
  """Else each epoch would begin with its short sentences."""
  rows = numbered_rows.make_rows(packing=False, buckets=(6, 12), group=2)
  widths = [[w for w, _ in e] for e in _groups(rows, numbered_rows.SIZES, 3, 2)]
  assert all(w != sorted(w) for w in widths)
  assert widths[0] != widths[1]
