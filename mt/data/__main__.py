"""A data card: what training will see, counted, measured and shown.

python -m mt.data --config=configs/….py [--plot=lengths.png]
"""

from collections.abc import Sequence
import os
import sys

from absl import flags
import chex
import matplotlib.figure
import ml_collections
import numpy as np

from mt.base import cli
from mt.base import errors
from mt.base import journal
from mt.data import bitext
from mt.data import corpus
from mt.data import splits
from mt.data import store
from mt.data import template
from mt.data import tokenizer
from mt.train import settings
from mt.weights import pretrained

_QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_EXAMPLES = 5


def lengths(blocks: store.Store) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each prompt and of each target of a text: [n], [n].

  Tokenises all blocks that are not in the store yet.
  """
  prompts, sizes = [], []
  progress = journal.Progress(
    f'tokenising {blocks.bitext.where}, blocks', len(blocks)
  )
  for number in range(len(blocks)):
    examples = blocks.block(number)
    prompts.append(examples.target_starts)
    sizes.append(examples.sizes)
    progress.update(number + 1)
  progress.close()
  prompt = np.concatenate(prompts)
  return prompt, np.concatenate(sizes) - prompt


def table(prompt: np.ndarray, target: np.ndarray, length: int) -> str:
  """Quantiles of the lengths, and how many pairs exceed a row.

  Args:
    prompt: [n], tokens before the target.
    target: [n], tokens learned.
    length: of a row.
  """
  chex.assert_equal_shape([prompt, target])
  names = [f'{q} %' for q in _QUANTILES]
  names[0], names[-1] = 'least', 'most'
  out = ['  tokens    ' + ''.join(f'{n:>8}' for n in names) + '        sum']
  for name, values in (
    ('prompt', prompt),
    ('target', target),
    ('both', prompt + target),
  ):
    marks = np.percentile(values, _QUANTILES, method='nearest')
    cells = ''.join(f'{int(m):8,}' for m in marks)
    out.append(f'  {name:10}{cells}{int(values.sum()):11,}')
  dropped = int((prompt + target > length).sum())
  out.append(
    f'  dropped: {dropped:,} of {len(prompt):,} pairs (more than data.length='
    f'{length} tokens)'
  )
  return '\n'.join(out)


def example(
  examples: template.Examples,
  number: int,
  tok: tokenizer.Tokenizer,
  color: bool,
) -> str:
  """One example's pieces; what is learned stands out.

  In colour it is bold green and the rest is dim; else it stands in ⟦ ⟧. A space
  is shown as ▁, a newline as ⏎.
  """
  pieces = [tok.spm.id_to_piece(i) for i in examples.ids(number).tolist()]
  start = int(examples.target_starts[number])
  masked, learned = (
    ''.join(part).replace('\n', '⏎')
    for part in (pieces[:start], pieces[start:])
  )
  if color:
    return f'\033[2m{masked}\033[0m\033[1;32m{learned}\033[0m'
  return f'{masked}⟦{learned}⟧'


def plot(
  path: str, named: dict[str, tuple[np.ndarray, np.ndarray]], length: int
) -> None:
  """A PNG: one histogram of prompt, target and both for each text.

  Raises:
    errors.UserError: the file cannot be written.
  """
  figure = matplotlib.figure.Figure(
    figsize=(8, 3 * len(named)), layout='constrained'
  )
  axes = figure.subplots(len(named), squeeze=False)[:, 0]
  for axis, (name, (prompt, target)) in zip(axes, named.items(), strict=True):
    both = prompt + target
    most = max(length, int(np.percentile(both, 99.5)))
    bins = np.linspace(0, most, 65)
    for label, values in (
      ('prompt', prompt),
      ('target', target),
      ('both', both),
    ):
      axis.hist(np.minimum(values, most), bins, histtype='step', label=label)
    axis.axvline(length, color='0.6', linestyle='--', label='data.length')
    axis.set(title=name, xlabel='tokens (longer ones in the last bar)')
    axis.set_ylabel('pairs')
    axis.legend()
  try:
    figure.savefig(path, format='png', dpi=120)
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot write the plot ({e.strerror}); give --plot the path of '
      'a PNG file in a folder that you may write to.'
    ) from e


def show(config: ml_collections.ConfigDict, color: bool, png: str = '') -> str:
  """The card of a config's data.

  Args:
    config: see configs/default.py.
    color: for a terminal.
    png: where to put the histograms, if anywhere.

  Raises:
    errors.UserError: what a run with this config would say; a text without one
      for validation is shown, though.
  """
  settings.check(config)
  there = [
    split
    for split in corpus.splits(config)
    if corpus.split_source(config.data, split) is not None
  ]
  texts = corpus.read_splits(config.data, there)
  random = config.weights.source == 'random'
  tok = pretrained.open_source(
    config.weights.source,
    config.weights.size,
    config.weights.tokenizer,
    seed=config.seed,
    texts=corpus.some_texts(texts['train'][0]) if random else (),
  ).tokenizer
  out, measured = [], {}
  for split in corpus.splits(config):
    if split not in texts:
      out.append(f'{split}: no text is named; data.{split} names one.')
      continue
    sources, mixture = splits.training_rows(config, tok, texts[split])
    for source, share in zip(sources, mixture, strict=False):
      where = source.store.bitext.where
      found = measured[f'{split}: {where}'] = lengths(source.store)
      out.append(f'{split}: {bitext.describe(source.store.bitext)}')
      out.append(table(*found, config.data.length))
      if split == 'train':
        out.append(_epoch(source, share / sum(mixture), config.train))
      out += [f'  {x}' for x in _examples(source.store, tok, color)]
      out.append('')
  if png:
    plot(png, measured, config.data.length)
  return '\n'.join(out)


def _epoch(source, share, train) -> str:
  blocks = [source.block_of_epoch(i) for i in range(len(source.store))]
  count = sum(len(rows) for _, rows in blocks)
  used = sum(
    int(examples.sizes[examples.sizes <= source.length].sum())
    for examples, _ in blocks
  )
  padding = 1 - used / max(1, count * source.length)
  epochs = train.max_steps * train.batch_size * share / max(1, count)
  return (
    f'  an epoch: {count:,} rows, {padding:.1%} padding, '
    f'{count / train.batch_size:,.1f} batches of {train.batch_size}; a share '
    f'of {share:.0%} in train.max_steps={train.max_steps:,} is {epochs:.2f} '
    'epochs'
  )


def _examples(blocks, tok, color) -> list[str]:
  first = blocks.block(0)
  return [
    example(first, i, tok, color) for i in range(min(_EXAMPLES, len(first)))
  ]


def define_flags() -> None:
  """Defines --config and --plot."""
  cli.define_config()
  flags.DEFINE_string('plot', '', 'A PNG of the lengths, to be written there.')


def main(_: Sequence[str]) -> None:
  config, _ = cli.read_config()
  color = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
  print(show(config, color, flags.FLAGS.plot))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
