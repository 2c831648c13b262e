"""Examples to packed rows of tokens, through Grain.

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
import math

import chex
import grain
import numpy as np

from mt.base import errors
from mt.data import reader
from mt.data import store as store_lib

Batch = dict[str, np.ndarray]  # tokens, positions, segment_ids, target_mask.


def best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Packs items in the given order, each into the fullest row that takes it.

  A bit set of the free space in open rows finds that row in O(1).

  Args:
    sizes: [n] ints, each in 1..length.
    length: capacity of a row.

  Returns:
    Rows of item indices; every item exactly once.
  """
  chex.assert_rank(sizes, 1)
  rows: list[list[int]] = []
  open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # By free space.
  available = 0  # Bit f is set if open_rows[f] is not empty.
  for item, size in enumerate(sizes.tolist()):
    fitting = available >> size
    if fitting:
      free = size + (fitting & -fitting).bit_length() - 1
      row = open_rows[free].pop()
      if not open_rows[free]:
        available ^= 1 << free
    else:
      free, row = length, len(rows)
      rows.append([])
    rows[row].append(item)
    open_rows[free - size].append(row)
    available |= 1 << (free - size)
  return rows


def build_row(
  examples: store_lib.Examples, items: list[int], length: int
) -> Batch:
  """One packed row: every array [length]."""
  row = {
    'tokens': np.zeros(length, np.int32),
    'positions': np.zeros(length, np.int32),
    'segment_ids': np.zeros(length, np.int32),
    'target_mask': np.zeros(length, bool),
  }
  at = 0
  for segment, i in enumerate(items, 1):
    ids = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
    end = at + len(ids)
    row['tokens'][at:end] = ids
    row['positions'][at:end] = np.arange(len(ids))
    row['segment_ids'][at:end] = segment
    row['target_mask'][at + examples.target_starts[i] : end] = True
    at = end
  return row


@dataclasses.dataclass(frozen=True)
class Rows:
  """Training rows by number, epoch after epoch: a Grain source.

  Row numbers run through the epochs; each epoch has every example once, in an
  order and a packing drawn from (seed, epoch). So a position in the data is one
  integer, and needs no history. Large texts are shuffled in two steps: the
  blocks of their store, then the examples of each block.

  Attributes:
    store: of the training text.
    length: L.
    seed: of the order.
    num_rows: how many rows training will ask for.
    packing: several examples in a row, or one.
    buckets: without packing, the widths of rows, besides `length`.
    group: without packing, so many rows in succession have one width.
  """

  store: store_lib.Store
  length: int
  seed: int
  num_rows: int
  packing: bool = True
  buckets: tuple[int, ...] = ()
  group: int = 1
  # What was found on the way: the first row of each part (a part is a block in
  # an epoch), and the last two parts themselves. One thread reads.
  _starts: list[int] = dataclasses.field(
    default_factory=lambda: [0], init=False
  )
  _parts: dict[int, tuple[store_lib.Examples, list]] = dataclasses.field(
    default_factory=dict, init=False
  )
  _prepared: set[int] = dataclasses.field(default_factory=set, init=False)

  def __len__(self) -> int:
    return self.num_rows

  def __repr__(self) -> str:
    return f'Rows({self.store.bitext.where})'

  def __getitem__(self, index) -> Batch:
    try:
      return self._row(int(index))
    except errors.UserError:
      raise
    except Exception as e:
      raise errors.UserError(
        f'{self.store.bitext.where}: row {int(index)} of training cannot be '
        f'made ({type(e).__name__}: {" ".join(str(e).split())[:200]}); start '
        'again, and look at that text if it stops here again.'
      ) from e

  def _row(self, index):
    examples, plan, row, part = self._find(index)
    if len(self.store) > 1 and row >= len(plan) // 2:
      self._prepare(part + 1)
    items, width = plan[row]
    return build_row(examples, items, width)

  def pair_ids(self, index: int) -> list[str]:
    """Of the pairs in a row, as the text has them."""
    _, plan, row, part = self._find(index)
    members = self.store.members(self._block(part))[plan[row][0]]
    return [pair.id for pair in self.store.bitext.read(members)]

  def _find(self, index):
    """The part that a row is in, as `part` has it; its place; the part."""
    while self._starts[-1] <= index:
      part = len(self._starts) - 1
      self._starts.append(self._starts[-1] + len(self.part(part)[1]))
      if part % len(self.store) == len(self.store) - 1:
        self._check_epoch(part)
    part = bisect.bisect_right(self._starts, index) - 1
    return *self.part(part), index - self._starts[part], part

  def _prepare(self, part: int) -> None:
    if part not in self._prepared:
      self._prepared.add(part)
      self.store.prepare(self._block(part))

  def _block(self, part: int) -> int:
    epoch, position = divmod(part, len(self.store))
    rng = np.random.default_rng([self.seed, epoch])
    return int(rng.permutation(len(self.store))[position])

  def part(self, part: int) -> tuple[store_lib.Examples, list]:
    """A block in an epoch: its examples, and each row's items and width."""
    if part not in self._parts:
      number = self._block(part)
      examples = self.store.block(number)
      rng = np.random.default_rng([self.seed, part // len(self.store), number])
      order = rng.permutation(np.flatnonzero(examples.sizes <= self.length))
      plan = self._packed if self.packing else self._padded
      for old in sorted(self._parts)[:-1]:
        del self._parts[old]
      self._parts[part] = examples, plan(rng, order, examples.sizes)
    return self._parts[part]

  def _packed(self, rng, order, sizes):
    rows = best_fit(sizes[order], self.length)
    return [
      (order[rows[i]].tolist(), self.length)
      for i in rng.permutation(len(rows)).tolist()
    ]

  def _padded(self, rng, order, sizes):
    """Groups of rows of one width; what is left over goes to the next width."""
    widths = sorted({min(b, self.length) for b in (*self.buckets, self.length)})
    groups, rest, low = [], np.zeros(0, np.int64), 0
    for width in widths:
      here = (low < sizes[order]) & (sizes[order] <= width)
      rest = np.concatenate([rest, order[here]])
      full = len(rest) // self.group * self.group
      for items in rest[:full].reshape(-1, self.group).tolist():
        groups.append((items, width))
      rest, low = rest[full:], width
    if len(rest):
      groups.append((rest.tolist(), self.length))
    rows = []
    for g in rng.permutation(len(groups)).tolist():
      items, width = groups[g]
      rows += [([i], width) for i in items]
      rows += [([], width)] * (self.group - len(items))
    return rows

  def _check_epoch(self, part):
    blocks = len(self.store)
    if self._starts[part + 1] == self._starts[part + 1 - blocks]:
      shortest = min(
        int(self.store.block(i).sizes.min()) for i in range(blocks)
      )
      raise no_pair_fits(self.store.bitext.where, self.length, shortest)


def no_pair_fits(where: str, length: int, shortest: int) -> errors.UserError:
  """The sentence for a text that has nothing for rows of this length."""
  return errors.UserError(
    f'{where}: none of its pairs fits into data.length={length} tokens (the '
    f'shortest needs {shortest}); raise data.length.'
  )


@dataclasses.dataclass(frozen=True)
class PairIds:
  """The same source, with the pairs' ids instead of the rows."""

  rows: Rows

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index) -> list[str]:
    return self.rows.pair_ids(int(index))


def train_iterator(
  sources: Sequence[Rows],
  weights: Sequence[float],
  batch_size: int,
  num_batches: int,
  *,
  own: Sequence[int] | None = None,
  workers: int = 0,
  max_wait: float = math.inf,
) -> reader.Reader:
  """Batches of the sources' rows, mixed in proportion to the weights.

  Batch n has rows n * batch_size to (n + 1) * batch_size - 1 of the mixture,
  and each process its part of them.

  Args:
    sources: with enough rows each.
    weights: one for each.
    batch_size: rows in a batch, of all processes together.
    num_batches: after so many the iterator ends.
    own: which rows of each batch are read here; None for all.
    workers: processes of Grain's that read here; 0 is a thread.
    max_wait: see mt/data/reader.py.
  """
  chex.assert_scalar_positive(batch_size)
  chex.assert_equal(len(sources), len(weights))
  own = range(batch_size) if own is None else [int(i) for i in own]
  local = len(own)

  def mixed(kind=lambda rows: rows):
    # Copies have nothing cached that would have to travel to the workers, and
    # nothing in common with those that a closed iterator's thread still reads.
    copies = [kind(dataclasses.replace(s)) for s in sources]
    parts = [grain.MapDataset.source(s) for s in copies]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)

  def pair_ids(number):
    of_rows, first = mixed(PairIds), number * batch_size
    return [x for i in range(first, first + batch_size) for x in of_rows[i]]

  def dataset_from(first):
    rows = mixed()

    def row(number):
      batch, at = divmod(number, local)
      return rows[batch * batch_size + own[at]]

    numbers = grain.MapDataset.range(first * local, num_batches * local)
    batched = numbers.map(row).batch(local, drop_remainder=True)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    ahead = batched.to_iter_dataset(options)
    if not workers:
      return ahead
    return ahead.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers),
      reader.begin_worker,
    )

  where = ' and '.join(dict.fromkeys(s.store.bitext.where for s in sources))
  return reader.Reader(dataset_from, num_batches, where, pair_ids, max_wait)


def eval_batches(
  examples: store_lib.Examples,
  length: int,
  batch_size: int,
  packing: bool = True,
) -> Iterator[Batch]:
  """Every example that fits once; empty rows fill the last batch."""
  chex.assert_scalar_positive(batch_size)
  fitting = np.flatnonzero(examples.sizes <= length)
  rows = [[i] for i in fitting.tolist()]
  if packing:
    packed = best_fit(examples.sizes[fitting], length)
    rows = [fitting[row].tolist() for row in packed]
  rows += [[]] * (-len(rows) % batch_size)
  for at in range(0, len(rows), batch_size):
    built = [build_row(examples, r, length) for r in rows[at : at + batch_size]]
    yield {k: np.stack([b[k] for b in built]) for k in built[0]}
