"""A data card: what training will see, counted, measured and shown.

python -m mt.data --config=configs/….py [--plot=lengths.png]
"""

from collections.abc import Sequence

from mt.base import cli  # First: chex wants a temporary folder.

# isort: split
from absl import flags
import chex
import matplotlib.figure
import ml_collections
import numpy as np

from mt.base import errors
from mt.base import journal
from mt.base import screen
from mt.data import bitext
from mt.data import corpus
from mt.data import directions
from mt.data import faults
from mt.data import splits
from mt.data import store
from mt.data import template
from mt.data import tokenizer
from mt.train import settings
from mt.weights import pretrained

_QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_EXAMPLES = 5


def lengths(blocks: store.Store) -> dict[str, np.ndarray]:
  """Tokens of each `prompt`, each `target`, and `both` of a text: [n] each.

  Tokenises all blocks that are not in the store yet.

  Raises:
    errors.UserError: see Store.block; or there is no pair in them.
  """
  parts, text = [], blocks.bitext
  progress = journal.Progress(f'tokenising {text.where}, blocks', len(blocks))
  for number in range(len(blocks)):
    examples = blocks.block(number)
    parts.append((examples.target_starts, examples.sizes))
    progress.update(number + 1)
  progress.close()
  prompt, size = map(np.concatenate, zip(*parts, strict=True))
  if not len(size):
    bad = blocks.unusable(range(len(blocks)))
    raise bitext.no_pair(text.where, bad, text.unit)
  return {'prompt': prompt, 'target': size - prompt, 'both': size}


def table(sizes: dict[str, np.ndarray], length: int) -> str:
  """Quantiles of `lengths`, and how many pairs exceed a row."""
  chex.assert_equal_shape([*sizes.values()])
  names = [f'{q} %' for q in _QUANTILES]
  names[0], names[-1] = 'least', 'most'
  out = ['  tokens    ' + ''.join(f'{n:>8}' for n in names) + '        sum']
  for name, values in sizes.items():
    marks = np.percentile(values, _QUANTILES, method='nearest')
    cells = ''.join(f'{int(m):8,}' for m in marks)
    out.append(f'  {name:10}{cells}{int(values.sum()):11,}')
  dropped = int((values > length).sum())
  out.append(
    f'  dropped: {dropped:,} of {len(values):,} pairs (more than data.length='
    f'{length} tokens)'
  )
  return '\n'.join(out)


def example(
  examples: template.Examples, number: int, tok: tokenizer.Tokenizer
) -> str:
  """One example's pieces; what is learned stands in ⟦ ⟧.

  A space is shown as ▁, a newline as ⏎.
  """
  pieces = tok.spm.id_to_piece(examples.ids(number).tolist())
  pieces = [piece.replace('\n', '⏎') for piece in pieces]
  start = int(examples.target_starts[number])
  return f'{"".join(pieces[:start])}⟦{"".join(pieces[start:])}⟧'


def plot(
  path: str, named: dict[str, dict[str, np.ndarray]], length: int
) -> None:
  """A PNG: histograms of prompt, target and both for each text."""
  figure = matplotlib.figure.Figure(
    figsize=(8, 3 * len(named)), layout='constrained'
  )
  axes = figure.subplots(len(named), squeeze=False)[:, 0]
  for axis, (name, sizes) in zip(axes, named.items(), strict=True):
    most = max(length, int(np.percentile(sizes['both'], 99.5)))
    bins = np.linspace(0, most, 65)
    for label, values in sizes.items():
      axis.hist(np.minimum(values, most), bins, histtype='step', label=label)
    axis.axvline(length, color='0.6', linestyle='--', label='data.length')
    axis.set(title=name, xlabel='tokens (longer ones in the last bar)')
    axis.set(ylabel='pairs')
    axis.legend()
  try:
    figure.savefig(path, format='png', dpi=120)
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot write the plot ({e.strerror}); change --plot.'
    ) from e


def show(config: ml_collections.ConfigDict, png: str = '') -> str:
  """The card of a config's data; `png`: where to put the histograms, if at all.

  Raises:
    errors.UserError: what a run with this config would say; a text without one
      for validation is shown, though.
  """
  settings.check(config)
  wanted = corpus.splits(config)
  texts = corpus.read_splits(
    config.data,
    [x for x in wanted if corpus.split_source(config.data, x) is not None],
  )
  random = config.weights.source == 'random'
  tok = pretrained.open_source(
    config.weights.source,
    config.weights.size,
    config.weights.tokenizer,
    seed=config.seed,
    texts=corpus.some_texts(texts['train'][0]) if random else (),
  ).tokenizer
  plain = config.copy_and_resolve_references()
  plain.data.noise, plain.data.shards = 0.0, 1  # They are of training alone.
  out, measured = [], {}
  for split in wanted:
    if split not in texts:
      out.append(f'{split}: no text is named; data.{split} names one.')
      continue
    own = config if split == 'train' else plain
    sources, mixture = splits.training_rows(own, tok, texts[split])
    for source, share in zip(sources, mixture, strict=False):
      text = source.store.bitext
      name = directions.name(config.data.pair, split, text.pair)
      found = measured[f'{name}: {text.where}'] = lengths(source.store)
      out.append(f'{name}: {bitext.describe(text)}')
      numbers = range(len(source.store))
      if len(numbers) > 1 and (bad := source.store.unusable(numbers)):
        why = bitext.reasons(bad, text.unit)
        out.append(f'  not used of all lines: {why}')
      out.append(table(found, config.data.length))
      if split == 'train':
        out += faults.show(faults.count(text, range(len(text))))
        out += [f'  {x}' for x in splits.other_signs(text, texts)]
        out.append(_epoch(source, share / sum(mixture), config.train))
      first = source.store.block(0)
      for i in range(min(_EXAMPLES, len(first))):
        out.append(f'  {example(first, i, tok)}')
      out.append('')
  if png:
    plot(png, measured, config.data.length)
  return '\n'.join(out)


def _epoch(source, share, train) -> str:
  used = count = 0
  for number in range(len(source.store)):
    examples, rows = source.block(number)
    used += int(examples.sizes[examples.sizes <= source.length].sum())
    count += len(rows)
  padding = 1 - used / max(1, count * source.length)
  epochs = train.max_steps * train.batch_size * share / max(1, count)
  return (
    f'  an epoch: {count:,} rows, {padding:.1%} padding, '
    f'{count / train.batch_size:,.1f} batches of {train.batch_size}; a share '
    f'of {share:.0%} in train.max_steps={train.max_steps:,} is {epochs:.2f} '
    'epochs'
  )


def main(_: Sequence[str]) -> None:
  config, _ = cli.read_config()
  print(show(config, flags.FLAGS.plot))
  screen.check()


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_string('plot', '', 'A PNG of the lengths, to be written there.')
  cli.run(main)
