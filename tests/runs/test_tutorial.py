"""The tutorial's run, and the knobs that it needed."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tutorial
from mt.base import journal
from mt.data import batches
from mt.data import bitext
from mt.data import corpus
from mt.data import splits
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.evaluate import sentences
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import settings
from tests.fixtures import flax_fixture

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ('a', 'b', 'no', 'yes', 'lol', 'ok', 'hi', 'wait', 'what', 'so')


def _pairs(number, seed):
  """Short sentences, and a long one after every second of them."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(number):
    words = rng.choice(WORDS, rng.integers(1, 6 if i % 3 < 2 else 40))
    out.append((' '.join(words), ' '.join(words[::-1])))
  return out


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A cache with MTNT in it, and Kaggle with a tiny model."""
  folder = tmp_path_factory.mktemp('world')
  texts = ['Translate this into French:\nHello, my name is Morgane.\n'] * 50
  for split, number in (('train', 300), ('valid', 90)):
    path = folder / f'xdg/mt/mtnt/MTNT.1.1/MTNT/{split}/{split}.en-fr.tsv'
    path.parent.mkdir(parents=True)
    pairs = _pairs(number, number)
    path.write_text(
      ''.join(f'{i}\t{a}\t{b}\n' for i, (a, b) in enumerate(pairs)), 'utf-8'
    )
    texts += [text for pair in pairs for text in pair]
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  sample = bitext.open_bitext([path], 'en-fr').read()
  texts += [p.source for p in sample]  # Enough for 500 pieces.
  tok = tokenizer.train(texts, 500)
  cfg = sizes.SIZES['debug']
  params = parameters.init(cfg, jax.random.key(0))
  published = folder / 'published'
  flax_fixture.save(published / '2b-it', cfg, params, dtype='bfloat16')
  (published / 'tokenizer.model').write_bytes(tok.proto)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  server = flax_fixture.Kaggle(published)
  yield folder, server, tok, jax.tree.map(lambda x: x.astype(float), params)
  server.close()


def _tutorial_loss(cfg, params, tok, pair):
  """`forward_and_loss_fn` of the tutorial on one row; None if it is too long.

  Tokens, padding, mask and the normalisation are the tutorial's.
  """
  source = f'Translate this into French:\n{pair.source}\n'
  source = [tok.bos_id, *tok.encode(source)]
  target = [tok.bos_id, *tok.encode(pair.target), tok.eos_id]
  size = len(source) + len(target)
  if size > 25:
    return None
  tokens = np.array([source + target + [0] * (25 - size)], np.int32)
  mask = np.arange(25) >= len(source)
  mask &= np.arange(25) < size
  segments = (np.arange(25) < size).astype(np.int32)[None]
  positions = np.arange(25, dtype=np.int32)[None]
  return float(_row_loss(cfg, params, tokens, mask, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def _row_loss(cfg, params, tokens, mask, positions, segments):
  hidden = model.forward(cfg, params, tokens, positions, segments)
  logits = (hidden @ params['embedding'].T)[0, :-1]
  one_hot = jax.nn.one_hot(tokens[0, 1:], logits.shape[-1])
  one_hot = one_hot * mask[1:, None]
  norm_factor = 1 / (jnp.sum(mask[1:]) + 1e-8)
  return -jnp.sum(jax.nn.log_softmax(logits) * one_hot) * norm_factor


@pytest.mark.heavy
def test_the_tutorial_as_it_is_written(world, tmp_path):
  """Only environment variables differ from what a user types."""
  folder, server, tok, params = world
  environment = server.environment(tmp_path / 'kagglehub')
  environment['XDG_CACHE_HOME'] = str(folder / 'xdg')
  done = subprocess.run(
    [
      sys.executable,
      'train.py',
      '--config=configs/tutorial.py',
      f'--workdir={tmp_path / "w"}',
    ],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  number = r'(\d+\.\d+)'
  start = re.search(
    rf'^Start, validation loss: {number}$', done.stdout, re.MULTILINE
  )
  table = re.findall(
    rf'^STEP (\d+) training loss: {number} - eval loss: {number}$',
    done.stdout,
    re.MULTILINE,
  )
  assert [int(at) for at, _, _ in table] == [20, 40, 60, 80, 100]
  # What it printed before the first step, by the tutorial's own formula.
  path = folder / 'xdg/mt/mtnt/MTNT.1.1/MTNT/valid/valid.en-fr.tsv'
  text = bitext.open_bitext([path], 'en-fr', quotes='tfds', max_bad_fraction=1)
  pairs = text.read()
  losses = [_tutorial_loss(sizes.SIZES['debug'], params, tok, p) for p in pairs]
  losses = [x for x in losses if x is not None]
  assert len(losses) > 50
  np.testing.assert_allclose(float(start[1]), np.mean(losses[:50]), rtol=1e-5)
  lines = (tmp_path / 'w' / 'metrics.jsonl').read_text().splitlines()
  steps = [m['loss'] for m in map(json.loads, lines) if 'loss' in m]
  assert len(steps) == 100
  for at, train, _ in table:
    mean = np.mean(steps[int(at) - 20 : int(at)])
    np.testing.assert_allclose(float(train), mean, rtol=1e-6)
  # It learns, even this one.
  assert float(table[-1][2]) < float(start[1])
  assert 'source     Hello, my name is Morgane.\nafter      ' in done.stdout
  left = tmp_path / 'w' / 'translations' / 'texts.after.txt'
  assert left.read_text('utf-8').count('\n') == 1


def test_its_config_is_valid():
  config = tutorial.get_config()
  settings.check(config)
  template = template_lib.from_config(config)
  assert (
    template.prompt.format(source=config.eval.texts[0])
    == 'Translate this into French:\nHello, my name is Morgane.\n'
  )


def test_no_credentials_is_one_line(world, tmp_path):
  folder, server, *_ = world
  environment = server.environment(tmp_path / 'kagglehub')
  environment['XDG_CACHE_HOME'] = str(folder / 'xdg')
  environment |= {'KAGGLE_KEY': '', 'HOME': str(tmp_path)}
  done = subprocess.run(
    [sys.executable, 'train.py', '--config=configs/tutorial.py']
    + [f'--workdir={tmp_path / "w"}'],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  (line,) = [x for x in done.stderr.splitlines() if x.startswith('error:')]
  assert 'KAGGLE_USERNAME and KAGGLE_KEY' in line
  assert 'Traceback' not in done.stderr


# The knobs.


@pytest.mark.parametrize('number', [0, 2, 99])
@pytest.mark.parametrize('packing', [True, False])
def test_the_first_batches_of_the_validation(
  debug_config, tmp_path, number, packing
):
  pairs = [f'{a}\t{b}\n' for a, b in _pairs(40, 1)]
  (tmp_path / 'x.tsv').write_text(''.join(pairs), 'utf-8')
  config = debug_config
  config.data.source = config.data.valid = str(tmp_path / 'x.tsv')
  config.data.packing, config.train.batch_size = packing, 3
  config.eval.loss_pairs, config.eval.loss_batches = 0, number
  texts = corpus.read_splits(config.data, ('train', 'valid'))
  tok = tokenizer.train(corpus.some_texts(texts['train'][0]), 500)
  made = splits.read(config, tok, texts).valid
  examples = template_lib.encode(
    texts['valid'][0].read(), tok, template_lib.from_config(config)
  )
  want = list(batches.eval_batches(examples, 128, 3, packing))
  assert len(want) > 2
  assert len(made) == (2 if number == 2 else len(want))
  for a, b in zip(made, want, strict=False):
    for name in b:
      np.testing.assert_array_equal(a[name], b[name])
  if not packing and number != 2:
    rows = [row for b in made for row in b['segment_ids']]
    fits = int((examples.sizes <= 128).sum())
    assert [row.max() for row in rows] == [1] * fits + [0] * (len(rows) - fits)


def test_table_lines_by_hand(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  sums = [{'nll': 6.0, 'targets': 2.0}, {'nll': 5.0, 'targets': 5.0}]
  assert journal.table_line(path, 0, sums) == 'Start, validation loss: 2.0'
  lines = [{'step': 0, 'valid_loss': 9.0}, {'step': 1, 'loss': 7.0}]
  lines += [{'step': 1, 'valid_loss': 9.0}, {'step': 2, 'loss': 1.0}]
  lines += [{'step': 3, 'loss': 1.2}, {'step': 3, 'loss': None}]
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
  assert journal.table_line(path, 3, sums) == (
    'STEP 3 training loss: 1.100000023841858 - eval loss: 2.0'
  )
  path.write_text('{"step": 1, "loss": null}\n')
  assert journal.table_line(path, 1, sums) == (
    'STEP 1 training loss: nan - eval loss: 2.0'
  )


def test_texts_are_shown_and_left(tmp_path, capsys):
  def translator(params, texts):
    return [f'{params} {text.upper()}' for text in texts]

  sentences.show_texts(translator, 7, ('Hello there', 'lol\nno'), tmp_path)
  out = capsys.readouterr().out
  assert 'source     Hello there\nafter      7 HELLO THERE\n' in out
  left = tmp_path / 'translations'
  assert (left / 'texts.source.txt').read_text() == 'Hello there\nlol no\n'
  assert (left / 'texts.after.txt').read_text() == '7 HELLO THERE\n7 LOL NO\n'
