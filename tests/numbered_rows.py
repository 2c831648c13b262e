"""Rows of numbered examples, whose tokens tell which they are."""

import dataclasses
import functools
import itertools
import pathlib
import types

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt import batches
from mt import bitext
from mt import corpus
from mt import lines
from mt import store
from mt import tokenizer

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


@functools.cache
def sample_pairs():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  return bitext.open_bitext([path], 'en-fr').read()


@functools.cache
def sample_tokenizer():
  texts = [t for p in sample_pairs() for t in (p.source, p.target)]
  return tokenizer.train(texts, 400)


@functools.cache
def gemma(name):
  path = SHARED / 'tokenizers' / name / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  proto = sp_pb2.ModelProto.FromString(path.read_bytes())
  # The rebuilt file of Gemma 1 lacks the names of its own special pieces.
  proto.trainer_spec.bos_piece = '<bos>'
  proto.trainer_spec.eos_piece = '<eos>'
  return tokenizer.from_proto(proto.SerializeToString(), str(path))


def make_examples(sizes, first=0):
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


def example_tokens(i, size):
  return [1000 * (i + 1) + at for at in range(size)]


def recover(sizes, row):
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
    assert tokens.tolist() == example_tokens(i, size), 'cut, or mixed up'
    assert row['positions'][at].tolist() == list(range(size))
    mask = np.arange(size) >= min(1 + i % 3, size - 1)
    assert row['target_mask'][at].tolist() == mask.tolist()
    found.append(i)
  for name in ('tokens', 'positions', 'target_mask'):
    assert not row[name][used:].any(), f'{name} in the padding'
  return found


LENGTH = 20
SIZES = np.random.default_rng(5).integers(2, LENGTH + 1, 40)
# Three blocks: 15, 15 and 13 examples; three of them never fit.
BLOCKED = np.concatenate([SIZES[:20], [21, 40, 1000], SIZES[20:]])
BOUNDS = (0, 15, 30, 43)


@dataclasses.dataclass(frozen=True)
class Store:
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


def make_rows(
  num_rows=400, seed=0, sizes=SIZES, bounds=(0, None), first=0, **kwargs
):
  blocks = tuple(
    make_examples(sizes[low:high], first + low)
    for low, high in itertools.pairwise(bounds)
  )
  return batches.Rows(Store(blocks), LENGTH, seed, num_rows, **kwargs)


KINDS = {
  'packed': {},
  'padded': {'packing': False},
  'buckets': {'packing': False, 'buckets': (6, 12), 'group': 4},
  'packed, blocks': {'sizes': BLOCKED, 'bounds': BOUNDS},
  'padded, blocks': {'sizes': BLOCKED, 'bounds': BOUNDS, 'packing': False},
  'buckets, blocks': {
    'sizes': BLOCKED,
    'bounds': BOUNDS,
    'packing': False,
    'buckets': (6, 12),
    'group': 4,
  },
}


def epoch_size(rows, epoch):
  """Number of rows in an epoch; it differs a little between them."""
  blocks = len(rows.store)
  parts = range(epoch * blocks, (epoch + 1) * blocks)
  return sum(len(rows.part(part)[1]) for part in parts)


def epochs(rows, number, sizes=SIZES):
  """Which examples each row of each epoch has: [epoch][row][…]."""
  at, out = 0, []
  for epoch in range(number):
    end = at + epoch_size(rows, epoch)
    out.append([recover(sizes, rows[i]) for i in range(at, end)])
    at = end
  return out


def equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def all_equal(got, want):
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    equal(a, b)
