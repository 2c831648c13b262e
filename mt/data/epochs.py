"""Which examples stand in which training row, epoch after epoch."""

import bisect
import dataclasses
from typing import Self

import numpy as np

from mt.base import errors
from mt.data import bitext
from mt.data import noising
from mt.data import packing as packing_lib
from mt.data import store as store_lib
from mt.data import template


@dataclasses.dataclass(frozen=True)
class Epochs:
  """The training rows of one text, by number.

  Row numbers run through the epochs; each epoch has every example once, in an
  order and a packing drawn from (seed, epoch). So a position in the data is one
  integer, and needs no history. Large texts are shuffled in two steps: the
  blocks of their store, then the examples of each block. Blocks are counted
  through the epochs, too: with 3 blocks, number 4 is the second of epoch 1.

  Shard (i, n) has the blocks i, i + n, i + 2n, … alone, and epochs of its own.
  """

  store: store_lib.Store
  length: int  # Tokens in a row.
  seed: int
  packing: bool = True  # Several examples in a row.
  group: int = 1  # Without packing, a block has a multiple of so many rows.
  shard: tuple[int, int] = (0, 1)
  # Found so far: the first row of each block; the last two blocks.
  _first_rows: list = dataclasses.field(default_factory=lambda: [0], init=False)
  _blocks: dict = dataclasses.field(default_factory=dict, init=False)

  def copy(self, shard: tuple[int, int]) -> Self:
    """The same for a shard, with blocks of its own in memory.

    What is packed already goes along, if it is the same shard.
    """
    out = dataclasses.replace(self, shard=shard)
    if shard == self.shard:
      out._blocks.update(self._blocks)
    return out

  def row(self, index: int) -> tuple[template.Examples, list[int]]:
    """The examples of a block, and which of them stand in row `index`.

    Raises:
      errors.UserError: the text has nothing for a row.
    """
    number, at = self._find(index)
    examples, rows = self.block(number)
    return examples, rows[at]

  def pair_ids(self, index: int) -> list[str]:
    """Ids of the pairs in row `index`, as the text has them."""
    number, at = self._find(index)
    items = self.block(number)[1][at]
    return [p.id for p in self.store.pairs(self._stored(number), items)]

  def block(self, number: int) -> tuple[template.Examples, list[list[int]]]:
    """The examples of a block, and which of them stand in each of its rows."""
    if number not in self._blocks:
      for old in sorted(self._blocks)[:-1]:
        del self._blocks[old]
      stored, epoch = self._stored(number), number // len(self._own)
      examples = self.store.block(stored, epoch)
      rng = np.random.default_rng([self.seed, epoch, stored])
      order = rng.permutation(np.flatnonzero(examples.sizes <= self.length))
      self._blocks[number] = examples, self._pack(rng, order, examples.sizes)
      if self._several:
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

  @property
  def _own(self):
    """The blocks of the store that this shard has."""
    return range(self.shard[0], len(self.store), self.shard[1])

  @property
  def _several(self):
    """Whether a block is to be made while the one before it is read."""
    return len(self.store) > 1 or self.store.noise > 0

  def _stored(self, number):
    """Which block of the store it is."""
    epoch, position = divmod(number, len(self._own))
    rng = np.random.default_rng([self.seed, epoch])
    return self._own[rng.permutation(len(self._own))[position]]

  def _find(self, index):
    """The number of the block that a row is in, and its place there."""
    firsts = self._first_rows
    if self._several and len(firsts) == 1:
      # Kept on disk: a resumed run would have to pack all blocks before.
      firsts[:] = self.store.recall(self._key) or firsts
    while firsts[-1] <= index:
      number = len(firsts) - 1
      firsts.append(firsts[-1] + len(self.block(number)[1]))
      if number + 1 >= len(self._own) and firsts[-1] == 0:
        raise self._no_row()
      if self._several:
        self.store.keep(self._key, firsts)
    number = bisect.bisect_right(firsts, index) - 1
    return number, index - firsts[number]

  @property
  def _key(self):
    """All that decides the first rows of blocks, beside the store."""
    key = 'first rows', self.seed, self.length, self.packing, self.group
    if self.store.noise:
      key += self.store.noise, noising.VERSION, self.store.bitext.pair
    if self.shard[1] > 1:
      key += self.shard
    return key

  def _no_row(self):
    text, (at, shards) = self.store.bitext, self.shard
    where = text.where
    if shards > 1:
      where += f', part {at + 1} of data.shards={shards}'
    sizes = np.concatenate([self.store.block(i).sizes for i in self._own])
    if not len(sizes):
      return bitext.no_pair(where, self.store.unusable(self._own), text.unit)
    return no_pair_fits(where, self.length, sizes)


def no_pair_fits(
  where: str, length: int, sizes: np.ndarray
) -> errors.UserError:
  """The error for a text that has nothing for rows of this length."""
  return errors.UserError(
    f'{where}: none of its pairs fits into data.length={length} tokens (the '
    f'shortest needs {sizes.min()}); raise data.length.'
  )
