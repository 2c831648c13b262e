"""Damaged files of every kind: one sentence, or a clean read.

The damage is done in a process of its own, whose memory is limited: a crash, a
hang and a blow-up of memory are all seen from here. By hand:

  python -m tests.weights.test_fuzz {gguf,orbax,plain,hf,tokenizer} CASES SEED
"""

import collections
import faulthandler
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import gguf
from mt.weights import gguf_file
from mt.weights import hf_tokenizer
from mt.weights import hf_tokenizer_out
from mt.weights import load
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture

ROOT = pathlib.Path(__file__).parents[2]
CFG = gguf_fixture.tiny_config('gemma3', 400)
_WORDS = (0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def _flip(rng: random.Random, data: bytes, end: int) -> bytes:
  """A change of one byte, or a few larger ones, within the first `end`."""
  out = bytearray(data)
  if rng.random() < 0.5:
    out[rng.randrange(end)] ^= rng.randint(1, 255)
    return bytes(out)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(min(end, len(out) or 1))
    kind = rng.randrange(1, 5) if at < len(out) else 4
    if kind == 1:
      out[at] ^= 1 << rng.randrange(8)
    elif kind == 2:  # What counts, offsets and lengths look like.
      out[at : at + 8] = rng.choice(_WORDS).to_bytes(8, 'little')
    elif kind == 3:
      del out[at : at + rng.randint(1, 16)]
    else:
      out[at:at] = rng.randbytes(rng.randint(1, 16))
  return bytes(out)


def _gguf_cases(folder, number, rng):
  """Damage to header and tensor infos; yields (what, read)."""
  params = gguf_fixture.tiny_params(CFG)
  path = gguf_fixture.write_gguf(
    folder / 'whole.gguf', CFG, params, gguf_fixture.train_proto()
  )
  data = path.read_bytes()
  tensors = gguf_file.open_gguf(path).tensors.values()
  start = min(t.offset for t in tensors)
  infos = data.index(b'token_embd.weight') - 100
  path = folder / 'damaged.gguf'

  def read():
    weights = gguf.open_weights(path)
    weights.tokenizer()
    return load.read(weights, jax.random.key(0))[0]

  for i in range(number):
    if i % 10 == 0:
      what, damaged = 'cut', data[: rng.randrange(len(data))]
    elif i % 2:  # The vocabulary is most of the header, infos come behind it.
      what, part = 'infos', data[infos:]
      damaged = data[:infos] + _flip(rng, part, start - infos)
    else:
      what, damaged = 'header', _flip(rng, data, rng.choice((1000, start)))
    path.write_bytes(damaged)
    yield f'{what} {i}', read, False


def _orbax_cases(folder, number, rng, ocdbt):
  """Damage to each file in turn; yields (what, read, must be the same)."""
  params = gguf_fixture.tiny_params(CFG)
  whole = flax_fixture.save(folder / 'whole', CFG, params, ocdbt=ocdbt)
  files = [p for p in whole.rglob('*') if p.is_file()]
  # The names of OCDBT's files are random, their sizes are not.
  files.sort(key=lambda p: (p.parent, p.stat().st_size, p.name))
  path = folder / 'damaged'

  def read():
    return load.read(flax.open_folder(path), jax.random.key(0))[0]

  cases = [(file, how) for how in range(6) for file in files]
  rng.shuffle(cases)
  cases += [(rng.choice(files), 6) for _ in range(number)]
  for file, how in cases[:number]:
    shutil.copytree(whole, path, copy_function=os.link)
    damaged = path / file.relative_to(whole)
    data = file.read_bytes()
    damaged.unlink()
    if how > 0:
      damaged.write_bytes(
        [
          b'',
          data[:-1],
          data[: len(data) // 2],
          bytes(len(data)),
          data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
          _flip(rng, data, len(data)),
        ][how - 1]
      )
    # Half a chunk of zeros is a chunk like any other: zarr has no checksums.
    yield f'{file.relative_to(whole)} {how}', read, how < 5
    shutil.rmtree(path)


def _hf_cases(folder, number, rng):
  """Damage to header, index and config in turn; yields (what, read, …)."""
  hf_fixture.write_folder(folder, cfg=CFG)
  whole = load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  names = sorted(whole)
  shards = [{n: whole[n] for n in names[i::2]} for i in range(2)]
  hf_fixture.write_shards(folder, shards)
  files = [*folder.glob('*.safetensors'), *folder.glob('*.json')]
  for i in range(number):
    file = files[i % len(files)]
    data = file.read_bytes()
    end = len(data)
    if file.suffix == '.safetensors':
      end = 8 + struct.unpack('<Q', data[:8])[0]
    file.write_bytes(_flip(rng, data, end))
    yield f'{file.name} {i}', lambda: hf_fixture.load(folder)[1], False
    file.write_bytes(data)


def _tokenizer_cases(folder, number, rng):
  """Damage to tokenizer.json; reading gives no parameters to compare."""
  original = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  hf_tokenizer_out.write(folder, original)
  path = folder / 'tokenizer.json'
  data = path.read_bytes()
  for i in range(number):
    path.write_bytes(_flip(rng, data, len(data)))
    yield f'{i}', lambda: hf_tokenizer.read(path, 400) and None, False


def run(kind: str, number: int, seed: int) -> dict[str, int]:
  """Reads `number` damaged checkpoints; the outcomes, counted."""
  rng = random.Random(seed)
  sizes.SIZES['tiny'] = CFG
  want = gguf_fixture.tiny_params(CFG)
  counts = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if kind in ('orbax', 'plain'):
      cases = _orbax_cases(folder, number, rng, ocdbt=kind == 'orbax')
    else:
      make = {'gguf': _gguf_cases, 'hf': _hf_cases}.get(kind, _tokenizer_cases)
      cases = make(folder, number, rng)
    limit = None
    for what, read, must_be_same in cases:
      if limit is None:  # One whole reading first: threads, compiled programs.
        size = pathlib.Path('/proc/self/statm').read_text().split()[0]
        limit = int(size) * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
      try:
        found = read()
      except errors.UserError as e:
        text = str(e)
        assert '\n' not in text and text.endswith('.'), text
        assert len(text) < 1000, text
        counts['refused'] += 1
        continue
      except BaseException:
        print(what, file=sys.stderr)
        raise
      same = found is None or jax.tree.all(
        jax.tree.map(np.array_equal, found, want)
      )
      assert same or not must_be_same, f'{what}: silently different'
      counts['same' if same else 'different'] += 1
  return counts


@pytest.mark.heavy
@pytest.mark.parametrize(
  'kind, number, refused',
  [
    ('gguf', 1000, 600),
    ('orbax', 150, 20),
    ('plain', 200, 100),
    ('hf', 600, 100),
    ('tokenizer', 300, 20),
  ],
)
def test_damage_is_one_sentence_or_a_clean_read(kind, number, refused):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.weights.test_fuzz', kind, str(number), '0'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  counts = json.loads(done.stdout)
  assert sum(counts.values()) == number
  assert counts['refused'] > refused  # The damage is real.


if __name__ == '__main__':
  faulthandler.enable()
  print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
