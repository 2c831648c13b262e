"""All that a run reads: training rows, validation batches, texts to score."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import time

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mt.base import errors
from mt.base import journal
from mt.data import batches
from mt.data import bitext
from mt.data import lines
from mt.data import reader
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import sharding


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything read from disk, as text and as tokens.

  Attributes:
    train: iterator over all training batches.
    train_digest: changes with any training text, its tokens and its share.
    valid: batches of the validation loss.
    minitrain: the same of some training pairs; none without
      eval.minitrain_pairs.
    scored: split -> pairs to be translated and scored.
  """

  train: reader.Reader
  train_digest: str
  valid: list[batches.Batch]
  minitrain: list[batches.Batch]
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


def draw(
  texts: Sequence[bitext.Bitext],
  shares: Sequence[float],
  number: int,
  seed: int,
) -> list[lines.Pair]:
  """A sample of training pairs, the same whenever the arguments are.

  Args:
    texts: the training texts.
    shares: of each text.
    number: of pairs; fewer where a text has fewer than its part.
    seed: decides which.
  """
  rng = np.random.default_rng(seed)
  parts = rng.multinomial(number, np.array(shares) / sum(shares))
  out = []
  for text, part in zip(texts, parts.tolist(), strict=True):
    some = rng.choice(len(text), min(part, len(text)), replace=False)
    out += text.read(np.sort(some).tolist())
  return out


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
  number = config.eval.minitrain_pairs or len(chosen)
  number = max(0, min(number, len(chosen)))
  mini = store.encode(
    draw(texts['train'], shares, number, config.seed),
    tok,
    rows[0].store.template,
  )
  fits = mini.sizes <= length
  if number:
    journal.say(
      f'minitrain: {len(mini)} training pairs for a loss beside that of valid, '
      f'{int((~fits).sum())} of them dropped'
    )
    if not fits.any():
      raise errors.UserError(
        f'eval.minitrain_pairs is {number}, but none of the training pairs '
        f'drawn fits into data.length={length} tokens; -1, or more '
        'of both expected.'
      )
  identity = json.dumps([[r.store.key for r in rows], shares, length])
  number = config.eval.translate_pairs or None

  def loss_batches(examples):
    made = batches.eval_batches(examples, length, size, config.data.packing)
    return list(made)[: config.eval.loss_batches or None]

  return Data(
    train=batches.train_iterator(
      rows,
      shares,
      size,
      config.train.max_steps,
      own=None if mesh is None else sharding.own_rows(mesh, size),
    ),
    train_digest=hashlib.sha256(identity.encode()).hexdigest(),
    valid=loss_batches(valid),
    minitrain=loss_batches(mini),
    scored={split: pairs[:number] for split, pairs in scored.items()},
  )
