"""How much memory loading takes at its worst (Linux).

  python -m tests.benchmarks.memory SOURCE      of weights.source
  python -m tests.benchmarks.memory --make=DIR --gigabytes=2 [--dtype=bfloat16]

The second writes a synthetic Hugging Face folder to load. Printed: the bytes of
the parameters, the peak of the process above what it held before, and both in
relation: at most 1.3 plus one tensor.
"""

import dataclasses
import math
import pathlib
import sys

from absl import app
from absl import flags
import jax
import numpy as np

from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import gguf
from mt.weights import hf
from mt.weights import load
from mt.weights import pretrained
from tests.fixtures import gguf_fixture

_MAKE = flags.DEFINE_string('make', '', 'Write a folder there.')
_SIZE = flags.DEFINE_float('gigabytes', 2.0, 'Of the weights in that folder.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'There.'
)
# A shape with the proportions of Gemma 3 4B; the depth makes the size.
_WIDTH, _HIDDEN, _VOCAB = 1024, 4096, 16_384


def _status(field: str) -> int:
  """A field of /proc/self/status, in bytes."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field + ':'):
      return int(line.split()[1]) * 1024
  raise ValueError(field)


def measure(read) -> tuple[int, int, int]:
  """Bytes: of what `read` returns, of the peak above before, of one tensor."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
  before = _status('VmRSS')
  params = read()
  jax.block_until_ready(params)
  peak = _status('VmHWM') - before
  leaves = jax.tree.leaves(params['layers'])
  one = max(x.nbytes // x.shape[0] for x in leaves)
  return (
    sum(x.nbytes for x in jax.tree.leaves(params)),
    peak,
    max(one, params['embedding'].nbytes),
  )


def zeros(nbytes: float, size: int = 4):
  """A shape of Gemma 3, and parameters of `nbytes` at `size` bytes each."""
  cfg = sizes.ModelConfig(
    _VOCAB, 1, _WIDTH, _HIDDEN, 8, 4, 128, 128**-0.5, 'LLLLLG', 512,
    rope_base_global=1e6, qk_norm=True, post_norms=True,
  )  # fmt: skip
  shapes = parameters.shapes(cfg)
  layer = sum(math.prod(s) for k, s in shapes.items() if 'layers' in k)
  depth = max(1, round((nbytes / size - _VOCAB * _WIDTH) / layer))
  cfg = dataclasses.replace(cfg, num_layers=depth)
  shapes = parameters.shapes(cfg)
  zeros = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
  return cfg, parameters.unflatten(zeros)


def make(folder: pathlib.Path, nbytes: float, dtype: str) -> None:
  """A folder of Gemma 3 of about so many bytes."""
  cfg, params = zeros(nbytes, 2 if dtype == 'bfloat16' else 4)
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  folder.mkdir(parents=True)
  hf.write(folder, cfg, params, tok, dtype)


def main(argv):
  if _MAKE.value:
    make(pathlib.Path(_MAKE.value), _SIZE.value * 1e9, _DTYPE.value)
    return
  # The tokenizer of a synthetic model is not of its size, and does not count.
  path, key = pathlib.Path(argv[1]), jax.random.key(0)
  if path.exists():
    opener = hf.open_folder if path.is_dir() else gguf.open_weights
    weights = opener(path)

    def read():
      return load.read(weights, key)[0]

  else:
    read = pretrained.open_source(argv[1], '', '', seed=0, texts=()).read
  # What the compiler takes, once in a process, is not the weights'.
  random = pretrained.open_source('random', 'debug', '', seed=0, texts=['a'])
  random.read()
  final, peak, one = measure(read)
  print(
    f'parameters {final / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, one tensor '
    f'{one / 1e6:.0f} MB: {(peak - one) / final:.2f} plus one tensor'
  )
  sys.exit(peak > 1.3 * final + one)


if __name__ == '__main__':
  app.run(main)
