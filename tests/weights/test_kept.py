"""Parameters are read into their format and place, a tensor at a time."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import state as state_lib
from mt.weights import hf
from mt.weights import kept
from tests.fixtures import numbered_rows
from tests.fixtures import several
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


def test_parts_of_a_tensor_may_be_of_any_float_type(monkeypatch):
  _in_parts(monkeypatch)
  x = np.asarray(_params()['embedding'].astype(jnp.bfloat16))
  halves = iter([x[:50], x[50:]])
  found, crc = kept.one(CFG, 'embedding', [(None, halves)], kept.FLOAT32, 7)
  np.testing.assert_array_equal(found, x.astype(np.float32))
  assert crc == zlib.crc32(x.astype(np.float32), 7)


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
import resource, sys
from mt.base import processes
processes.start(sys.argv[1], 2, int(sys.argv[2]))
import jax
from mt.gemma import sharding
from mt.weights import kept
from mt.weights import pretrained
mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1})
source = pretrained.open_source(sys.argv[3], '', '', seed=0, texts=())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params, crc = source.read_kept(kept.Keep(mesh=mesh))
jax.block_until_ready(params)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
own = sum(s.data.nbytes for x in jax.tree.leaves(params)
          for s in x.addressable_shards)
print('got', crc, own, (after - before) * 1024)
"""


@pytest.mark.heavy
def test_a_process_holds_its_share_and_one_tensor(tmp_path):
  """Two processes read a checkpoint of 2 GB: 1.1 GB each."""
  shapes = parameters.shapes(_LARGE)
  params = parameters.unflatten(
    {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
  )
  tok = numbered_rows.sample_tokenizer()
  hf.write(tmp_path, _LARGE, params, tok, 'float32')
  size = sum(p.stat().st_size for p in tmp_path.glob('*.safetensors'))
  assert size > 2e9
  address = several.address()
  commands = (['-c', _PROCESS, address, i, tmp_path] for i in range(2))
  outs = several.ends(several.start(*commands, XLA_FLAGS=''))
  lines = [next(x for x in out.splitlines() if 'got' in x) for out in outs]
  found = [[int(n) for n in line.split()[1:]] for line in lines]
  assert found[0][0] == found[1][0]
  tensor = 4 * _LARGE.embed_dim * _LARGE.hidden_dim
  for _, own, grown in found:
    assert own < 0.51 * size
    assert grown < own + 1.5 * tensor, found
