"""All that a run reads: training rows, validation batches, texts to score."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import time

from jax.sharding import Mesh
import ml_collections

from mt import batches
from mt import bitext
from mt import journal
from mt import lines
from mt import sharding
from mt import store
from mt import template as template_lib
from mt import tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything read from disk, as text and as tokens.

  Attributes:
    train: iterator over all training batches.
    train_digest: changes with any training text, its tokens and its share.
    valid: batches of the validation loss.
    scored: split -> pairs to be translated and scored.
  """

  train: batches.TrainIterator
  train_digest: str
  valid: list[batches.Batch]
  scored: dict[str, list[lines.Pair]]


def training_rows(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  texts: Sequence[bitext.Bitext],
) -> tuple[list[batches.Rows], list[float]]:
  """The rows of each training text, and its share of all rows."""
  template = template_lib.from_config(config)
  size = config.train.batch_size
  rows = [
    batches.Rows(
      store.open_store(text, tok, template),
      config.data.length,
      config.seed,
      # A source can be asked for all rows; one more for what Grain rounds off.
      num_rows=config.train.max_steps * size + size,
      packing=config.data.packing,
      buckets=tuple(config.data.buckets),
      group=size,
    )
    for text in texts
  ]
  return rows, list(config.data.weights) or [len(text) for text in texts]


def describe(rows: batches.Rows) -> str:
  """What a source's first epoch is like, or the first block of it."""
  (examples, plan), blocks = rows.part(0), len(rows.store)
  fits = examples.sizes <= rows.length
  tokens = int(examples.sizes[fits].sum())
  targets = tokens - int(examples.target_starts[fits].sum())
  padding = 1 - tokens / max(1, sum(width for _, width in plan))
  return (
    f'{len(examples):,} pairs'
    + (f' (the first of {blocks} blocks)' if blocks > 1 else '')
    + f', {int((~fits).sum()):,} dropped (more than data.length={rows.length} '
    f'tokens), {tokens:,} tokens, {targets:,} of them targets, in '
    f'{len(plan):,} rows, {padding:.1%} of which is padding'
  )


def read(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  texts: dict[str, list[bitext.Bitext]],
  mesh: Mesh | None = None,
) -> Data:
  """Tokenises the splits and says what became of them.

  Args:
    config: see configs/default.py.
    tok: the model's.
    texts: see corpus.read_splits.
    mesh: decides which rows of a training batch this process reads.

  Raises:
    errors.UserError: no pair of a split fits into a row.
  """
  start = time.monotonic()
  length, size = config.data.length, config.train.batch_size
  for split, split_texts in texts.items():
    for text in split_texts:
      journal.say(f'{split}: {bitext.describe(text)}')
  rows, shares = training_rows(config, tok, texts['train'])
  for source in rows:
    source[0]  # Refuses a text without a row.
    journal.say(f'train: {describe(source)}')
  scored = {k: v[0].read() for k, v in texts.items() if k != 'train'}
  chosen = scored['valid'][: config.eval.loss_pairs or None]
  valid = store.encode(chosen, tok, rows[0].store.template)
  fits = valid.sizes <= length
  if not fits.any():
    where = texts['valid'][0].where
    raise batches.no_pair_fits(where, length, int(valid.sizes.min()))
  journal.say(
    f'valid: {len(chosen):,} pairs for the loss, {int((~fits).sum()):,} of '
    f'them dropped; data ready after {time.monotonic() - start:.1f} s'
  )
  identity = json.dumps([[r.store.key for r in rows], shares, length])
  number = config.eval.translate_pairs or None
  eval_batches = list(
    batches.eval_batches(valid, length, size, config.data.packing)
  )
  return Data(
    train=batches.train_iterator(
      rows,
      shares,
      size,
      config.train.max_steps,
      own=None if mesh is None else sharding.own_rows(mesh, size),
      workers=config.data.workers,
    ),
    train_digest=hashlib.sha256(identity.encode()).hexdigest(),
    valid=eval_batches[: config.eval.loss_batches or None],
    scored={split: pairs[:number] for split, pairs in scored.items()},
  )
