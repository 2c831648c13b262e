"""The command of a run, and what it left in its folder, to be compared."""

import json
import pathlib
import sys

import numpy as np
import orbax.checkpoint as ocp

from mt.train import checkpoint
from mt.train import manifest

ROOT = pathlib.Path(__file__).parents[2]
# What is not the same in two runs of one config.
TIMES = 'targets_per_s', 'tokens_per_s', 'data_wait_s', 'mfu', 'peak_memory_gb'
TIMES += ('memory_gb',)


def metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(x) for x in lines]


def losses(workdir):
  """Step -> validation loss."""
  lines = metrics(workdir)
  return {m['step']: m['valid_loss'] for m in lines if 'valid_loss' in m}


def scores(workdir):
  return json.loads((workdir / 'scores.json').read_text())


def steps(workdir):
  return manifest.steps(workdir / 'checkpoints')


def arrays(workdir, at=None, item='trained'):
  """Of a checkpoint; the newest where none is named."""
  with checkpoint.open_manager(workdir) as manager:
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
    at = manager.latest_step() if at is None else at
    read = manager.restore(at, args=args)[item]
    return {k: np.asarray(v) for k, v in read.items()}


def assert_same_run(one, other):
  """Bit for bit: all numbers but times, checkpoints, translations, scores."""
  timeless = [
    [{k: v for k, v in m.items() if k not in TIMES} for m in metrics(d)]
    for d in (one, other)
  ]
  assert timeless[0] == timeless[1]
  assert steps(one) == steps(other)
  for at in steps(one):
    a, b = arrays(one, at), arrays(other, at)
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  names = ['scores.json', 'samples.txt']
  names += [f'translations/{p.name}' for p in (one / 'translations').iterdir()]
  for name in names:
    assert (one / name).read_bytes() == (other / name).read_bytes(), name


def command(workdir, *flags):
  """train.py with the config of tests/runs/small.py."""
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT}/tests/runs/small.py',
    f'--workdir={workdir}',
    *flags,
  ]
