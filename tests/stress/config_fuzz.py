"""Mutated configs: each trains a step or is one sentence, soon.

python -m tests.stress.config_fuzz CASES SEED
"""

import collections
import contextlib
import io
import math
import pathlib
import random
import sys
import tempfile
import time
import traceback

from absl import flags
import ml_collections

from configs import debug
from mt.base import cli
from mt.base import errors
from mt.base import processes
from mt.train import run as run_lib

_SOON = 2.0  # Seconds of all processors in which a sentence comes.
_INTS = (-1, 0, 1, 2, 3, 5, 7, 8, 9, 64, 1000)
_FLOATS = (-1.0, 0.0, 1e-8, 0.5, 0.99, 1.0, 3.7, 100.0, math.inf, math.nan)
_TEXTS = ('', ' ', '(', '.*', '/nowhere', '../x', 'en-fr', 'de-en', 'EN-FR')
_TEXTS += (
  'a\nb',
  'é',
  '{source}',
  '{',
  '{source} {x}',
  '{source}{source}',
)
_TEXTS += (
  'random',
  'sample',
  'sample,sample',
  'mtnt,',
  'all',
  'lora',
  'blocks',
)
_TEXTS += ('layers/(q|v)', 'final_norm', 'embedding', 'adamw', 'sgd')
_TEXTS += ('adafactor', 'constant', 'linear', 'cosine', 'float32')
_TEXTS += ('bfloat16',)
_TEXTS += ('none', 'dots', 'full', '<bos>', '{target_language}', 'kaggle:x/y')
_TEXTS += ('pypi:no-such-package-here', 'q', 'x' * 300)
_TUPLES = ((), (1,), (0,), (1, 2), (3, 1), ('a', 'b'), ('a',), (-1,), (32, 64))
_TUPLES += ((1.5,), (math.nan,), (None,), ('',), ((1,),), (True, 1))


def _knobs(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _knobs(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def base() -> ml_collections.ConfigDict:
  """The debug config, one step long."""
  c = debug.get_config()
  c.data.length, c.train.batch_size, c.train.max_steps = 96, 2, 1
  c.eval.loss_pairs, c.eval.translate_pairs, c.eval.chrf_pairs = 4, 1, 0
  c.eval.translate_every = c.eval.patience = 0
  c.eval.minitrain_pairs = -1
  c.decode.max_ratio, c.decode.max_extra = 0.05, 2
  return c


def mutate(rng: random.Random) -> tuple[ml_collections.ConfigDict, dict]:
  """A config with one to three other values, and those."""
  config = base()
  changed = {}
  for knob, value in rng.sample(list(_knobs(config)), rng.randint(1, 3)):
    if isinstance(value, bool):
      new = not value
    elif isinstance(value, int):
      new = rng.choice((*_INTS, value + 1, max(0, value - 1)))
    elif isinstance(value, float):
      new = rng.choice((*_FLOATS, value * 2))
    elif isinstance(value, str):
      new = rng.choice(_TEXTS)
    else:
      new = rng.choice(_TUPLES)
    if knob == 'train.max_steps' and new > 3:
      new = 3  # Not for ever.
    changed[knob] = new
    config.update_from_flattened_dict({knob: new})
  return config, changed


def run(cases: int, seed: int) -> dict[str, int]:
  """Counts what became of so many; a traceback is printed and raised.

  Raises:
    AssertionError: for the first that is neither.
  """
  rng, counts = random.Random(seed), collections.Counter()
  wrong = []
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # As a command has; Grain looks at them.
  for number in range(cases):
    config, changed = mutate(rng)
    began = time.process_time()  # Others may be busy here.
    with (
      tempfile.TemporaryDirectory(prefix='config-fuzz-') as folder,
      contextlib.redirect_stdout(io.StringIO()),
    ):
      try:
        run_lib.run(config, pathlib.Path(folder) / 'w')
        assert (pathlib.Path(folder) / 'w' / 'scores.json').exists()
        counts['trained'] += 1
      except Exception as e:  # noqa: BLE001 All of them are looked at.
        text = str(e) if isinstance(e, errors.UserError) else ''
        if isinstance(e, OSError):
          text = cli.sentence(e)
        if not text:
          wrong.append((number, changed, traceback.format_exc()[-1500:]))
          print(number, changed, repr(e)[:300], file=sys.stderr, flush=True)
          counts['tracebacks'] += 1
          continue
        counts['refused'] += 1
        took = time.process_time() - began
        if '\n' in text or not text.endswith('.') or len(text) > 1000:
          wrong.append((number, changed, text))
        metrics = pathlib.Path(folder) / 'w' / 'metrics.jsonl'
        if metrics.exists() and '"loss"' in metrics.read_text():
          counts['refused after a step'] += 1
        elif took > _SOON:
          counts['refused late'] += 1
          print(f'{took:.1f} s', changed, text[:200], file=sys.stderr)
    assert processes.is_first()
  assert not wrong, wrong[0]
  assert not counts['refused late']
  return dict(counts)


if __name__ == '__main__':
  print(run(int(sys.argv[1]), int(sys.argv[2])))
