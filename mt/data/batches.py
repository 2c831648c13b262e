"""Examples to packed rows of tokens, and rows to batches.

A row of `length` tokens holds several examples, told apart by segment_ids
(1, 2, …; 0 is padding); positions restart in each:

  tokens         <bos> A B <eos> <bos> C <eos> 0
  segment_ids      1   1 1   1     2   2   2   0
  positions        0   1 2   3     0   1   2   0
  target_mask      0   0 1   1     0   1   1   0

Masks come from lengths, never from token values: Gemma's pad id is an ordinary
0. What an example is, see mt/data/template.py; which ones share a row,
mt/data/epochs.py.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import grain
import numpy as np

from mt.data import epochs
from mt.data import packing as packing_lib
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


@dataclasses.dataclass
class TrainBatches:
  """Iterator over batches [B, L] of rows of several sources, with a position.

  Batch n has rows n * batch_size to (n + 1) * batch_size - 1 of the mixture,
  and each process its part of them. So the position is the number of batches
  taken, whatever the number of processes. A thread of Grain's reads ahead.

  Shards divide the text: each makes its part of a batch's rows, shard 0 the
  first ones, as a mixture of its own blocks of each source.
  """

  sources: Sequence[epochs.Epochs]
  mixture: Sequence[float]  # The share of each; they need not sum to 1.
  batch_size: int  # Rows of all processes together.
  num_batches: int
  own: Sequence[int] | None = None  # Rows of a batch read here; None for all.
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
      return _stack(
        [
          build_row(*source.row(index), source.length)
          for source, index in places(number, own)
        ]
      )

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

    of_shard = [mixed(shard) for shard in range(self.shards)]
    return lambda batch, rows: [
      of_shard[int(i) // size][batch * size + int(i) % size] for i in rows
    ]

  def pair_ids(self, number: int) -> list[str]:
    """Ids of all pairs in batch `number`, of all processes."""
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
