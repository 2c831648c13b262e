"""Parameters are read into their format and place, a tensor at a time."""

import dataclasses
import functools
import json
import os
import zlib

import gguf
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from configs import debug
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import state as state_lib
from mt.weights import hf
from mt.weights import kept
from mt.weights import load
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import numbered_rows
from tests.fixtures import several
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal

CFG = dataclasses.replace(
  sizes.SIZES['debug'], num_layers=2, vocab_size=96, num_kv_heads=2
)


def _config(**train):
  config = debug.get_config()
  config.train.update({'frozen_dtype': 'float32', **train})
  return config


@functools.cache
def _params():
  return parameters.init(CFG, jax.random.key(0))


def _in_parts(monkeypatch):
  """So small that each tensor goes in several pieces, the last one smaller."""
  monkeypatch.setattr(kept, '_AT_ONCE', 500)


# Programs are made for each device: eight where it takes as many, else four.
@pytest.mark.parametrize('shape', [None, (2, 2, 2), (1, 4, 1), (1, 1, 4)])
@pytest.mark.parametrize(
  ('parts', 'dtype'),
  [
    ('all', 'float32'),
    ('lora', 'bfloat16'),
    ('lora', 'int8'),
    ('lora', 'int4'),
  ],
)
def test_what_is_read_is_what_is_split(monkeypatch, shape, parts, dtype):
  """In the format and place that whole float32 parameters would have got."""
  _in_parts(monkeypatch)
  mesh = shape and sharding.make_mesh(
    dict(zip(sharding.MESH_AXES, shape, strict=True))
  )
  train = _config(parts=parts, frozen_dtype=dtype).train
  keep = state_lib.keeping(CFG, train, mesh)
  made, fingerprint = kept.every(CFG, _params(), keep)
  args = train, jax.random.key(1), mesh
  found = state_lib.split_params(CFG, made, *args)
  wanted = state_lib.split_params(CFG, _params(), *args)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(
      b.sharding, a.ndim
    )
    np.testing.assert_array_equal(a, b)
  crc = 0
  for leaf in jax.tree.leaves(_params()):
    crc = zlib.crc32(np.asarray(leaf), crc)
  assert fingerprint == crc  # Whatever the format and the mesh.


def test_a_device_has_its_share_alone():
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 8, 'tensor': 1})
  keep = state_lib.keeping(CFG, _config(parts='all').train, mesh)
  made, _ = kept.every(CFG, _params(), keep)
  for x in (made['embedding'], made['layers']['up']):
    assert {s.data.size for s in x.addressable_shards} == {x.size // 8}


def test_few_bits_need_something_frozen():
  train = _config(parts='all', frozen_dtype='int4').train
  refusal(lambda: state_lib.keeping(CFG, train), 'int4', 'train.parts')


def test_what_is_read_may_be_of_any_float_type(monkeypatch):
  _in_parts(monkeypatch)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
  found, crc = kept.every(CFG, params, kept.FLOAT32)
  wanted = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  hf_fixture.assert_same(found, wanted)
  assert crc == kept.every(CFG, wanted, kept.FLOAT32)[1]


@given(st.binary(max_size=99), st.binary(max_size=99))
@example(bytes(9), bytes(70_000))
def test_the_crc_of_two_parts_is_that_of_the_whole(first, second):
  both = kept._crc_of_both(zlib.crc32(first), zlib.crc32(second), len(second))
  assert both == zlib.crc32(first + second)


# Two processes.


def _tiny():
  """All tensors, the embedding too, are read and sent in several parts."""
  sizes.SIZES['tiny'] = gguf_fixture.tiny_config('gemma3', 400)
  kept._AT_ONCE, load._AT_ONCE = 1500, 3300


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setitem(sizes.SIZES, 'tiny', None)
  monkeypatch.setattr(kept, '_AT_ONCE', 0)
  monkeypatch.setattr(load, '_AT_ONCE', 0)
  _tiny()


def _read(path, dtype, mesh):
  source = hf_fixture.open_folder(path)
  train = _config(parts='lora', frozen_dtype=dtype).train
  params, crc = source.read_kept(state_lib.keeping(source.config, train, mesh))
  return [crc, _shards(params, mesh)]


def _shards(params, mesh):
  """The CRC of what each device of this process has of each array."""
  return [
    [jax.tree_util.keystr(path), place, zlib.crc32(np.asarray(shard.data))]
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    for place, device in enumerate(mesh.devices.flat)
    for shard in x.addressable_shards
    if shard.device == device
  ]


def _got(out):
  """What a process has printed as JSON."""
  return [json.loads(x[4:]) for x in out.splitlines() if x[:4] == 'got ']


def _halves():
  mesh = {'data': 1, 'fsdp': 2, 'tensor': 1}
  return sharding.make_mesh(mesh, jax.devices()[:2])


def _of_four():
  mesh = {'data': 1, 'fsdp': 2, 'tensor': 2}
  return sharding.make_mesh(mesh, jax.devices()[:4])


_TINY = """
import json, os, sys
import numpy as np
from mt.base import errors
from mt.base import processes
processes.start(sys.argv[1], 2, int(sys.argv[2]))
from mt.weights import flax_store
from tests.fixtures import hf_fixture
from tests.weights import test_kept

def counted(f):
  def g(*args, **kwargs):
    x = f(*args, **kwargs)
    nbytes.append(x.nbytes)
    return x
  return g

np.fromfile = counted(np.fromfile)
flax_store.read_array = counted(flax_store.read_array)
test_kept._tiny()
mesh, (own, other, head, *paths) = test_kept._of_four(), sys.argv[3:]
for path in paths:
  for dtype in 'float32', 'int4':
    nbytes = []
    found = test_kept._read(path, dtype, mesh)
    print('got', json.dumps([path, dtype, sum(nbytes), *found]))
open_folder = hf_fixture.open_folder

def open_and_cut(path):
  source = open_folder(path)
  if path == f'{own}/1':
    os.truncate(path + '/model.safetensors', 5000)
  return source

hf_fixture.open_folder = open_and_cut
for path in f'{own}/{sys.argv[2]}', f'{other}/{sys.argv[2]}', head:
  try:
    test_kept._read(path, 'float32', mesh)
  except errors.UserError as e:
    print('refused', e)
"""


def test_each_process_reads_its_part(tmp_path, tiny):
  """Of every format; the numbers and the CRC are those of one process."""
  hf_fixture.write_folder(tmp_path / 'hf', dtype=ml_dtypes.bfloat16)
  tiny_gguf.write(tmp_path / 'a.gguf', quant=gguf.GGMLQuantizationType.Q8_0)
  cfg = sizes.SIZES['tiny']
  flax_fixture.save(tmp_path / 'flax', cfg, flax_fixture.tiny_params(cfg))
  (tmp_path / 'tokenizer.model').write_bytes(gguf_fixture.train_proto())
  paths = [tmp_path / name for name in ('hf', 'a.gguf', 'flax')]
  # A file that is damaged for one of them, one that is another model's in one
  # matrix, and a head that is another matrix.
  own, other, head = (tmp_path / name for name in ('own', 'other', 'head'))
  for folder in own / '0', own / '1', other / '0', other / '1', head:
    folder.parent.mkdir(exist_ok=True)
    hf_fixture.write_folder(folder)
  tensors = load_file(other / '1' / 'model.safetensors')
  tensors['model.layers.1.mlp.up_proj.weight'] += 1
  save_file(tensors, other / '1' / 'model.safetensors')
  tensors = load_file(head / 'model.safetensors')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  tensors['lm_head.weight'][-1, -1] += 1
  save_file(tensors, head / 'model.safetensors')

  address = several.address()
  commands = (
    ['-c', _TINY, address, i, own, other, head, *paths] for i in range(2)
  )
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')
  outs = several.ends(several.start(*commands, XLA_FLAGS=flags))
  found = [_got(out) for out in outs]
  for first, second in zip(*found, strict=True):
    path, dtype, nbytes, crc, shards = first
    wanted = _read(path, dtype, _of_four())
    assert crc == second[3] == wanted[0]
    assert sorted(shards + second[4]) == sorted(wanted[1])
    if not path.endswith('flax'):  # Of its arrays some have two or three parts.
      assert 0.4 < nbytes / (nbytes + second[2]) < 0.6
  assert len(found[0]) == len(paths) * 2
  refused = [[x for x in out.splitlines() if 'refused' in x] for out in outs]
  (waits, waits_too, other_head), (damaged, differs, own_head) = refused
  assert 'process 1 cannot go on' in waits and waits == waits_too
  assert 'process 1 has another model' in differs
  assert 'own/1/model.safetensors' in damaged and 'fetch it again' in damaged
  assert {'head lm_head.weight' in x for x in (other_head, own_head)} == {
    True,
    False,
  }


# Of 2 GB in float32, whose largest tensor has 134 MB.
_LARGE = dataclasses.replace(
  CFG,
  num_layers=5,
  embed_dim=2048,
  hidden_dim=16_384,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  vocab_size=512,
)

_PROCESS = """
import json, pathlib, re, sys
from mt.base import processes
processes.start(sys.argv[1], 2, int(sys.argv[2]))
import jax
from mt.weights import kept
from mt.weights import pretrained
from tests.weights import test_kept

def said(name, file):
  text = pathlib.Path('/proc/self', file).read_text()
  return int(re.search(rf'{name}:\\s*(\\d+)', text)[1])

mesh = test_kept._halves()
source = pretrained.open_source(sys.argv[3], '', '', seed=0, texts=())
held, read = said('VmRSS', 'status'), said('rchar', 'io')
params, crc = source.read_kept(kept.Keep(mesh=mesh))
jax.block_until_ready(params)
read, grown = said('rchar', 'io') - read, said('VmHWM', 'status') - held
own = sum(s.data.nbytes for x in jax.tree.leaves(params)
          for s in x.addressable_shards)
shards = test_kept._shards(params, mesh)
print('got', json.dumps([crc, shards, own, grown * 1024, read]))
"""


@pytest.mark.heavy
def test_a_process_holds_and_reads_its_share(tmp_path):
  """Two processes read a checkpoint of 2 GB: 1.1 GB each, and hold as much."""
  shapes = parameters.shapes(_LARGE)
  noise = np.random.default_rng(0).standard_normal(999_983).astype(np.float32)
  params = parameters.unflatten(
    {path: np.resize(noise, shape) for path, shape in shapes.items()}
  )
  tok = numbered_rows.sample_tokenizer()
  hf.write(tmp_path, _LARGE, params, tok, 'float32')
  size = sum(p.stat().st_size for p in tmp_path.glob('*.safetensors'))
  assert size > 2e9
  address = several.address()
  commands = (['-c', _PROCESS, address, i, tmp_path] for i in range(2))
  # What is freed goes back at once, so that the peak is what was held.
  env = {'XLA_FLAGS': '', 'MALLOC_MMAP_THRESHOLD_': '100000'}
  outs = several.ends(several.start(*commands, **env))
  (first,), (second,) = map(_got, outs)
  # The numbers and the CRC are those of one process.
  whole, crc = kept.every(_LARGE, params, kept.Keep(mesh=_halves()))
  assert first[0] == second[0] == crc
  assert sorted(first[1] + second[1]) == sorted(_shards(whole, _halves()))
  tensor = 4 * _LARGE.embed_dim * _LARGE.hidden_dim
  for _, _, own, grown, read in (first, second):
    assert own < 0.51 * size
    assert grown < own + 1.9 * tensor, grown
    assert read < 0.55 * size, read
