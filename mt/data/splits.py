"""All that a run reads: training rows, validation batches, texts to score."""

from collections.abc import Sequence
import dataclasses
import time

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mt.base import journal
from mt.data import batches
from mt.data import bitext
from mt.data import directions
from mt.data import epochs
from mt.data import faults
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.data import typography
from mt.gemma import sharding


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything read from disk, as text and as tokens."""

  train: batches.TrainBatches
  train_digest: str  # Changes with any training text, its tokens, its share.
  train_texts: dict[str, str]  # By file: changes with the text or its tokens.
  valid: list[batches.Batch]  # For the loss.
  minitrain: list[batches.Batch]  # The same of some training pairs, or none.
  # By split and direction (see directions.name), to be translated.
  scored: dict[str, list[lines.Pair]]


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
  pair, shards = config.data.pair, config.data.shards
  steps = config.train.max_steps
  _say_found(pair, texts)
  sources, mixture = training_rows(config, tok, texts['train'])
  own = None if mesh is None else sharding.own_rows(mesh, size)
  shard = 0 if own is None else int(own[0]) * shards // size
  sources = [dataclasses.replace(s, shard=(shard, shards)) for s in sources]
  for source in sources:
    source.row(0)  # Refuses a text without a row.
    name = directions.name(pair, 'train', source.store.bitext.pair)
    journal.say(f'{name}: {describe(source)}')
  train = batches.TrainBatches(sources, mixture, size, steps, own, shards)
  keys = [source.store.key for source in sources]
  identity = keys, mixture, config.data.length, *([shards] * (shards > 1))
  scored = {
    directions.name(pair, split, text.pair): text.read()
    for split, of_split in texts.items()
    if split != 'train'
    for text in of_split
  }
  for_loss = [
    (direction, scored[name][: config.eval.loss_pairs or None])
    for name, direction in directions.named(pair, 'valid').items()
  ]
  where = ', '.join({text.where: None for text in texts['valid']})
  valid, dropped = _loss_batches(config, tok, for_loss, where)
  number = sum(len(pairs) for _, pairs in for_loss)
  journal.say(
    f'valid: {number:,} pairs for the loss, {dropped:,} of them dropped'
    f'; data ready after {time.monotonic() - start:.1f} s'
  )
  return Data(
    train=train,
    train_digest=bitext.digest_of(*identity),
    train_texts={
      directions.name(pair, text.where, text.pair): key
      for text, key in zip(texts['train'], keys, strict=True)
    },
    valid=valid,
    minitrain=_minitrain(config, tok, texts['train'], mixture, number),
    scored={
      split: pairs[: config.eval.translate_pairs or None]
      for split, pairs in scored.items()
    },
  )


def _say_found(pair, texts):
  """Says what became of each text's lines."""
  for split, split_texts in texts.items():
    for text in split_texts:
      name = directions.name(pair, split, text.pair)
      journal.say(f'{name}: {bitext.describe(text)}')
      if split != 'train':
        continue
      if found := faults.describe(faults.count(text, text.sample_lines)):
        journal.say(f'{name}: of these {found}; `python -m mt.data` shows them')
      for difference in other_signs(text, texts):
        journal.say(f'{name}: {difference}')


def other_signs(
  text: bitext.Bitext, texts: dict[str, list[bitext.Bitext]]
) -> list[str]:
  """What of a training text is written otherwise than in validation."""
  found = [
    difference
    for valid in texts.get('valid', ())
    if valid.pair == text.pair
    for difference in typography.differences(
      *([pair.target for pair in x.sample.pairs] for x in (text, valid))
    )
  ]
  if len({directions.languages(x.pair)[1] for x in texts['train']}) > 1:
    return found  # Where the knob is refused.
  hint = ' (data.apostrophe changes them)'
  return [x + hint * x.startswith('apostrophes') for x in found]


def training_rows(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  texts: Sequence[bitext.Bitext],
) -> tuple[list[epochs.Epochs], list[float]]:
  """The rows of each training text, and its share of all rows."""
  rows = [
    epochs.Epochs(
      store.open_store(
        *(text, tok, _template(config, text.pair)),
        noise=config.data.noise,
        seed=config.seed,
        shards=config.data.shards,
      ),
      config.data.length,
      config.seed,
      packing=config.data.packing,
      group=config.train.batch_size // config.data.shards,
    )
    for text in texts
  ]
  shares = list(config.data.weights) or [len(text) for text in texts]
  if not config.data.weights and config.data.temperature != 1:
    shares = [n ** (1 / config.data.temperature) for n in shares]
  return rows, shares


def _template(config, direction):
  return template_lib.from_config(directions.only(config, direction))


def describe(source: epochs.Epochs) -> str:
  """What a source's first epoch is like, or the first block of it."""
  (examples, rows), blocks = source.block(0), len(source.store)
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
) -> list[list[lines.Pair]]:
  """A sample of the pairs of each training text, by its share of the mixture.

  They are fewer than `number` where a text has fewer than its part.
  """
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(number, np.array(mixture) / sum(mixture))
  out = []
  for text, count in zip(texts, counts.tolist(), strict=True):
    some = rng.choice(len(text), min(count, len(text)), replace=False)
    out.append(text.read(np.sort(some).tolist()))
  return out


def _minitrain(config, tok, texts, mixture, most) -> list[batches.Batch]:
  number = min(config.eval.minitrain_pairs or most, most)
  if number < 0:
    return []
  drawn = draw(texts, mixture, number, config.seed)
  if not any(drawn):
    journal.say(
      'minitrain: none of the training lines drawn is a pair that is used; '
      'there is no loss of them (a higher eval.minitrain_pairs draws more)'
    )
    return []
  groups = list(zip([text.pair for text in texts], drawn, strict=True))
  where = f'eval.minitrain_pairs={number}, drawn from training'
  made, dropped = _loss_batches(config, tok, groups, where)
  journal.say(
    f'minitrain: {sum(map(len, drawn)):,} training pairs for a loss beside '
    f'that of valid, {dropped:,} of them dropped'
  )
  return made


def _loss_batches(
  config, tok, groups, where
) -> tuple[list[batches.Batch], int]:
  """Batches for a loss, of (direction, pairs); how many fit into no row."""
  examples = template_lib.join(
    [template_lib.encode(p, tok, _template(config, d)) for d, p in groups]
  )
  length, size = config.data.length, config.train.batch_size
  dropped = int((examples.sizes > length).sum())
  if not len(examples):
    raise bitext.no_pair(where, {})
  if dropped == len(examples):
    raise epochs.no_pair_fits(where, length, examples.sizes)
  made = batches.eval_batches(examples, length, size, config.data.packing)
  return list(made)[: config.eval.loss_batches or None], dropped
