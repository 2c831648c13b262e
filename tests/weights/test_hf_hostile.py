"""Hugging Face folders made to harm: one sentence, and nothing else."""

import collections
import dataclasses
import json
import random
import struct
import tracemalloc

import pytest
from safetensors.numpy import load_file

from mt.base import errors
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures.refusal import refusal

# A tiny folder takes 2 MB; a size out of a damaged header takes gigabytes.
_MEMORY = 64 * 2**20


# Hostile indexes.


def _sharded(folder):
  _, params = hf_fixture.write_folder(folder)
  whole = load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  names = sorted(whole)
  hf_fixture.write_shards(
    folder, [{n: whole[n] for n in names[i::2]} for i in range(2)]
  )
  return params


@pytest.mark.parametrize(
  'name',
  [
    '../outside.safetensors',
    '/tmp/outside.safetensors',
    'sub/inside.safetensors',
    './model-00001-of-00002.safetensors',
    '..',
    '',
    '..\\outside.safetensors',
    'C:outside.safetensors',
    'a\x00b.safetensors',
    'a\nb.safetensors',
    'pytorch_model.bin',
    7,
    None,
    ['model.safetensors'],
    {'a': 'b'},
  ],
  ids=repr,
)
def test_an_index_leads_nowhere_else(tmp_path, name):
  _sharded(tmp_path / 'in')
  (tmp_path / 'outside.safetensors').write_bytes(b'')
  index = tmp_path / 'in' / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  content['weight_map']['model.norm.weight'] = name
  index.write_text(json.dumps(content))
  refusal(lambda: hf_fixture.load(tmp_path / 'in'), index, 'plain name')


def test_an_index_that_promises_what_is_not_there(tmp_path):
  _sharded(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  weight_map = content['weight_map']
  for file in ('model-00003-of-00002.safetensors', None):
    name = 'model.norm.weight'
    if file is None:  # The other of the two.
      (file,) = set(weight_map.values()) - {
        weight_map[name],
        'model-00003-of-00002.safetensors',
      } or {'model-00001-of-00002.safetensors'}
    changed = {'weight_map': weight_map | {name: file}}
    index.write_text(json.dumps(changed))
    refusal(lambda: hf_fixture.load(tmp_path), file)


def test_an_index_beside_the_whole_file_is_not_used(tmp_path):
  # As in transformers: model.safetensors goes first.
  _, params = hf_fixture.write_folder(tmp_path)
  (tmp_path / 'model.safetensors.index.json').write_text('{}')
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


# Hostile files.


def _info(shape, begin, end, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


_ABSURD = {
  'size beyond the file': {'a': _info([2**40], 0, 2**42)},
  'end beyond the file': {'a': _info([8], 0, 32)},
  'negative': {'a': _info([1], -4, 0)},
  'backwards': {'a': _info([1], 4, 0)},
  'overlapping': {'a': _info([1], 0, 4), 'b': _info([1], 0, 4)},
  'half overlapping': {'a': _info([2], 0, 8), 'b': _info([3], 4, 16)},
  'hole': {'a': _info([1], 0, 4), 'b': _info([1], 12, 16)},
  'overflow': {'a': _info([2**62, 2**62], 0, 16)},
  'negative shape': {'a': _info([-1, -4], 0, 16)},
  'fraction': {'a': _info([0.5], 0, 16)},
  'another size': {'a': _info([3], 0, 16)},
  'unknown type': {'a': _info([4], 0, 16, 'F33')},
  'no list': {'a': _info(4, 0, 16)},
  'text': {'a': 'x'},
  'not an object': b'[]',
  'deep': b'[' * 100_000,
  'no JSON': b'{' * 64,
  'not UTF-8': b'{"\xff": 1}',
  'empty': b'',
}


@pytest.mark.parametrize('what', _ABSURD)
def test_an_absurd_header_is_refused(tmp_path, what):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  hf_fixture.write_raw(path, _ABSURD[what], bytes(16))
  tracemalloc.start()
  try:
    refusal(lambda: hf_fixture.load(tmp_path), path, 'fetch it again')
    assert tracemalloc.get_traced_memory()[1] < 2**22
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('size', (0, 1, 7, 8, 9, 100, 1000, -1))
def test_a_cut_file_is_refused(tmp_path, size):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  refusal(lambda: hf_fixture.load(tmp_path), path, 'fetch it again')


@pytest.mark.parametrize('claimed', (2**63, 2**64 - 1, 2**40, 10**8 + 1))
def test_a_header_as_long_as_it_claims_is_refused(tmp_path, claimed):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', claimed) + bytes(1000))
  refusal(lambda: hf_fixture.load(tmp_path), path, 'fetch it again')


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
  hf_fixture.write_folder(tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  (tmp_path / 'model.safetensors').mkdir()
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path / 'model.safetensors')


# Damage.


def _damage(data, end, rng):
  """A copy with one to three things wrong, mostly before byte `end`."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 3))):
    at = rng.randrange(min(end, len(data)))
    what = rng.randrange(8)
    if what == 0:
      data[at] = rng.randrange(256)
    elif what == 1:
      data[at] ^= 1 << rng.randrange(8)
    elif what == 2:
      del data[at : at + rng.choice((1, 4, 8))]
    elif what == 3:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    elif what == 4:
      data[at : at + 1] = rng.choice(
        (b'9', b'-', b'0', b'"', b'[', b'{', b'1e9', b'null', b'\\u0000', b'.')
      )
    elif what == 5:
      del data[rng.randrange(len(data)) + 1 :]
    elif what == 6:
      value = rng.choice((0, 1, 2**16, 2**31, 2**32, 2**63, 2**64 - 1))
      data[:8] = struct.pack('<Q', value)
    else:
      data += rng.randbytes(rng.choice((1, 1000)))
  return bytes(data)


def _small(folder):
  """A folder that has everything and is cheap to damage often."""
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config('gemma3', 400),
    num_layers=1,
    embed_dim=4,
    hidden_dim=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
  )
  hf_fixture.write_folder(folder, cfg=cfg)
  whole = load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  names = sorted(whole)
  hf_fixture.write_shards(
    folder, [{n: whole[n] for n in names[i::2]} for i in range(2)]
  )


def test_a_damaged_folder_loads_or_is_refused(tmp_path):
  """1,000 of the weights, 300 of the index, 300 of config.json."""
  _small(tmp_path)
  files = sorted(tmp_path.glob('model-*.safetensors'))
  jobs = [(files[i % 2], i) for i in range(1000)]
  jobs += [(tmp_path / 'model.safetensors.index.json', i) for i in range(300)]
  jobs += [(tmp_path / 'config.json', i) for i in range(300)]
  counts, wrong = collections.Counter(), []
  for path, seed in jobs:
    whole = path.read_bytes()
    end = len(whole)
    if path.suffix == '.safetensors' and seed % 3:
      end = 8 + struct.unpack('<Q', whole[:8])[0]
    path.write_bytes(_damage(whole, end, random.Random(seed)))
    tracemalloc.start()
    try:
      hf_fixture.load(tmp_path)
      counts[path.suffix, 'loaded'] += 1
    except errors.UserError as e:
      counts[path.suffix, 'refused'] += 1
      if str(tmp_path) not in str(e) or '\n' in str(e):
        wrong.append((path.name, seed, str(e)))
    except BaseException as e:  # noqa: BLE001  To list all of them.
      wrong.append((path.name, seed, repr(e)))
    if tracemalloc.get_traced_memory()[1] > _MEMORY:
      wrong.append((path.name, seed, 'memory'))
    tracemalloc.stop()
    path.write_bytes(whole)
  assert not wrong, f'{len(wrong)} of {len(jobs)}: {wrong[:20]}'
  assert min(counts.values()) > 20  # It tests something.
  assert len(counts) == 4
