"""Examples to rows and batches: packing, order, positions in the data."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import time
import types

from absl import flags
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import debug
from mt import batches
from mt import bitext
from mt import corpus
from mt import errors
from mt import lines
from mt import model
from mt import sizes
from mt import step
from mt import store
from mt import template as template_lib
from mt import tokenizer
from tests.refusal import refusal

SHARED = pathlib.Path(__file__).parents[2] / 'shared'
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')


def _pair(source, target='Salut !'):
  return lines.Pair('1', source, target)


@functools.cache
def _sample():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  return bitext.open_bitext([path], 'en-fr').read()


@functools.cache
def _tokenizer():
  texts = [t for p in _sample() for t in (p.source, p.target)]
  return tokenizer.train(texts, 400)


@functools.cache
def _gemma(name):
  path = SHARED / 'tokenizers' / name / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  proto = sp_pb2.ModelProto.FromString(path.read_bytes())
  # The rebuilt file of Gemma 1 lacks the names of its own special pieces.
  proto.trainer_spec.bos_piece = '<bos>'
  proto.trainer_spec.eos_piece = '<eos>'
  return tokenizer.from_proto(proto.SerializeToString(), str(path))


def _nth(examples, i):
  at = slice(*examples.offsets[i : i + 2])
  return examples.tokens[at].tolist()


# Packing.


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
  path = SHARED / 'data' / 'MTNT' / 'train' / 'train.en-fr.tsv'
  if name == 'sample':
    path = corpus.SAMPLE / 'train' / 'train.en-fr.tsv'
  if not path.exists():
    pytest.skip(f'no {path}')
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.01)
  made = store.open_store(text, _gemma('gemma3'), PLAIN)
  rows = batches.Rows(made, 256, seed=0, num_rows=1)
  examples, _ = rows.part(0)
  fits = examples.sizes <= 256
  assert fits.mean() > 0.99
  padding = 1 - examples.sizes[fits].sum() / (256 * _epoch_size(rows, 0))
  assert 0 <= padding < 0.03


# Rows.


def _examples(sizes, first=0):
  """Example i has `sizes[i]` tokens, none of them in another example."""
  sizes = np.array(sizes)
  numbers = first + np.arange(len(sizes))
  tokens = [
    1000 * (i + 1) + np.arange(s) for i, s in zip(numbers, sizes, strict=True)
  ]
  starts = np.minimum(1 + numbers % 3, sizes - 1).astype(np.int32)
  return store.make_examples(
    sizes, starts, np.concatenate(tokens).astype(np.int32)
  )


def _example_tokens(i, size):
  return [1000 * (i + 1) + at for at in range(size)]


def _recover(sizes, row):
  """The examples in a row, in order, after a check of everything in it."""
  found = []
  ids = row['segment_ids']
  count = ids.max()
  used = np.count_nonzero(ids)
  # Segments 1, 2, … one after the other, then padding.
  assert sorted(ids[:used]) == ids[:used].tolist()
  assert set(ids[:used]) == set(range(1, count + 1)) and not ids[used:].any()
  for segment in range(1, count + 1):
    at = ids == segment
    tokens = row['tokens'][at]
    i = int(tokens[0] // 1000 - 1)
    size = int(sizes[i])
    assert tokens.tolist() == _example_tokens(i, size), 'cut, or mixed up'
    assert row['positions'][at].tolist() == list(range(size))
    mask = np.arange(size) >= min(1 + i % 3, size - 1)
    assert row['target_mask'][at].tolist() == mask.tolist()
    found.append(i)
  for name in ('tokens', 'positions', 'target_mask'):
    assert not row[name][used:].any(), f'{name} in the padding'
  return found


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


# Rows by number.

LENGTH = 20
_SIZES = np.random.default_rng(5).integers(2, LENGTH + 1, 40)
# Three blocks: 15, 15 and 13 examples; three of them never fit.
_BLOCKED = np.concatenate([_SIZES[:20], [21, 40, 1000], _SIZES[20:]])
_BOUNDS = (0, 15, 30, 43)


@dataclasses.dataclass(frozen=True)
class _Store:
  """Blocks of numbered examples instead of text."""

  blocks: tuple[store.Examples, ...]
  prepared: list[int] = dataclasses.field(default_factory=list)

  def __len__(self):
    return len(self.blocks)

  def block(self, number):
    return self.blocks[number]

  def prepare(self, number):
    self.prepared.append(number)

  def members(self, number):
    """As if the text were the blocks, one after the other."""
    first = sum(len(b) for b in self.blocks[:number])
    return first + np.arange(len(self.blocks[number]))

  @property
  def bitext(self):
    """Whose ids are the first tokens of its examples."""
    flat = [b.tokens[b.offsets[i]] for b in self.blocks for i in range(len(b))]
    pairs = [lines.Pair(str(token), '', '') for token in flat]
    read = lambda which: [pairs[i] for i in which]  # noqa: E731
    return types.SimpleNamespace(read=read, where='here')


def _rows(
  num_rows=400, seed=0, sizes=_SIZES, bounds=(0, None), first=0, **kwargs
):
  blocks = tuple(
    _examples(sizes[low:high], first + low)
    for low, high in itertools.pairwise(bounds)
  )
  return batches.Rows(_Store(blocks), LENGTH, seed, num_rows, **kwargs)


KINDS = {
  'packed': {},
  'padded': {'packing': False},
  'buckets': {'packing': False, 'buckets': (6, 12), 'group': 4},
  'packed, blocks': {'sizes': _BLOCKED, 'bounds': _BOUNDS},
  'padded, blocks': {'sizes': _BLOCKED, 'bounds': _BOUNDS, 'packing': False},
  'buckets, blocks': {
    'sizes': _BLOCKED,
    'bounds': _BOUNDS,
    'packing': False,
    'buckets': (6, 12),
    'group': 4,
  },
}


def _epoch_size(rows, epoch):
  """Number of rows in an epoch; it differs a little between them."""
  blocks = len(rows.store)
  parts = range(epoch * blocks, (epoch + 1) * blocks)
  return sum(len(rows.part(part)[1]) for part in parts)


def _epochs(rows, number, sizes=_SIZES):
  """Which examples each row of each epoch has: [epoch][row][…]."""
  at, out = 0, []
  for epoch in range(number):
    end = at + _epoch_size(rows, epoch)
    out.append([_recover(sizes, rows[i]) for i in range(at, end)])
    at = end
  return out


@pytest.mark.parametrize('kind', KINDS)
def test_an_epoch_has_every_example_once(kind):
  options = KINDS[kind]
  sizes = options.get('sizes', _SIZES)
  fitting = np.flatnonzero(sizes <= LENGTH)
  assert len(fitting) == len(_SIZES)
  epochs = _epochs(_rows(**options), 4, sizes)
  for epoch in epochs:
    assert sorted(itertools.chain(*epoch)) == fitting.tolist()
  if options.get('packing', True):
    full = -(-int(_SIZES.sum()) // LENGTH)
    assert all(full <= len(e) < 0.7 * len(_SIZES) for e in epochs)
  elif 'buckets' not in options:
    assert all(len(e) == len(_SIZES) for e in epochs)
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
      tuple(dict.fromkeys(np.searchsorted(_BOUNDS[1:], o, 'right')))
      for epoch in _epochs(_rows(**options), 12, sizes)
      for o in [list(itertools.chain(*epoch))]
    }
    assert len(orders) > 2 and all(len(o) == 3 for o in orders)


@pytest.mark.parametrize('kind', KINDS)
def test_a_row_is_decided_by_seed_and_number(kind):
  options = KINDS[kind]

  def row(rows, i):
    found = rows[i]
    return _recover(options.get('sizes', _SIZES), found), len(found['tokens'])

  forward = [row(_rows(**options), i) for i in range(120)]
  # Another object, asked backwards and by NumPy's numbers; how long training
  # lasts does not change what it starts with.
  other = _rows(num_rows=120, **options)
  backward = [row(other, np.int64(i)) for i in reversed(range(120))]
  assert forward == backward[::-1]
  shuffled = np.random.default_rng(0).permutation(120).tolist()
  assert [row(other, i) for i in shuffled] == [forward[i] for i in shuffled]
  assert len(other) == 120
  seeded = _rows(seed=1, **options)
  assert forward != [row(seeded, i) for i in range(120)]


def test_seed_and_epoch_do_not_add_up():
  """Were the order drawn from seed + epoch, runs would share their epochs."""
  zero, one = _epochs(_rows(seed=0), 3), _epochs(_rows(seed=1), 3)
  assert not any(a == b for a in zero for b in one)


def test_half_empty_rows_are_spread_over_the_epoch():
  """Best fit opens them last; steps at an epoch's end would see less."""
  epochs = _epochs(_rows(), 40)
  places = []
  for epoch in epochs:
    fill = [sum(_SIZES[i] for i in row) for row in epoch]
    places.append(np.argmin(fill) / (len(fill) - 1))
  # Uniform would be 0.5, with a deviation of 0.29 / sqrt(40) = 0.05.
  assert 0.3 < np.mean(places) < 0.7


def test_the_next_block_is_prepared():
  """While one is trained on; with one block alone there is nothing to do."""
  rows = _rows(**KINDS['packed, blocks'])
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
  for i in range(_epoch_size(rows, 0) + first // 4):
    rows[i]
  assert rows.store.prepared == order[1:4]
  rows = _rows()
  rows[0]
  assert rows.store.prepared == []


def test_few_blocks_stay_in_memory():
  rows = _rows(**KINDS['packed, blocks'])
  for i in range(300):
    rows[i]
    assert len(rows._parts) <= 2


@pytest.mark.parametrize('blocks', [1, 2])
def test_no_pair_fits(blocks, tmp_path, monkeypatch):
  monkeypatch.setattr(store, '_BLOCK', -(-4 // blocks))
  path = tmp_path / 'a.tsv'
  path.write_text('long text, really\tun texte\nshort\tcourt\n' * 2)
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, _tokenizer(), PLAIN)
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
    end = at + _epoch_size(rows, epoch)
    assert (end - at) % group == 0
    groups = []
    for low in range(at, end, group):
      members = [rows[i] for i in range(low, low + group)]
      (width,) = {len(m['tokens']) for m in members}
      found = [_recover(sizes, m) for m in members]
      groups.append((width, [f[0] if f else None for f in found]))
    out.append(groups)
    at = end
  return out


@pytest.mark.parametrize('group', [1, 4, 5])
@pytest.mark.parametrize('kind', ['buckets', 'buckets, blocks'])
def test_a_group_of_rows_has_one_width(kind, group):
  options = KINDS[kind] | {'group': group}
  sizes = options.get('sizes', _SIZES)
  blocks = len(options.get('bounds', (0, 1))) - 1
  for groups in _groups(_rows(**options), sizes, 3, group):
    assert {width for width, _ in groups} == {6, 12, LENGTH}
    for width, members in groups:
      assert all(i is None or sizes[i] <= width for i in members)
      # Empty rows stand at a group's end, which is not all empty.
      empty = [i is None for i in members]
      assert empty == sorted(empty) and not empty[0]
      # Only what is left over in the end leaves rows empty.
      assert not any(empty) or width == LENGTH
    assert sum(None in members for _, members in groups) <= blocks


def test_what_is_left_over_moves_up():
  """By hand: widths 6, 12 and 20 in groups of three."""
  sizes = np.array([3, 4, 5, 6, 7, 12, 9, 13, 20])
  rows = _rows(sizes=sizes, packing=False, buckets=(6, 12), group=3, num_rows=9)
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
  rows = _rows(sizes=sizes[:4], packing=False, buckets=(6,), group=3)
  (groups,) = _groups(rows, sizes[:4], 1, 3)
  assert sorted(
    (w, len([m for m in ms if m is not None])) for w, ms in groups
  ) == [
    (6, 3),
    (20, 1),
  ]


def test_a_bucket_wider_than_a_row_is_a_row():
  rows = _rows(packing=False, buckets=(64, 12, 12), group=2)
  widths = {len(rows[i]['tokens']) for i in range(80)}
  assert widths == {12, LENGTH}


def test_groups_are_in_random_order():
  """Else each epoch would begin with its short sentences."""
  rows = _rows(packing=False, buckets=(6, 12), group=2)
  widths = [[w for w, _ in e] for e in _groups(rows, _SIZES, 3, 2)]
  assert all(w != sorted(w) for w in widths)
  assert widths[0] != widths[1]


# Batches for training.


def _equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def _all_equal(got, want):
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    _equal(a, b)


def test_training_batches_are_the_rows_in_order():
  rows = _rows()
  got = list(batches.train_iterator([rows], [1], 4, 12))
  assert len(got) == 12
  for n, batch in enumerate(got):
    for name, dtype in {
      'tokens': np.int32,
      'positions': np.int32,
      'segment_ids': np.int32,
      'target_mask': bool,
    }.items():
      assert batch[name].shape == (4, LENGTH) and batch[name].dtype == dtype
      want = [rows[4 * n + i][name] for i in range(4)]
      np.testing.assert_array_equal(batch[name], np.stack(want))


def _three(**options):
  """Sources of 40, 43 and 9 examples, told apart by their numbers."""
  second = {'sizes': _BLOCKED, 'bounds': _BOUNDS, 'first': 100}
  third = {'sizes': np.arange(2, 11), 'seed': 3, 'first': 200}
  return [_rows(**part, **options) for part in ({}, second, third)]


# Sources and weights: all that a position has to work with.
MIXTURES = {
  'packed': lambda: ([_rows()], [40]),
  'padded': lambda: ([_rows(packing=False)], [40]),
  'buckets': lambda: ([_rows(**KINDS['buckets, blocks'])], [43]),
  'blocks': lambda: ([_rows(**KINDS['packed, blocks'])], [43]),
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
  border = _epoch_size(sources[0], 0)
  if 'buckets' not in mixture:  # Whose epochs are whole batches.
    assert border % 4 or 'padded' in mixture
  assert _epoch_size(sources[0], 0) + _epoch_size(sources[0], 1) < 4 * STEPS
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
      _equal(next(used), whole[n])
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
      _equal(got, want)

  # Backwards, on an iterator at its end.
  used.set_state(states[2])
  _equal(next(used), whole[2])
  assert used.get_state() != states[2]


def test_a_state_is_set_while_the_next_rows_are_read(monkeypatch):
  """The thread that reads ahead may not get in the way of the next one."""
  monkeypatch.setattr(
    _Store, 'block', lambda self, i: time.sleep(0.01) or self.blocks[i]
  )

  def make():
    rows = _rows(bounds=(*range(0, 40, 4), 40))
    return batches.train_iterator([rows], [1], 4, STEPS)

  whole, used = list(make()), make()
  for n in (0, 10, 3):
    used.set_state({'batches_taken': n})
    _equal(next(used), whole[n])
  used.set_state({'batches_taken': 1})
  _all_equal(list(used), whole[1:])


def test_more_steps_begin_with_the_same_batches():
  for mixture in MIXTURES:
    short = list(_iterator(mixture, steps=10))
    _all_equal(short, list(_iterator(mixture))[:10])


def test_closing_keeps_the_position():
  whole, used = list(_iterator('packed')), _iterator('packed')
  next(used)
  used.close()
  used.close()
  _equal(next(used), whole[1])


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
  _all_equal(joined, whole)


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
      _equal(got, {k: v[own] for k, v in want.items()})


# Mixtures.


def _tagged(count, tag):
  """Rows of `count` examples of two tokens, the first of them `tag`."""
  tokens = np.array([[tag, 1 + i] for i in range(count)], np.int32)
  examples = store.make_examples(
    np.full(count, 2), np.ones(count, np.int32), tokens.reshape(-1)
  )
  return batches.Rows(_Store((examples,)), 2, tag, 1100)


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
      _equal(row, sources[source][at[source]])
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
  made = store.open_store(text, _tokenizer(), template)
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
  size = _epoch_size(sources[0], 0)
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
    _equal(next(processes), want[n])
  assert len(multiprocessing.active_children()) == 2
  # In a process or in a thread, it is the same sentence, at the same place.
  refusal(lambda: next(processes), path, 'changed or gone')
  processes.close()
  assert not multiprocessing.active_children()
  thread.set_state(thread.get_state())
  refusal(lambda: next(thread), path, 'changed or gone')
  thread.set_state(state)
  _equal(next(thread), want[start + 3])


# Batches for validation.


@pytest.mark.parametrize('size', [1, 4, 64])
def test_evaluation_has_every_example_that_fits_once(size):
  examples = _examples(_BLOCKED)
  got = list(batches.eval_batches(examples, LENGTH, size))
  found = []
  for batch in got:
    assert all(v.shape == (size, LENGTH) for v in batch.values())
    for i in range(size):
      found += _recover(_BLOCKED, {k: v[i] for k, v in batch.items()})
  assert sorted(found) == np.flatnonzero(_BLOCKED <= LENGTH).tolist()
  # Only the end is filled up, and by less than a batch.
  used = [bool(row.any()) for b in got for row in b['segment_ids']]
  assert used == sorted(used, reverse=True)
  assert used.count(False) < size
  _all_equal(got, list(batches.eval_batches(examples, LENGTH, size)))


def test_evaluation_fills_up_the_last_batch():
  (batch,) = batches.eval_batches(_examples([5, 5, 4]), 5, 4)
  assert batch['segment_ids'].any(axis=1).tolist() == [True, True, True, False]
  assert not batch['target_mask'][3].any()
  assert list(batches.eval_batches(_examples([6, 7]), 5, 4)) == []


# Packed and alone.


def test_a_packed_batch_costs_what_its_examples_cost_alone():
  """Loss and gradients: neighbours in a row must not be seen."""
  cfg, train = sizes.SIZES['debug'], debug.get_config().train
  short = sorted(_sample(), key=lambda p: len(p.source + p.target))[:6]
  tok = tokenizer.train(
    [t for p in _sample() for t in (p.source, p.target)], cfg.vocab_size
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


# The tutorial. What it prints is copied from ../shared/seed_tutorial.ko.txt.

TUTORIAL = template_lib.Template(
  'Translate this into French:\n{source}\n', '', target_bos=True
)
_PROMPT = [2, 49688, 736, 1280, 6987, 235292, 108]

# "Example 0" and "Example 1" of the tokenizer's test: texts, src, dst.
_PRINTED_SEQUENCES = [
  (
    'The group of “eastern conference potential all stars but not making it '
    'in the West” group.',
    'Le groupe de " toutes les étoiles potentielles de la conférence de '
    "l'Est mais qui ne s'en sortent pas dans le groupe de l'Ouest \".",
    """2  49688    736   1280   6987 235292    108    651   2778    576
    1080 104745  11982   5736    832   8995    901    780   3547    665
    575    573   4589 235369   2778 235265    108""",
    """2   2025  29653    581    664  16298   1437  55563  41435   7840
    581    683 111452    581    533 235303   9776   4108   2459    679
    485 235303    479   6728    579   1806   2499    709  29653    581
    533 235303 101323  16054      1""",
  ),
  (
    'Is Kameron a Little Salty About Her Lack of Air Time?',
    "Kameron est-elle un peu aigrie de son manque de temps à l'écran ?",
    """2  49688    736   1280   6987 235292    108   2437  87150    477
    476  11709 230461   8045   3636  40268    576   4252   4897 235336
    108""",
    """2 213606    477   1455 235290   3510    748   8268 191017   2809
    581   2032  69972    581  11495   1305    533 235303  65978   1654
    1""",
  ),
]

# The two batches of three at max_seq_len=20: input_tokens, and how many False
# and then how many True the target_mask has; False for the rest.
_PRINTED_BATCHES = [
  (
    """2  49688    736   1280   6987 235292    108  10924    665  12302
    235341    108      2   4397  63011   1437  38696   1241      1      0""",
    (12, 7),
  ),
  (
    """2  49688    736   1280   6987 235292    108  13835   1517 235265
    108      2  69875    540  19713 235265      1      0      0      0""",
    (11, 6),
  ),
  (
    """2  49688    736   1280   6987 235292    108   6956   1586 235297
    235265    108      2  78368   1586 235297 235265      1      0      0""",
    (12, 6),
  ),
  (
    """2  49688    736   1280   6987 235292    108  18874 235341    108
    2 115905   6425   1241      1      0      0      0      0      0""",
    (10, 5),
  ),
  (
    """2  49688    736   1280   6987 235292    108   7574   3356 235341
    108      2   7997  20707   1241      1      0      0      0      0""",
    (11, 5),
  ),
  (
    """2  49688    736   1280   6987 235292    108   8703    665 235265
    108      2 235338 235303  90006  20133 235265      1      0      0""",
    (11, 7),
  ),
]


def _ids(printed):
  return [int(i) for i in printed.split()]


@pytest.mark.parametrize('printed', _PRINTED_SEQUENCES, ids=['0', '1'])
def test_the_sequences_of_the_tutorial(printed):
  source, target, src, dst = printed
  tok = _gemma('gemma1')
  examples = store.encode([_pair(source, target)], tok, TUTORIAL)
  assert _nth(examples, 0) == _ids(src) + _ids(dst)
  # Without the second BOS, which the model never sees when it translates.
  template = dataclasses.replace(TUTORIAL, target_bos=False)
  examples = store.encode([_pair(source, target)], tok, template)
  assert _nth(examples, 0) == _ids(src) + _ids(dst)[1:]
  assert examples.target_starts[0] == len(_ids(src))


def _printed_examples():
  """Texts read off the printed ids, and our tokens of them."""
  tok = _gemma('gemma1')
  pairs = []
  for printed, _ in _PRINTED_BATCHES:
    ids = _ids(printed)
    assert ids[: len(_PROMPT)] == _PROMPT
    second = ids.index(tok.bos_id, 1)
    source = tok.decode(ids[len(_PROMPT) : second - 1])  # 108 is the newline.
    target = tok.decode(ids[second + 1 : ids.index(tok.eos_id)])
    pairs.append(_pair(source, target))
  return pairs, store.encode(pairs, tok, TUTORIAL)


def _printed_masks():
  """They begin at the second BOS, which is part of what the tutorial learns."""
  return [
    [False] * before + [True] * learned + [False] * (20 - before - learned)
    for _, (before, learned) in _PRINTED_BATCHES
  ]


def test_the_rows_of_the_tutorial():
  _, examples = _printed_examples()
  rows = [batches.build_row(examples, [i], 20) for i in range(len(examples))]
  assert [r['tokens'].tolist() for r in rows] == [
    _ids(t) for t, _ in _PRINTED_BATCHES
  ]
  assert [r['target_mask'].tolist() for r in rows] == _printed_masks()


def test_the_batches_of_the_tutorial(tmp_path):
  """From a file to the padded batches of training, in their own order."""
  pairs, _ = _printed_examples()
  path = tmp_path / 'a.tsv'
  path.write_text(
    ''.join(f'{p.source}\t{p.target}\n' for p in pairs), encoding='utf-8'
  )
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, _gemma('gemma1'), TUTORIAL)
  rows = batches.Rows(made, 20, 0, num_rows=9, packing=False, group=3)
  got = list(batches.train_iterator([rows], [6], 3, 2))
  assert [b['tokens'].shape for b in got] == [(3, 20)] * 2
  found = [
    (tokens.tolist(), mask.tolist())
    for b in got
    for tokens, mask in zip(b['tokens'], b['target_mask'], strict=True)
  ]
  printed = [_ids(tokens) for tokens, _ in _PRINTED_BATCHES]
  assert sorted(found) == sorted(zip(printed, _printed_masks(), strict=True))
