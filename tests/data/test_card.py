"""The data card: counts against counting by hand, and the command."""

import functools
import os
import pathlib
import re
import subprocess
import sys
import types

import matplotlib.image
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import debug
from mt.base import cli
from mt.data import __main__ as card
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import splits
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')


@functools.cache
def _tokenizer():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  pairs = bitext.open_bitext([path], 'en-fr').read()
  return tokenizer.train([t for p in pairs for t in (p.source, p.target)], 400)


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
  prompts, targets = template_lib.encode_pairs(text.read(), tok, template)
  return np.array([*map(len, prompts)]), np.array([*map(len, targets)])


def _quantiles(values):
  marks = (0, 5, 25, 50, 75, 95, 99, 100)
  return [int(np.percentile(values, m, method='nearest')) for m in marks]


def _numbers(line):
  return [int(x.replace(',', '')) for x in line.split()[1:]]


# Lengths.


def test_the_table_by_hand():
  prompt = np.arange(1, 102)  # 1 … 101: the quantile q is 1 + q.
  target = np.full(101, 2000)
  shown = card.table(prompt, target, 2050).splitlines()
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


def test_lengths_are_those_of_all_blocks(tmp_path, monkeypatch):
  path = _write(tmp_path / 'a.tsv', range(20))
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.5)
  monkeypatch.setattr(store, '_BLOCK', 6)
  config = debug.get_config()
  (rows,), _ = splits.training_rows(config, _tokenizer(), [text])
  assert len(rows.store) == 4
  prompt, target = card.lengths(rows)
  prompts, targets = template_lib.encode_pairs(
    text.read(), _tokenizer(), template_lib.from_config(config)
  )
  want = sorted((len(p), len(t)) for p, t in zip(prompts, targets, strict=True))
  assert sorted(zip(prompt.tolist(), target.tolist(), strict=True)) == want


def test_counts_are_those_of_numpy(config, tmp_path):
  shown = card.show(config, color=False).splitlines()
  for split, number in (('train', 53), ('valid', 7)):
    path = tmp_path / f'{split}.tsv'
    at = shown.index(
      f'{split}: {path}: {number + 2} lines, {number} pairs; not used: 1 fewer '
      f'than 2 columns (the first in line 4), 1 an empty source (the first in '
      'line 5)'
    )
    prompt, target = _sizes(config, path)
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
  if not packing:
    config.data.buckets = (48, 64)
  text = card.show(config, color=False)
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
    places = 96 * rows
  else:
    # Groups of four of each width; what is left over moves up.
    places, left = 0, 0
    for low, width in ((0, 48), (48, 64), (64, 96)):
      left += int(((low < sizes) & (sizes <= width)).sum())
      places += width * 4 * (left // 4)
      left %= 4
    places += 96 * 4 * (left > 0)
    assert rows == 4 * -(-len(sizes) // 4)
  assert float(padding) == pytest.approx(
    100 * (1 - sizes.sum() / places), abs=0.051
  )


def test_a_share_of_a_mixture(config, tmp_path):
  config.data.source += ',' + _write(tmp_path / 'b.tsv', [2] * 18)
  config.data.weights = (3, 1)
  shown = [
    x for x in card.show(config, color=False).splitlines() if 'an epoch' in x
  ]
  assert [re.search(r'a share of (\d+)%', x)[1] for x in shown] == ['75', '25']
  for line, share in zip(shown, (0.75, 0.25), strict=True):
    rows = int(re.search(r'(\d+) rows', line)[1])
    epochs = float(re.search(r'is ([\d.]+) epochs', line)[1])
    assert epochs == pytest.approx(80 * share / rows, abs=0.0051)


def test_the_test_split_is_shown_where_it_is_scored(config, tmp_path):
  config.data.test = _write(tmp_path / 'test.tsv', [1, 2, 3, 4])
  assert '\ntest: ' not in card.show(config, color=False)
  config.eval.test = True
  assert f'\ntest: {config.data.test}: 6 lines, 4' in card.show(config, False)


def test_it_refuses_what_a_run_refuses(config):
  config.train.max_steps = 0
  refusal(lambda: card.show(config, color=False), 'train.max_steps is 0')
  config.train.max_steps = 1
  config.data.source = '/nowhere'
  refusal(lambda: card.show(config, color=False), '/nowhere')


# Examples.


def test_examples_show_what_is_learned():
  proto = sp_pb2.ModelProto.FromString(_tokenizer().proto)
  for piece in ('\n', 'F', '!'):  # As Gemma's own have them.
    proto.pieces.add(piece=piece, score=0.0, type=4)  # User-defined.
  tok = tokenizer.from_proto(proto.SerializeToString(), 'newlines')
  pairs = [lines.Pair('1', 'Hi you', 'Salut  !')]
  examples = store.encode(pairs * 2, tok, PLAIN)
  masked, learned = '<s>English:▁Hi▁you⏎French:', '▁Salut▁▁!</s>'
  assert card.example(examples, 1, tok, color=False) == f'{masked}⟦{learned}⟧'
  assert card.example(examples, 1, tok, color=True) == (
    f'\033[2m{masked}\033[0m\033[1;32m{learned}\033[0m'
  )


@pytest.mark.parametrize('color', [True, False])
def test_five_examples_of_each_split(config, color):
  text = card.show(config, color)
  mark = '\033[1;32m' if color else '⟦'
  for part in text.split('\nvalid: '):
    shown = [x for x in part.splitlines() if mark in x]
    assert len(shown) == len(set(shown)) == 5
  assert ('\033' in text) == color


def test_few_pairs_have_few_examples(config, tmp_path):
  config.data.valid = _write(tmp_path / 'valid.tsv', [1, 2, 3])
  _, valid = card.show(config, color=False).split('\nvalid: ')
  assert valid.count('⟦') == 3


# The command.


class _Screen:
  def __init__(self, terminal):
    self.text, self.isatty = '', lambda: terminal

  def write(self, text):
    self.text += text

  def flush(self):
    pass


@pytest.mark.parametrize(
  ('terminal', 'no_color', 'want'),
  [
    (True, None, True),
    (True, '', True),  # no-color.org: present and not empty.
    (True, '1', False),
    (False, None, False),
  ],
)
def test_colour_is_for_terminals(monkeypatch, terminal, no_color, want):
  monkeypatch.delenv('NO_COLOR', raising=False)
  if no_color is not None:
    monkeypatch.setenv('NO_COLOR', no_color)
  monkeypatch.setattr(cli, 'read_config', lambda: ('corpus', 'its file'))
  given = types.SimpleNamespace(FLAGS=types.SimpleNamespace(plot='x.png'))
  monkeypatch.setattr(card, 'flags', given)
  monkeypatch.setattr(card, 'show', lambda *args: f'{args}')
  screen = _Screen(terminal)
  monkeypatch.setattr(sys, 'stdout', screen)
  card.main(['corpus'])
  assert screen.text == f'{("corpus", want, "x.png")}\n'


def _plot(path, **named):
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
  # One below the other for several texts; other lengths, other bars.
  both = _plot(
    tmp_path / 'b.png', train=(prompt, target), valid=(target, prompt)
  )
  assert both.shape == (720, 960, 3)
  for half in (both[:360], both[360:]):
    assert min(_drawn(half)) > 100
  # What is one high bar for the target is a low line for the prompt.
  assert _drawn(image)[0] < _drawn(image)[1]
  swapped = _plot(tmp_path / 'c.png', train=(target, prompt))
  assert _drawn(swapped)[0] > _drawn(swapped)[1]
  assert abs(_drawn(swapped)[2] - _drawn(image)[2]) < 100  # The sum of both.


def test_lengths_beyond_the_plot_are_in_its_last_bar(tmp_path):
  """Few outliers must not squeeze all others together, nor be lost."""
  prompt, target = np.arange(1000) % 40, np.arange(1000) % 10
  a = _plot(tmp_path / 'a.png', train=(prompt, target))
  prompt[:4] = 10_000
  b = _plot(tmp_path / 'b.png', train=(prompt, target))
  changed = (a != b).any(-1)
  assert 0 < changed.mean() < 0.02
  assert changed[:, 864:].any(), 'nothing new at the right end'


def test_a_plot_that_cannot_be_written(config, tmp_path):
  for path in (tmp_path / 'no' / 'a.png', tmp_path):
    refusal(
      lambda path=path: card.show(config, False, str(path)),
      path,
      'cannot write the plot',
      '--plot',
    )


def _command(*args, **env):
  return subprocess.run(
    [sys.executable, '-m', 'mt.data', *args],
    cwd=ROOT,
    env=os.environ | env,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_command(tmp_path):
  path = tmp_path / 'lengths.png'
  done = _command(f'--config={ROOT}/configs/debug.py', f'--plot={path}')
  assert done.returncode == 0, done.stderr
  assert '694 pairs' in done.stdout and '90 pairs' in done.stdout
  assert done.stdout.count('⟦') == 10 and '\033' not in done.stdout
  assert 'rows, ' in done.stdout and 'dropped: ' in done.stdout
  image = matplotlib.image.imread(path)
  assert image.shape[:2] == (720, 960)


def test_a_bad_flag_is_one_line():
  done = _command(f'--config={ROOT}/configs/debug.py', '--plt=x')
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.count('\n') == 1, done.stderr
  assert 'plt' in done.stderr and 'plot' in done.stderr
