"""Peak memory of a Flax checkpoint's way in and out, with the shapes of the 1B.

  python -m tests.benchmarks.flax_memory [SIZE]

Writes a synthetic checkpoint in bfloat16 with gemma.params (1.5 GB of disk and
8 GB of memory for the 1B), reads it in a process of its own, and writes it
again. Linux only.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np

from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import flax_out
from mt.weights import load
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture


def _gigabytes(name):
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s*(\d+)', status)[1]) * 1024 / 1e9


def _make(path, size):
  cfg = sizes.SIZES[size]
  noise = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
  flat = {
    k: jnp.asarray(np.resize(noise, shape), jnp.bfloat16)
    for k, shape in parameters.shapes(cfg).items()
  }
  tree = flax_fixture.nested_tree(cfg, parameters.unflatten(flat))
  gemma_params.format_and_save_params({'transformer': tree}, path)


def _measure(path, out):
  jnp.zeros(3).block_until_ready()
  weights = flax.open_folder(pathlib.Path(path))
  cfg = weights.config
  before, start = _gigabytes('VmRSS'), time.monotonic()
  params = load.read(weights, jax.random.key(0))[0]
  final = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
  one = params['embedding'].nbytes / 1e9
  peak = _gigabytes('VmHWM') - before
  print(
    f'read: {final:.2f} GB, peak {peak:.2f} GB = {peak / final:.3f} times, '
    f'1.3 times and one tensor are {1.3 * final + one:.2f} GB; '
    f'{time.monotonic() - start:.0f} s'
  )
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # A new peak.
  before, start = _gigabytes('VmRSS'), time.monotonic()
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'benchmark')
  flax_out.write(out, cfg, params, tok, 'bfloat16')
  print(
    f'written: {_gigabytes("VmHWM") - before:.2f} GB more; '
    f'{time.monotonic() - start:.0f} s'
  )


def main(argv):
  if len(argv) == 4:
    return _measure(argv[2], argv[3])
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/checkpoint'
    _make(path, argv[1] if len(argv) > 1 else 'gemma3_1b')
    command = [sys.executable, '-m', __spec__.name, 'measure', path]
    subprocess.run([*command, f'{folder}/out'], check=True)


if __name__ == '__main__':
  main(sys.argv)
