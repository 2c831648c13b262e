"""The data side: tokens per second, time to the first batch, large texts.

python -m tests.benchmarks.data [a source in MTNT's layout, a tokenizer.model]
python -m tests.benchmarks.data million FILE.tsv [millions of pairs]
python -m tests.benchmarks.data start FILE.tsv TOKENIZER.model

The second command writes a text of so many pairs, made of the sample's; the
third opens one and takes its first batch. Give it twice: the second start finds
the index and the tokens of the first.
"""

import contextlib
import os
import pathlib
import random
import resource
import sys
import tempfile
import time

import jax
import numpy as np

from configs import gemma3_270m
from mt.data import batches
from mt.data import bitext
from mt.data import corpus
from mt.data import epochs
from mt.data import splits
from mt.data import store
from mt.data import template
from mt.data import tokenizer
from mt.weights import pretrained


def write_millions(path, number):
  """`number` million pairs: sentences of the sample with a number behind."""
  text = corpus.SAMPLE / 'train' / 'train.en-fr.tsv'
  rows = [line.split('\t') for line in text.read_text('utf-8').splitlines()]
  rows = [r for r in rows if len(r[1]) + len(r[2]) < 160]  # As MTNT's are.
  rng = random.Random(0)
  with open(path, 'w', encoding='utf-8', newline='\n') as f:
    for i in range(number * 10**6):
      _, source, target = rng.choice(rows)
      f.write(f'{i}\t{source} {i}\t{target} {i}\n')
  print(f'{path}: {os.path.getsize(path) / 1e6:.0f} MB')


def start(path, model):
  """Seconds to open a text and to its first batch, and the most memory."""
  tok, begin = tokenizer.from_file(model), time.perf_counter()
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.01)
  opened = time.perf_counter()
  prompt = template.Template('English: {source}\nFrench:', ' ')
  rows = epochs.Epochs(store.open_store(text, tok, prompt), 256, 0)
  with contextlib.closing(batches.TrainBatches([rows], [1], 8, 100)) as train:
    next(train)
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(
    f'{len(text):,} lines: opened after {opened - begin:.2f} s, first batch '
    f'after {time.perf_counter() - begin:.2f} s, {most / 1e6:.2f} GB'
  )


def main(source='sample', model=''):
  config = gemma3_270m.get_config()
  config.data.source = source
  config.train.max_steps = 10_000
  if model:
    tok = tokenizer.from_file(model)
  else:
    name = config.weights.source
    tok = pretrained.open_source(name, '', '', seed=0, texts=()).tokenizer
  for when in ('cold', 'warm', 'warm'):
    start = time.perf_counter()
    texts = corpus.read_splits(config.data, ('train', 'valid'))
    read = splits.read(config, tok, texts)
    next(read.train)
    print(f'{when}: first batch after {time.perf_counter() - start:.2f} s')
  (text,) = texts['train']
  rates = []
  for _ in range(5):
    with tempfile.TemporaryDirectory() as folder:
      os.environ['XDG_CACHE_HOME'] = folder  # A store of its own, empty.
      start = time.perf_counter()
      (rows,), _ = splits.training_rows(config, tok, [text])
      _, plan = rows.block(0)
      made = (
        batches.build_row(*rows.row(i), rows.length) for i in range(len(plan))
      )
      tokens = sum(int((row['segment_ids'] > 0).sum()) for row in made)
      rates.append(tokens / (time.perf_counter() - start))
  print(
    f'tokenised, packed, built: {np.median(rates):,.0f} tokens/s '
    f'({jax.device_count()} device, {os.cpu_count()} cores)'
  )


if __name__ == '__main__':
  if sys.argv[1:2] == ['million']:
    write_millions(pathlib.Path(sys.argv[2]), int((sys.argv[3:] or [5])[0]))
  elif sys.argv[1:2] == ['start']:
    start(*sys.argv[2:])
  else:
    main(*sys.argv[1:])
