"""Pairs to packed rows of tokens, through Grain.

One example is  BOS prompt target EOS;  the target and EOS are learned.
With `prompt='English: {source}\\nFrench:'` and `target_prefix=' '`:

  source 'Hi!'  target 'Salut !'
  tokens         <bos> English :  ▁Hi  !  \\n French :  ▁Salut ▁! <eos>
  target_mask      0     0     0    0  0   0   0    0     1     1   1

A row of `length` tokens holds several examples, told apart by segment_ids
(1, 2, …; 0 is padding); positions restart in each. Masks come from lengths,
never from token values: Gemma's pad id is an ordinary 0.
"""

from collections.abc import Iterator
import dataclasses
import functools
import zlib

import chex
import grain
import numpy as np

from mt import corpus
from mt import errors
from mt import tokenizer

Batch = dict[str, np.ndarray]  # tokens, positions, segment_ids, target_mask.


@dataclasses.dataclass(frozen=True)
class Template:
  """How a pair becomes text.

  Attributes:
    prompt: with {source} in it once.
    target_prefix: put before the target, and taken off translations.
    target_bos: the target begins with a BOS of its own, as the tutorial has it;
      like all of the target it is learned, and made by the model itself.
  """

  prompt: str
  target_prefix: str = ''
  target_bos: bool = False


@dataclasses.dataclass(frozen=True)
class Examples:
  """Tokenised examples in one flat array.

  Attributes:
    tokens: [sum of lengths] int32.
    offsets: [n + 1] int64; example i is tokens[offsets[i]:offsets[i + 1]].
    target_starts: [n] int32, where the learned part begins in each.
    too_long: how many pairs did not fit and were left out.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  target_starts: np.ndarray
  too_long: int

  def __len__(self) -> int:
    return len(self.target_starts)

  @property
  def num_targets(self) -> int:
    return int(len(self.tokens) - self.target_starts.sum())

  @property
  def digest(self) -> int:
    """32 bits that change with any token or border."""
    borders = zlib.crc32(self.offsets.tobytes() + self.target_starts.tobytes())
    return zlib.crc32(self.tokens.tobytes(), borders)


def prompt_ids(
  source: str, tok: tokenizer.Tokenizer, template: Template
) -> list[int]:
  """What precedes the target, in training and in translation alike."""
  return [tok.bos_id] + tok.encode(template.prompt.replace('{source}', source))


def encode(
  pairs: list[corpus.Pair],
  tok: tokenizer.Tokenizer,
  template: Template,
  length: int,
  where: str,
) -> Examples:
  """Tokenises pairs; what exceeds `length` tokens is left out and counted.

  Args:
    pairs: of one split.
    tok: its ids must fit the model.
    template: prompt and target format.
    length: of a row, in tokens; a target is never cut.
    where: name of the split for error messages.

  Raises:
    errors.UserError: no pair fits.
  """
  chex.assert_scalar_positive(length)
  rows, starts, shortest = [], [], None
  for pair in pairs:
    prompt = prompt_ids(pair.source, tok, template)
    target = tok.encode(template.target_prefix + pair.target) + [tok.eos_id]
    target = [tok.bos_id] + target if template.target_bos else target
    size = len(prompt) + len(target)
    shortest = min(size, shortest or size)
    if size <= length:
      rows.append(prompt + target)
      starts.append(len(prompt))
  if not rows:
    raise errors.UserError(
      f'{where}: none of its {len(pairs):,} pairs fits into data.length='
      f'{length} tokens (the shortest needs {shortest}); raise data.length.'
    )
  sizes = np.array([len(r) for r in rows], np.int64)
  return Examples(
    tokens=np.concatenate([np.array(r, np.int32) for r in rows]),
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    target_starts=np.array(starts, np.int32),
    too_long=len(pairs) - len(rows),
  )


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


def build_row(examples: Examples, items: list[int], length: int) -> Batch:
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
class PackedRows:
  """Training rows by number: a Grain source, epoch after epoch.

  Row numbers run through the epochs; each epoch has every example once, in an
  order and a packing drawn from (seed, epoch). So a position in the data is one
  integer, and needs no history.

  Attributes:
    examples: of the training split.
    length: L.
    seed: of the order.
    num_rows: how many rows training will ask for.
    packing: several examples in a row, or one.
  """

  examples: Examples
  length: int
  seed: int
  num_rows: int
  packing: bool = True

  def __len__(self) -> int:
    return self.num_rows

  def __getitem__(self, index) -> Batch:
    epoch, row = 0, int(index)
    while row >= self.epoch_size(epoch):
      row -= self.epoch_size(epoch)
      epoch += 1
    return build_row(self.examples, self._plan(epoch)[row], self.length)

  def epoch_size(self, epoch: int) -> int:
    """Number of rows in an epoch; it differs a little between them."""
    return self._epoch_sizes(epoch)

  @functools.cached_property
  def _epoch_sizes(self):
    return functools.cache(lambda epoch: len(self._plan(epoch)))

  @functools.cached_property
  def _plan(self):
    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> list[list[int]]:
      rng = np.random.default_rng([self.seed, epoch])
      order = rng.permutation(len(self.examples))
      if not self.packing:
        return [[i] for i in order.tolist()]
      rows = best_fit(np.diff(self.examples.offsets)[order], self.length)
      return [order[rows[i]].tolist() for i in rng.permutation(len(rows))]

    return plan


def train_iterator(rows: PackedRows, batch_size: int) -> grain.DatasetIterator:
  """Batches [B, L] with `get_state` and `set_state`, read ahead by one thread.

  Every batch is full; the iterator ends after `rows.num_rows` rows.
  """
  chex.assert_scalar_positive(batch_size)
  dataset = grain.MapDataset.source(rows).batch(batch_size, drop_remainder=True)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(dataset.to_iter_dataset(options))


def eval_batches(
  examples: Examples, length: int, batch_size: int
) -> Iterator[Batch]:
  """Every example once, in a fixed packing; empty rows fill the last batch."""
  chex.assert_scalar_positive(batch_size)
  rows = best_fit(np.diff(examples.offsets), length)
  rows += [[]] * (-len(rows) % batch_size)
  for at in range(0, len(rows), batch_size):
    built = [build_row(examples, r, length) for r in rows[at : at + batch_size]]
    yield {k: np.stack([b[k] for b in built]) for k in built[0]}
