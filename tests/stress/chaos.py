"""Kills a run with SIGKILL at random moments and starts it again, many times.

  python -m tests.stress.chaos KILLS SEED

Each run that gets to its end must be what an undisturbed one is: every logged
number (which the order of the examples decides), the last state to the last
bit, translations and scores. After each kill every checkpoint must be whole.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from mt.train import checkpoint
from mt.train import manifest
from tests.runs import folders

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
  '--config.data.length=128',
  '--config.train.max_steps=40',
  '--config.eval.translate_pairs=4',
  '--config.eval.chrf_pairs=2',
  '--config.eval.patience=0',
  '--config.eval.translate_every=20',
  '--config.decode.max_ratio=0.5',
)
_LIMIT = 300  # Seconds that one start may take.


def _start(workdir, cache):
  return subprocess.Popen(
    [
      sys.executable,
      str(ROOT / 'train.py'),
      f'--config={ROOT}/configs/debug.py',
      f'--workdir={workdir}',
      *FLAGS,
    ],
    env=os.environ | {'XDG_CACHE_HOME': str(cache)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


def _text(path):
  return path.read_text() if path.exists() else ''


def _moment(kind, workdir, rng, took):
  """() -> whether it is time to kill."""
  metrics, folder = workdir / 'metrics.jsonl', workdir / 'checkpoints'
  began = time.monotonic()
  if kind == 'start':
    after = rng.uniform(0, took)
    return lambda: time.monotonic() - began > after
  if kind == 'checkpoint':
    seen, delay = [], rng.choice((0, 0, 0.005, 0.01, 0.02, 0.04))

    def writing():
      if not seen and any(folder.glob('*tmp*')):
        seen.append(time.monotonic())
      return bool(seen) and time.monotonic() - seen[0] >= delay

    return writing
  if kind == 'evaluation':
    # The loss of a step that validation follows is logged just before it.
    marks = [f'{{"step": {n}, "loss"' for n in (10, 20, 30, 40)]
    known = [m for m in marks if m in _text(metrics)]
    return lambda: any(m in _text(metrics) for m in marks if m not in known)
  # Between two steps, and in the translations at the end.
  size = len(_text(metrics))
  size += rng.randrange(1, 6000) if kind == 'step' else 10**9
  end = workdir / 'translations'
  return lambda: (
    len(_text(metrics)) >= size
    or (kind == 'end' and any(end.glob('*.after.*')))
  )


def final(workdir: pathlib.Path) -> dict:
  """Everything that must be the same in the end."""
  lines = [json.loads(x) for x in _text(workdir / 'metrics.jsonl').splitlines()]
  for line in lines:
    for name in folders.TIMES:
      line.pop(name, None)
  both = [(x['step'], 'loss' in x) for x in lines]
  assert len(set(both)) == len(both), 'a step is there twice'
  with checkpoint.open_manager(workdir) as manager:
    at = manager.latest_step()
    items = {n: ocp.args.StandardRestore() for n in ('trained', 'rest')}
    read = manager.restore(
      at, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **items)
    )
    steps = sorted(manager.all_steps())
  arrays = jax.tree.map(np.asarray, {n: read[n] for n in items})
  files = ['scores.json', 'samples.txt', 'tokenizer.model']
  files += [f'translations/valid.{when}.txt' for when in ('before', 'after')]
  return {
    'metrics': lines,
    'steps': steps,
    'data': read['data'],
    'arrays': {
      jax.tree_util.keystr(k): (v.dtype.str, v.shape, v.tobytes())
      for k, v in jax.tree_util.tree_leaves_with_path(arrays)
    },
    'files': {name: (workdir / name).read_bytes() for name in files},
  }


def run(kills: int, seed: int, folder: pathlib.Path) -> dict[str, int]:
  """Kills so often; how often while what, and how many runs got to the end."""
  rng, counts = random.Random(seed), collections.Counter()
  whole, cut, cache = (folder / name for name in ('whole', 'cut', 'cache'))
  for workdir in (folder / 'warm up', whole):  # The cache is full after one.
    began = time.monotonic()
    process = _start(workdir, cache)
    _, err = process.communicate(timeout=_LIMIT)
    assert process.returncode == 0, err.decode()
  took = time.monotonic() - began
  want = final(whole)
  kinds = []
  while True:
    if not kinds:
      kinds = ['start', 'checkpoint', 'step', 'evaluation', 'checkpoint', 'end']
      rng.shuffle(kinds)
    # Whoever is always killed early never gets on.
    over = counts['killed'] >= kills
    kind = None if over or rng.random() < 0.1 else kinds.pop()
    process = _start(cut, cache)
    moment = _moment(kind, cut, rng, took) if kind else lambda: False
    deadline = time.monotonic() + _LIMIT
    while process.poll() is None and not moment():
      assert time.monotonic() < deadline, kind
      time.sleep(0.001)
    if process.poll() is None:
      process.kill()
      counts['killed'] += 1
      counts[kind] += 1
    _, err = process.communicate()
    assert process.returncode in (0, -9), err.decode()
    checkpoints = cut / 'checkpoints'
    counts['writes cut off'] += process.returncode and any(
      checkpoints.glob('*tmp*')
    )
    for at in manifest.steps(checkpoints):
      what = manifest.damage(manifest.folder_of(checkpoints, at))
      assert not what, (at, what)
    assert not list(checkpoints.glob('damaged*'))
    if process.returncode == 0:
      got = final(cut)
      for name in want:
        assert got[name] == want[name], f'{name} differs; seed {seed}'
      counts['the same in the end'] += 1
      shutil.rmtree(cut)
      if over:
        return dict(counts)


if __name__ == '__main__':
  with tempfile.TemporaryDirectory(prefix='chaos-') as made:
    print(run(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(made)))
