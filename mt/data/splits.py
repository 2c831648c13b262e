"""All that a run reads: training rows, validation batches, texts to score."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import time

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mt.base import journal
from mt.data import batches
from mt.data import bitext
from mt.data import faults
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import sharding


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything read from disk, as text and as tokens."""

  train: batches.TrainBatches
  train_digest: str  # Changes with any training text, its tokens, its share.
  train_texts: dict[str, str]  # By file: changes with the text or its tokens.
  valid: list[batches.Batch]  # For the loss.
  minitrain: list[batches.Batch]  # The same of some training pairs, or none.
  scored: dict[str, list[lines.Pair]]  # By split, to be translated.


def read(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  texts: dict[str, list[bitext.Bitext]],
  mesh: Mesh | None = None,
) -> Data:
  """Tokenises the splits and says what became of them.

  Args:
    texts: see corpus.read_splits.
    mesh: decides which rows of a training batch this process reads.

  Raises:
    errors.UserError: no pair of a split fits into a row.
  """
  start, size = time.monotonic(), config.train.batch_size
  for split, split_texts in texts.items():
    for text in split_texts:
      journal.say(f'{split}: {bitext.describe(text)}')
      if split == 'train' and (found := faults.count(text, text.sample_lines)):
        shown = faults.describe(found)
        journal.say(f'train: of these {shown}; `python -m mt.data` shows them')
  sources, mixture = training_rows(config, tok, texts['train'])
  for source in sources:
    source[0]  # Refuses a text without a row.
    journal.say(f'train: {describe(source)}')
  train = batches.TrainBatches(
    sources,
    mixture,
    size,
    config.train.max_steps,
    own=None if mesh is None else sharding.own_rows(mesh, size),
  )
  keys = [source.store.key for source in sources]
  identity = json.dumps([keys, mixture, config.data.length])
  scored = {k: v[0].read() for k, v in texts.items() if k != 'train'}
  for_loss = scored['valid'][: config.eval.loss_pairs or None]
  where = texts['valid'][0].where
  valid, dropped = _loss_batches(config, tok, for_loss, where)
  journal.say(
    f'valid: {len(for_loss):,} pairs for the loss, {dropped:,} of them dropped'
    f'; data ready after {time.monotonic() - start:.1f} s'
  )
  return Data(
    train=train,
    train_digest=hashlib.sha256(identity.encode()).hexdigest(),
    train_texts={s.store.bitext.where: s.store.key for s in sources},
    valid=valid,
    minitrain=_minitrain(config, tok, texts['train'], mixture, len(for_loss)),
    scored={
      split: pairs[: config.eval.translate_pairs or None]
      for split, pairs in scored.items()
    },
  )


def training_rows(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  texts: Sequence[bitext.Bitext],
) -> tuple[list[batches.Rows], list[float]]:
  """The rows of each training text, and its share of all rows."""
  template = template_lib.from_config(config)
  rows = [
    batches.Rows(
      store.open_store(text, tok, template),
      config.data.length,
      config.seed,
      packing=config.data.packing,
      group=config.train.batch_size,
    )
    for text in texts
  ]
  return rows, list(config.data.weights) or [len(text) for text in texts]


def describe(source: batches.Rows) -> str:
  """What a source's first epoch is like, or the first block of it."""
  (examples, rows), blocks = source.block_of_epoch(0), len(source.store)
  fits = examples.sizes <= source.length
  tokens = int(examples.sizes[fits].sum())
  targets = tokens - int(examples.target_starts[fits].sum())
  padding = 1 - tokens / max(1, len(rows) * source.length)
  return (
    f'{len(examples):,} pairs'
    + (f' (the first of {blocks} blocks)' if blocks > 1 else '')
    + f', {int((~fits).sum()):,} dropped (more than data.length={source.length}'
    f' tokens), {tokens:,} tokens, {targets:,} of them targets, in '
    f'{len(rows):,} rows, {padding:.1%} of which is padding'
  )


def draw(
  texts: Sequence[bitext.Bitext],
  mixture: Sequence[float],
  number: int,
  seed: int,
) -> list[lines.Pair]:
  """A sample of training pairs, each text with its share of the mixture.

  They are fewer than `number` where a text has fewer than its part.
  """
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(number, np.array(mixture) / sum(mixture))
  out = []
  for text, count in zip(texts, counts.tolist(), strict=True):
    some = rng.choice(len(text), min(count, len(text)), replace=False)
    out += text.read(np.sort(some).tolist())
  return out


def _minitrain(config, tok, texts, mixture, most) -> list[batches.Batch]:
  number = min(config.eval.minitrain_pairs or most, most)
  if number < 0:
    return []
  pairs = draw(texts, mixture, number, config.seed)
  where = f'eval.minitrain_pairs={number}, drawn from training'
  made, dropped = _loss_batches(config, tok, pairs, where)
  journal.say(
    f'minitrain: {len(pairs):,} training pairs for a loss beside that of '
    f'valid, {dropped:,} of them dropped'
  )
  return made


def _loss_batches(config, tok, pairs, where) -> tuple[list[batches.Batch], int]:
  """Batches of pairs for a loss, and how many of them do not fit into a row."""
  examples = template_lib.encode(pairs, tok, template_lib.from_config(config))
  length, size = config.data.length, config.train.batch_size
  dropped = int((examples.sizes > length).sum())
  if dropped == len(examples):
    raise batches.no_pair_fits(where, length, [examples.sizes])
  made = batches.eval_batches(examples, length, size, config.data.packing)
  return list(made)[: config.eval.loss_batches or None], dropped
