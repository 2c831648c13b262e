"""A run for a long time: memory, open files, threads and step time stay flat.

  python -m tests.stress.soak SECONDS [SECONDS BETWEEN RESTARTS]

The debug config without an end, with validation, translation and checkpoints;
now and then SIGTERM and the same command. Figures are medians of the second and
of the last quarter of what follows 800 steps of each start, by when everything
was done twice; the first quarter is for warming up, too. Of steps it is the
time of the fastest hundredth: other programs do not slow down all of them.
"""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
  '--config.data.length=128',
  '--config.train.max_steps=1000000',
  '--config.eval.every=200',
  '--config.eval.translate_every=400',
  '--config.eval.chrf_pairs=2',
  '--config.eval.translate_pairs=2',
  '--config.eval.patience=0',
  '--config.checkpoint.every=100',
  '--config.decode.max_ratio=0.2',
)
# How much more the last quarter may have than the second.
_WARM = 800
_LIMITS = {'megabytes': 1.05, 'files': 1.0, 'threads': 1.1, 'step_ms': 1.3}


def _look(process: int) -> dict[str, float]:
  proc = pathlib.Path('/proc') / str(process)
  pages = int((proc / 'statm').read_text().split()[1])
  return {
    'megabytes': pages * os.sysconf('SC_PAGE_SIZE') / 1e6,
    'files': len(os.listdir(proc / 'fd')),
    'threads': len(os.listdir(proc / 'task')),
  }


def _fastest(path: pathlib.Path, first: int, last: int) -> float:
  """Milliseconds that the fastest hundredth of these steps took at most."""
  lines = map(json.loads, path.read_text().splitlines())
  took = sorted(
    1000 * x['tokens'] / x['tokens_per_s']
    for x in lines
    if first <= x['step'] <= last and 'tokens_per_s' in x
  )
  return took[len(took) // 100]


def _steps(path: pathlib.Path) -> int:
  """The last step that metrics.jsonl knows."""
  lines = path.read_bytes()[-2000:].splitlines() if path.exists() else []
  for line in reversed(lines):
    try:
      return json.loads(line)['step']
    except ValueError:
      continue
  return 0


def one_start(workdir: pathlib.Path, seconds: float) -> dict[str, list[float]]:
  """Figures of the second and of the last quarter of one start.

  Args:
    workdir: of the run.
    seconds: to train, from the step at which it is warm.
  """
  process = subprocess.Popen(
    [
      sys.executable,
      str(ROOT / 'train.py'),
      f'--config={ROOT}/configs/debug.py',
      f'--workdir={workdir}',
      *FLAGS,
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  first, training = _steps(workdir / 'metrics.jsonl'), []
  began = time.monotonic()
  while time.monotonic() - began < seconds:
    assert process.poll() is None, process.stderr.read().decode()
    at = _steps(workdir / 'metrics.jsonl')
    if at > first + _WARM:
      training.append(_look(process.pid) | {'at': at})
    else:
      began = time.monotonic()
    time.sleep(1)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 143, err.decode()
  quarter = len(training) // 4
  assert quarter > 2, 'longer, please'
  out = {}
  for name in _LIMITS:
    out[name] = []
    for part in (training[quarter : 2 * quarter], training[-quarter:]):
      if name == 'step_ms':
        at = part[0]['at'], part[-1]['at']
        out[name].append(round(_fastest(workdir / 'metrics.jsonl', *at), 2))
      else:
        out[name].append(round(statistics.median(x[name] for x in part), 1))
  return out | {'steps': [training[0]['at'], training[-1]['at']]}


def run(seconds: float, between: float) -> None:
  """Prints a line of figures for each start.

  Raises:
    AssertionError: something grows.
  """
  workdir = pathlib.Path(tempfile.mkdtemp(prefix='soak-'))
  end, grown = time.monotonic() + seconds, []
  while time.monotonic() < end:
    found = one_start(workdir, between)
    print(json.dumps(found), flush=True)
    for name, limit in _LIMITS.items():
      if found[name][1] > found[name][0] * limit:
        grown.append((name, found[name]))
  shutil.rmtree(workdir)
  assert not grown, grown


if __name__ == '__main__':
  run(float(sys.argv[1]), float((sys.argv[2:] or ['300'])[0]))
