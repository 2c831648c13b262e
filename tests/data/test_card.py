"""The data card: counts against counting by hand, and the command."""

import pathlib
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import debug
from mt.data import __main__ as card
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')


def _write(path, lengths):
  """Pairs of so many words, with two lines that cannot be used."""
  rows = [
    f'{i}{" word" * n}\t{i}{" mot" * (n // 2)}' for i, n in enumerate(lengths)
  ]
  rows[3:3] = ['no second column', '\tan empty source']
  path.write_text(''.join(row + '\n' for row in rows))
  return str(path)


@pytest.fixture
def config(tmp_path):
  c = debug.get_config()
  rng = np.random.default_rng(0)
  train = [*rng.integers(1, 12, 50), 60, 70, 80]
  c.data.source = _write(tmp_path / 'train.tsv', train)
  c.data.valid = _write(tmp_path / 'valid.tsv', [1, 2, 3, 4, 5, 6, 7])
  c.data.max_bad_fraction = 0.5
  c.data.length = 96
  return c


def _sizes(config, path, template=PLAIN):
  """Tokens of prompt and target of each pair, with the card's tokenizer."""
  texts = corpus.read_splits(config.data, ['train'])['train']
  tok = tokenizer.train(corpus.some_texts(texts[0]), 512)
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.5)
  examples = template_lib.encode(text.read(), tok, template)
  return examples.target_starts, examples.sizes - examples.target_starts


def _sizes_of(prompt, target):
  return {'prompt': prompt, 'target': target, 'both': prompt + target}


def _quantiles(values):
  marks = (0, 5, 25, 50, 75, 95, 99, 100)
  return [int(np.percentile(values, m, method='nearest')) for m in marks]


def _numbers(line):
  return [int(x.replace(',', '')) for x in line.split()[1:]]


# Lengths.


def test_the_table_by_hand():
  prompt = np.arange(1, 102)  # 1 … 101: the quantile q is 1 + q.
  target = np.full(101, 2000)
  shown = card.table(_sizes_of(prompt, target), 2050).splitlines()
  assert ' '.join(shown[0].split()) == (
    'tokens least 5 % 25 % 50 % 75 % 95 % 99 % most sum'
  )
  assert ' '.join(shown[1].split()) == 'prompt 1 6 26 51 76 96 100 101 5,151'
  assert shown[2].split() == ['target', *['2,000'] * 8, '202,000']
  assert shown[3].split()[:3] == ['both', '2,001', '2,006']
  assert shown[4] == (
    '  dropped: 51 of 101 pairs (more than data.length=2050 tokens)'
  )
  assert len({len(line) for line in shown[:4]}) == 1, 'columns stand askew'


def test_a_large_text_that_is_filtered_away(tmp_path, monkeypatch):
  """Its sample does not tell that no other line has a pair."""
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 8)
  config = debug.get_config()
  config.data.source = str(tmp_path / 'x.tsv')
  (tmp_path / 'x.tsv').write_text('a\ta\n' * 9)
  config.data.filter = 'copies'
  (text,) = corpus.read_splits(config.data, ['train'])['train']
  tok = numbered_rows.sample_tokenizer()
  made = store.open_store(text, tok, PLAIN, shards=2)
  words = 'x.tsv: no pair in it (9 copies', 'data.filter'
  refusal(lambda: card.lengths(made), *words)


def test_counts_are_those_of_numpy(config, tmp_path, monkeypatch):
  monkeypatch.setattr(store, '_BLOCK', 20)  # Of all blocks.
  shown = card.show(config).splitlines()
  for split, number in (('train', 53), ('valid', 7)):
    path = tmp_path / f'{split}.tsv'
    at = shown.index(
      f'{split}: {path}: {number + 2} lines, {number} pairs; not used: 1 fewer '
      f'than 2 columns (the first in line 4), 1 an empty source (the first in '
      'line 5)'
    )
    prompt, target = _sizes(config, path)
    if split == 'train':  # It has several blocks.
      at += 1
      assert shown[at].startswith('  not used of all lines: 1 fewer than 2')
    for offset, values in ((2, prompt), (3, target), (4, prompt + target)):
      want = [*_quantiles(values), int(values.sum())]
      assert _numbers(shown[at + offset]) == want
    dropped = int((prompt + target > 96).sum())
    assert shown[at + 5] == (
      f'  dropped: {dropped} of {number} pairs (more than data.length=96 '
      'tokens)'
    )
    assert (split == 'valid') or dropped >= 3


@pytest.mark.parametrize('packing', [True, False])
def test_an_epoch_by_hand(config, tmp_path, packing):
  config.data.packing = packing
  text = card.show(config)
  prompt, target = _sizes(config, tmp_path / 'train.tsv')
  sizes = (prompt + target)[prompt + target <= 96]
  (line,) = (x for x in text.splitlines() if 'an epoch' in x)
  rows, padding, batches, epochs = re.fullmatch(
    r'  an epoch: (\d+) rows, ([\d.]+)% padding, ([\d.]+) batches of 4; a '
    r'share of 100% in train.max_steps=20 is ([\d.]+) epochs',
    line,
  ).groups()
  rows = int(rows)
  assert float(batches) == pytest.approx(rows / 4, abs=0.051)
  assert float(epochs) == pytest.approx(80 / rows, abs=0.0051)
  if packing:
    assert len(sizes) / 2 > rows >= sizes.sum() / 96
  else:
    assert rows == 4 * -(-len(sizes) // 4)
  want = 100 * (1 - sizes.sum() / (96 * rows))
  assert float(padding) == pytest.approx(want, abs=0.051)


def test_a_share_of_a_mixture(config, tmp_path):
  config.data.source += ',' + _write(tmp_path / 'b.tsv', [2] * 18)
  config.data.weights = (3, 1)
  shown = [x for x in card.show(config).splitlines() if 'an epoch' in x]
  assert [re.search(r'a share of (\d+)%', x)[1] for x in shown] == ['75', '25']
  for line, share in zip(shown, (0.75, 0.25), strict=True):
    rows = int(re.search(r'(\d+) rows', line)[1])
    epochs = float(re.search(r'is ([\d.]+) epochs', line)[1])
    assert epochs == pytest.approx(80 * share / rows, abs=0.0051)


def test_the_test_split_is_shown_where_it_is_scored(config, tmp_path):
  config.data.test = _write(tmp_path / 'test.tsv', [1, 2, 3, 4])
  assert '\ntest: ' not in card.show(config)
  config.eval.test = True
  assert f'\ntest: {config.data.test}: 6 lines, 4' in card.show(config)


def test_noise_and_shards_are_those_of_training(config):
  """No run validates on noisy text, or needs so many lines for it."""
  plain = card.show(config)
  config.data.noise, config.data.shards, config.train.batch_size = 0.9, 40, 40
  noisy = card.show(config)
  assert noisy.split('\nvalid: ')[1] == plain.split('\nvalid: ')[1]
  learned = [x for x in noisy.splitlines() if '⟦' in x]
  assert learned[0] not in plain


def test_it_refuses_what_a_run_refuses(config):
  config.train.max_steps = 0
  refusal(lambda: card.show(config), 'train.max_steps is 0')
  config.train.max_steps = 1
  config.data.source = '/nowhere'
  refusal(lambda: card.show(config), '/nowhere')


def test_a_text_without_one_for_validation_is_shown(config):
  """Someone looks at a text before there is another."""
  config.data.valid = ''
  shown = card.show(config)
  assert '53 pairs' in shown and 'an epoch' in shown
  assert '\nvalid: no text is named; data.valid names one.' in shown


# Examples.


def test_examples_show_what_is_learned():
  proto = sp_pb2.ModelProto.FromString(numbered_rows.sample_tokenizer().proto)
  for piece in ('\n', 'F', '!'):  # As Gemma's own have them.
    proto.pieces.add(piece=piece, score=0.0, type=4)  # User-defined.
  tok = tokenizer.from_proto(proto.SerializeToString(), 'newlines')
  pairs = [lines.Pair('1', 'Hi you', 'Salut  !')]
  examples = template_lib.encode(pairs * 2, tok, PLAIN)
  masked, learned = '<s>English:▁Hi▁you⏎French:', '▁Salut▁▁!</s>'
  assert card.example(examples, 1, tok) == f'{masked}⟦{learned}⟧'


def test_five_examples_of_each_split(config):
  for part in card.show(config).split('\nvalid: '):
    shown = [x for x in part.splitlines() if '⟦' in x]
    assert len(shown) == len(set(shown)) == 5


# The command.


def _plot(path, **named):
  named = {name: _sizes_of(*ends) for name, ends in named.items()}
  card.plot(str(path), named, 50)
  return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def _drawn(image):
  """Pixels of the three histograms: blue, orange and green ones."""
  colored = np.ptp(image, axis=-1) > 60
  return [int((colored & (image.argmax(-1) == k)).sum()) for k in (2, 0, 1)]


def test_the_plot(tmp_path):
  prompt, target = np.arange(1, 41), np.full(40, 7)
  image = _plot(tmp_path / 'a.png', train=(prompt, target))
  assert (tmp_path / 'a.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert image.shape == (360, 960, 3)
  assert min(_drawn(image)) > 100
  # What is one high bar for the target is a low line for the prompt.
  assert _drawn(image)[0] < _drawn(image)[1]
  swapped = _plot(tmp_path / 'c.png', train=(target, prompt))
  assert _drawn(swapped)[0] > _drawn(swapped)[1]
  assert abs(_drawn(swapped)[2] - _drawn(image)[2]) < 100  # The sum of both.


def test_a_plot_that_cannot_be_written(config, tmp_path):
  for path in (tmp_path / 'no' / 'a.png', tmp_path):
    refusal(
      lambda path=path: card.show(config, str(path)),
      path,
      'cannot write the plot',
      '--plot',
    )


def test_the_command(tmp_path):
  path = tmp_path / 'lengths.png'
  command = [sys.executable, '-m', 'mt.data', '--config=configs/debug.py']
  done = subprocess.run(
    [*command, f'--plot={path}'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert '694 pairs' in done.stdout and '90 pairs' in done.stdout
  assert done.stdout.count('⟦') == 10
  assert 'rows, ' in done.stdout and 'dropped: ' in done.stdout
  image = matplotlib.image.imread(path)
  assert image.shape[:2] == (720, 960)
