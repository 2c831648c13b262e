"""What a model translates like; and PEFT's fine-tuning, to compare ours with.

  python -m tests.benchmarks.quality score --data=DIR --weights=SOURCE
      [--split=test --pairs=0 --beam=1 --prompt=… --target_prefix=…]
  python -m tests.benchmarks.quality peft --data=DIR --seconds=3600 --out=FOLDER
      [--learning_rate=1e-3 --threads=2]

DIR is data.source, such as a folder in MTNT's layout. `score` prints a line of
JSON with BLEU and chrF of what the pretrained weights SOURCE make of a split,
as train.py would translate it. `peft` trains Hugging Face's model with PEFT for
so many seconds, from the start of its process, on our training pairs and
prompts in a random order, and leaves the merged weights in FOLDER, for `score`.
It needs .venv-bench (`make bench` makes it).
"""

import json
import pathlib
import random
import sys
import time

from absl import flags
import numpy as np

from configs import gemma3_270m
from mt.base import cli
from mt.base import compiling
from mt.base import errors
from mt.data import corpus
from mt.data import template as template_lib
from mt.evaluate import scores
from mt.train import machine
from mt.translate import translator as translator_lib
from mt.weights import pretrained
from tests.benchmarks import speed
from tests.benchmarks.sides import ours


def make_config(f: flags.FlagValues):
  """configs/gemma3_270m.py on the data, prompt and search of the flags."""
  c = gemma3_270m.get_config()
  c.data.source = f.data
  c.decode.beam = f.beam
  c.weights.source = f.weights or c.weights.source
  c.template.prompt = f.prompt or c.template.prompt
  c.template.target_prefix = f.target_prefix
  return machine.here(c)


def score(f: flags.FlagValues) -> dict:
  """Scores of one model on one split."""
  config = make_config(f)
  source = pretrained.open_source(
    config.weights.source, '', config.weights.tokenizer, seed=0, texts=()
  )
  pairs = corpus.read_splits(config.data, [f.split])[f.split][0].read()
  pairs = pairs[: f.pairs or None]
  start = time.monotonic()
  translator = translator_lib.from_config(config, source)
  texts = translator(source.read(), [p.source for p in pairs])
  target = config.data.pair.split('-')[1]
  found = scores.score(texts, [p.target for p in pairs], target)
  if f.out:
    pathlib.Path(f.out).write_text('\n'.join(texts) + '\n', encoding='utf-8')
  seconds = round(time.monotonic() - start)
  return found | {'beam': f.beam, 'seconds': seconds}


def training_pairs(config, tok) -> list[tuple[list[int], list[int]]]:
  """Prompt and target ids of all pairs that fit into a row, in random order."""
  pairs = corpus.read_splits(config.data, ['train'])['train'][0].read()
  template = template_lib.from_config(config)
  examples = template_lib.encode(pairs, tok, template)
  both = []
  for i in np.flatnonzero(examples.sizes <= config.data.length):
    ids, start = examples.ids(i).tolist(), examples.target_starts[i]
    both.append((ids[:start], ids[start:]))
  random.Random(config.seed).shuffle(both)
  return both


def peft(f: flags.FlagValues) -> dict:
  """Trains PEFT's model; what it says of it."""
  folder = pathlib.Path('runs/bench').absolute()
  if pathlib.Path(f.out).exists():
    raise errors.UserError(f'--out={f.out} is there already; a new folder.')
  source = ours.open_weights()
  job = speed.prepare(folder, source) | {
    'pairs': training_pairs(make_config(f), source.tokenizer),
    'train_batch': speed.TRAIN_BATCH,
    'threads': f.threads,
    'seconds': f.seconds,
    'learning_rate': f.learning_rate,
    'out': str(pathlib.Path(f.out).absolute()),
  }
  work = folder / 'peft'  # Beside a bench that may be running.
  work.mkdir(exist_ok=True)
  return speed.ask(work, job, 'finetune', 'finetune', '.venv-bench')


def main(argv):
  f, tasks = flags.FLAGS, {'score': score, 'peft': peft}
  if len(argv) != 2 or argv[1] not in tasks:
    raise errors.UserError('score or peft expected: see the docstring.')
  if not f.data or (argv[1] == 'peft' and not f.out):
    raise errors.UserError('--data expected, and --out for peft.')
  compiling.keep_compiled_programs()
  answer = tasks[argv[1]](f)
  print(json.dumps(answer))
  sys.exit('failed' in answer)


if __name__ == '__main__':
  flags.DEFINE_string('data', '', 'As data.source.')
  flags.DEFINE_string('weights', '', 'As weights.source.')
  flags.DEFINE_enum('split', 'test', ['valid', 'test'], 'What is scored.')
  flags.DEFINE_integer('pairs', 0, 'The first ones of the split; 0 for all.', 0)
  flags.DEFINE_integer('beam', 1, 'As decode.beam.', 1)
  flags.DEFINE_string('prompt', '', 'As template.prompt.')
  flags.DEFINE_string('target_prefix', ' ', 'As template.target_prefix.')
  flags.DEFINE_string('out', '', 'File of translations; folder of weights.')
  flags.DEFINE_float('seconds', 3600, 'Of training.', 1)
  flags.DEFINE_float('learning_rate', 1e-3, 'Highest, of AdamW.')
  flags.DEFINE_integer('threads', 2, 'CPUs that PEFT may use.', 1)
  cli.run(main)
