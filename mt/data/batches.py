"""Examples to packed rows of tokens, and rows to batches.

A row of `length` tokens holds several examples, told apart by segment_ids
(1, 2, …; 0 is padding); positions restart in each:

  tokens         <bos> A B <eos> <bos> C <eos> 0
  segment_ids      1   1 1   1     2   2   2   0
  positions        0   1 2   3     0   1   2   0
  target_mask      0   0 1   1     0   1   1   0

Masks come from lengths, never from token values: Gemma's pad id is an ordinary
0. What an example is, see mt/data/template.py.
"""

import bisect
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Self

import grain
import numpy as np

from mt.base import errors
from mt.data import bitext
from mt.data import noising
from mt.data import packing as packing_lib
from mt.data import store as store_lib
from mt.data import template

# tokens, positions, segment_ids and target_mask: [L] of a row, [B, L] of more.
Batch = dict[str, np.ndarray]


def build_row(
  examples: template.Examples, items: Sequence[int], length: int
) -> Batch:
  """One row with these examples in it: every array [length]."""
  row = {
    'tokens': np.zeros(length, np.int32),
    'positions': np.zeros(length, np.int32),
    'segment_ids': np.zeros(length, np.int32),
    'target_mask': np.zeros(length, bool),
  }
  at = 0
  for segment, i in enumerate(items, 1):
    ids = examples.ids(i)
    end = at + len(ids)
    row['tokens'][at:end] = ids
    row['positions'][at:end] = np.arange(len(ids))
    row['segment_ids'][at:end] = segment
    row['target_mask'][at + examples.target_starts[i] : end] = True
    at = end
  return row


def _stack(rows: Sequence[Batch]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def eval_batches(
  examples: template.Examples,
  length: int,
  batch_size: int,
  packing: bool = True,
) -> Iterator[Batch]:
  """Every example that fits once; empty rows fill the last batch."""
  fitting = np.flatnonzero(examples.sizes <= length)
  plan = [[i] for i in range(len(fitting))]
  if packing:
    plan = packing_lib.best_fit(examples.sizes[fitting], length)
  rows = [build_row(examples, fitting[items], length) for items in plan]
  rows += [build_row(examples, [], length)] * (-len(rows) % batch_size)
  for at in range(0, len(rows), batch_size):
    yield _stack(rows[at : at + batch_size])


@dataclasses.dataclass(frozen=True)
class Rows:
  """Training rows of one text by number, epoch after epoch.

  Row numbers run through the epochs; each epoch has every example once, in an
  order and a packing drawn from (seed, epoch). So a position in the data is one
  integer, and needs no history. Large texts are shuffled in two steps: the
  blocks of their store, then the examples of each block. Blocks are counted
  through the epochs, too: with 3 blocks, number 4 is the second of epoch 1.

  Shard (i, n) has the blocks i, i + n, i + 2n, … alone, and epochs of its own.
  """

  store: store_lib.Store
  length: int
  seed: int
  packing: bool = True  # Several examples in a row.
  group: int = 1  # Without packing empty rows fill up a block to a multiple.
  shard: tuple[int, int] = (0, 1)
  # Found so far: the first row of each block, and the last two blocks.
  _first_rows: list = dataclasses.field(default_factory=lambda: [0], init=False)
  _blocks: dict = dataclasses.field(default_factory=dict, init=False)

  def copy(self, shard: tuple[int, int]) -> Self:
    """The same with a memory of its own; packed blocks of a shard are kept."""
    out = dataclasses.replace(self, shard=shard)
    if shard == self.shard:
      out._blocks.update(self._blocks)
    return out

  def __getitem__(self, index: int) -> Batch:
    """Row `index`: every array [length]."""
    number, at = self._find(index)
    examples, rows = self.block_of_epoch(number)
    return build_row(examples, rows[at], self.length)

  def pair_ids(self, index: int) -> list[str]:
    """Of the pairs in a row, as the text has them."""
    number, at = self._find(index)
    items = self.block_of_epoch(number)[1][at]
    return [p.id for p in self.store.pairs(self._stored(number), items)]

  def _find(self, index):
    """The number of the block that a row is in, and its place there."""
    firsts, noise = self._first_rows, self.store.noise
    several = len(self.store) > 1 or noise > 0  # Blocks to be made.
    what = 'first rows', self.seed, self.length, self.packing, self.group
    if noise:
      what += noise, noising.VERSION, self.store.bitext.pair
    if self.shard[1] > 1:
      what += self.shard
    if several and len(firsts) == 1:  # Else a resume would pack all blocks.
      firsts[:] = self.store.recall(what) or firsts
    while firsts[-1] <= index:
      number = len(firsts) - 1
      firsts.append(firsts[-1] + len(self.block_of_epoch(number)[1]))
      if number + 1 >= len(self._own) and firsts[-1] == 0:
        raise self._no_row()
      if several:
        self.store.keep(what, firsts)
    number = bisect.bisect_right(firsts, index) - 1
    return number, index - firsts[number]

  def _no_row(self):
    text, (at, shards) = self.store.bitext, self.shard
    where = text.where
    if shards > 1:
      where += f', part {at + 1} of data.shards={shards}'
    sizes = np.concatenate([self.store.block(i).sizes for i in self._own])
    if not len(sizes):
      return bitext.no_pair(where, self.store.unusable(self._own), text.unit)
    return no_pair_fits(where, self.length, sizes)

  @property
  def _own(self):
    """The blocks of the store that this shard has."""
    return range(self.shard[0], len(self.store), self.shard[1])

  def _stored(self, number: int) -> int:
    """Which block of the store it is."""
    epoch, position = divmod(number, len(self._own))
    rng = np.random.default_rng([self.seed, epoch])
    return self._own[rng.permutation(len(self._own))[position]]

  def block_of_epoch(
    self, number: int
  ) -> tuple[template.Examples, list[list[int]]]:
    """The examples of a block, and which of them stand in each of its rows."""
    if number not in self._blocks:
      for old in sorted(self._blocks)[:-1]:
        del self._blocks[old]
      block, epoch = self._stored(number), number // len(self._own)
      examples = self.store.block(block, epoch)
      rng = np.random.default_rng([self.seed, epoch, block])
      order = rng.permutation(np.flatnonzero(examples.sizes <= self.length))
      self._blocks[number] = examples, self._pack(rng, order, examples.sizes)
      if len(self.store) > 1 or self.store.noise:
        following = (number + 1) // len(self._own)
        self.store.make_ahead(self._stored(number + 1), following)
    return self._blocks[number]

  def _pack(self, rng, order, sizes):
    """Examples in rows, shuffled: the last ones of best fit have gaps."""
    if self.packing:
      rows = packing_lib.best_fit(sizes[order], self.length)
      items = order.tolist()
      shuffled = rng.permutation(len(rows)).tolist()
      return [[items[i] for i in rows[row]] for row in shuffled]
    rows = [[i] for i in order.tolist()]
    rows += [[]] * (-len(rows) % self.group)
    groups = rng.permutation(len(rows) // self.group) * self.group
    return [row for at in groups for row in rows[at : at + self.group]]


def no_pair_fits(
  where: str, length: int, sizes: np.ndarray
) -> errors.UserError:
  """The error for a text that has nothing for rows of this length."""
  return errors.UserError(
    f'{where}: none of its pairs fits into data.length={length} tokens (the '
    f'shortest needs {sizes.min()}); raise data.length.'
  )


@dataclasses.dataclass
class TrainBatches:
  """Iterator over batches [B, L] of rows of several sources, with a position.

  Batch n has rows n * batch_size to (n + 1) * batch_size - 1 of the mixture,
  and each process its part of them. So the position is the number of batches
  taken, whatever the number of processes. A thread of Grain's reads ahead.

  With several shards each has its part of a batch's rows, the first one the
  first rows, and is a mixture of the sources' blocks that it has.
  """

  sources: Sequence[Rows]
  mixture: Sequence[float]  # The share of each; they need not sum to 1.
  batch_size: int  # Rows of all processes together.
  num_batches: int
  own: Sequence[int] | None = None  # Rows of a batch that are read here: all.
  shards: int = 1  # Divides batch_size.
  _taken: int = dataclasses.field(default=0, init=False)
  _ahead: Iterator[Batch] | None = dataclasses.field(default=None, init=False)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    if self._taken == self.num_batches:
      raise StopIteration
    if self._ahead is None:
      self._ahead = self._read_ahead(self._taken)
    batch = next(self._ahead)
    self._taken += 1
    return batch

  def _read_ahead(self, first):
    places = self._places()
    own = range(self.batch_size) if self.own is None else self.own

    def batch(number):
      return _stack([source[row] for source, row in places(number, own)])

    numbers = grain.MapDataset.range(first, self.num_batches)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(numbers.map(batch).to_iter_dataset(options))

  def _places(self):
    """(batch, rows of it) -> the source of each row, and its number there."""
    size = self.batch_size // self.shards
    # Any source can be asked for all rows; a batch more for what Grain rounds.
    numbers = grain.MapDataset.range((self.num_batches + 1) * size)

    def mixed(shard):
      # Copies: a thread that reads ahead may still be at work on earlier ones.
      sources = [source.copy((shard, self.shards)) for source in self.sources]
      parts = [numbers.map(lambda row, s=s: (s, row)) for s in sources]
      return grain.MapDataset.mix(parts, self.mixture)

    of = [mixed(shard) for shard in range(self.shards)]
    return lambda batch, rows: [
      of[int(i) // size][batch * size + int(i) % size] for i in rows
    ]

  def pair_ids(self, number: int) -> list[str]:
    """Of all pairs in batch `number`, of all processes."""
    places = self._places()(number, range(self.batch_size))
    return [pair for source, row in places for pair in source.pair_ids(row)]

  def get_state(self) -> dict[str, int]:
    """The position, as JSON."""
    return {'batches_taken': self._taken}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position that get_state gave."""
    self.close()
    self._taken = state['batches_taken']

  def close(self) -> None:
    """Ends the reading ahead; the position stays."""
    if self._ahead is not None:
      self._ahead.close()
    self._ahead = None
