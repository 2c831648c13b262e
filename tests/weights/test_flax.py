"""Flax checkpoints, in the published layouts and ours, against gemma.params."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import flax_store
from mt.weights import load
from tests.fixtures import flax_fixture
from tests.fixtures import gemma_oracle
from tests.fixtures import gguf_fixture
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
FAMILIES = flax_fixture.FAMILIES
_open = flax_fixture.open_weights


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The tiny sizes count as published ones."""
  for name, cfg in FAMILIES.items():
    monkeypatch.setitem(sizes.SIZES, f'tiny_{name}', cfg)


def _read(path):
  weights = flax.open_folder(path)
  return weights.config, load.read(weights, jax.random.key(0))[0]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A Gemma 3 checkpoint, not to be changed."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoint'
  cfg = FAMILIES['gemma3']
  return flax_fixture.save(path, cfg, flax_fixture.tiny_params(cfg))


# The layouts.


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize(
  'layout, options',
  [
    ('flat', {'dtype': 'bfloat16'}),
    ('flat', {'dtype': 'bfloat16', 'ocdbt': False, 'vision': True}),
    ('flat', {'transposed': True, 'vision': True}),
    ('nested', {'transposed': True, 'zarr3': True}),
    ('kauldron', {'dtype': 'bfloat16', 'vision': True}),
  ],
  ids=['ocdbt', 'plain', 'transposed', 'zarr3', 'training state'],
)
def test_every_layout_is_read(tmp_path, name, layout, options):
  cfg = FAMILIES[name]
  params = flax_fixture.tiny_params(cfg)
  path = tmp_path / 'checkpoint'
  flax_fixture.save(path, cfg, params, layout=layout, **options)
  found, read = _read(path)
  assert found == cfg
  flax_fixture.assert_same(read, params)


@pytest.mark.parametrize('rows', [64, 150, 1000])
def test_no_chunk_of_the_embedding_is_read_twice(tmp_path, monkeypatch, rows):
  """A checkpoint that was written over four devices has it in four chunks."""
  cfg = FAMILIES['gemma3']
  params = flax_fixture.tiny_params(cfg)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 4, 'tensor': 1})
  place = sharding.of_parameter(cfg, mesh, 'embedding', (400, cfg.embed_dim))
  split = params | {'embedding': jax.device_put(params['embedding'], place)}
  path = flax_fixture.save(tmp_path / 'checkpoint', cfg, split)
  read, real = [], flax_store.read_array

  def read_array(store, name, array):
    if name == flax.EMBEDDING:
      read.append(
        (array.domain[0].inclusive_min, array.domain[0].exclusive_max)
      )
    return real(store, name, array)

  monkeypatch.setattr(flax_store, 'read_array', read_array)
  monkeypatch.setattr(load, '_AT_ONCE', rows * cfg.embed_dim)
  flax_fixture.assert_same(_read(path)[1], params)
  step = min(400, max(1, rows // 100) * 100)
  assert read == [(at, at + step) for at in range(0, 400, step)]


def test_a_published_block_computes_the_same(tmp_path):
  """With weights that the library drew, transposed, and our own block."""
  cfg = FAMILIES['gemma3']
  block = gemma_oracle.block(cfg, 'G').clone(
    transpose_gating_einsum=True,
    rope_base_frequency=10_000,
    rope_scale_factor=1,
  )
  x = jax.random.normal(jax.random.key(0), (2, 5, cfg.embed_dim))
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))

  @jax.jit
  def draw(key):
    drawn = block.init(key, x, positions, None, mask)['params']
    return jax.tree.map(lambda w: w + 0.1, drawn)  # Norms are drawn as zeros.

  @jax.jit
  def theirs(layer):
    return block.apply({'params': layer}, x, positions, None, mask)[1]

  @jax.jit
  def ours(layer):
    rate = 10_000.0 ** -(jnp.arange(cfg.head_dim // 2) * 2 / cfg.head_dim)
    angles = positions[..., None] * rate
    return model.block(
      cfg,
      layer,
      x,
      jnp.sin(angles),
      jnp.cos(angles),
      lambda q, k, v: (attention.attend(cfg, q, k, v, mask), None),
    )[0]

  layers = [draw(jax.random.key(i)) for i in range(cfg.num_layers)]
  tree = {f'layer_{i}': layer for i, layer in enumerate(layers)}
  tree['embedder'] = {'input_embedding': jnp.ones((400, cfg.embed_dim))}
  tree['final_norm'] = {'scale': jnp.ones(cfg.embed_dim)}
  path = str(tmp_path / 'checkpoint')
  gemma_params.format_and_save_params({'transformer': tree}, path)
  _, read = _read(pathlib.Path(path))
  for i, layer in enumerate(layers):
    got = ours(jax.tree.map(lambda w, i=i: w[i], read['layers']))
    np.testing.assert_allclose(got, theirs(layer), rtol=1e-4, atol=1e-4)


def test_the_vision_tower_is_not_read(tmp_path, monkeypatch):
  cfg = FAMILIES['gemma3']
  path = flax_fixture.save(
    tmp_path / 'checkpoint', cfg, flax_fixture.tiny_params(cfg), vision=True
  )
  opened = []
  real = flax_store.open_array

  def open_array(store, name):
    opened.append(store.names[name][0].replace('/', '.'))
    return real(store, name)

  monkeypatch.setattr(flax_store, 'open_array', open_array)
  _read(path)
  vision = {n for n in flax_store.open_store(path).names if 'layer' not in n}
  vision -= {'transformer.embedder.input_embedding'}
  vision -= {'transformer.final_norm.scale'}
  assert len(vision) == 3
  assert opened and not vision & set(opened)


def test_spare_rows_may_be_missing(tmp_path):
  """Gemma 1 has 256,128 rows as published here and 256,000 elsewhere."""
  cfg = dataclasses.replace(FAMILIES['gemma2'], vocab_size=400 - 128)
  params = flax_fixture.tiny_params(cfg)
  path = flax_fixture.save(tmp_path / 'a', cfg, params)
  found, read = _read(path)
  assert found == cfg
  flax_fixture.assert_same(read, params)
  less = dataclasses.replace(cfg, vocab_size=400 - 129)
  path = flax_fixture.save(tmp_path / 'b', less, flax_fixture.tiny_params(less))
  refusal(lambda: _read(path), path, 'vocab_size 271 (there 400)')


@pytest.mark.parametrize('name', [n for n in sizes.SIZES if n != 'debug'])
@pytest.mark.parametrize('transposed', [False, True])
def test_every_published_size_is_recognised(monkeypatch, name, transposed):
  """From shapes alone: no array of that size is made."""
  cfg = sizes.SIZES[name]
  shapes = {p.name: p.shape for p in flax.places(transposed, cfg)}

  def open_array(store, name):
    return np.broadcast_to(np.float32(0), shapes[name])

  monkeypatch.setattr(flax_store, 'open_array', open_array)
  names = dict.fromkeys(shapes)
  store = flax_store.Store(pathlib.Path('x'), names, None, False)
  assert flax.read_config(store) == cfg


def test_an_unknown_size_names_the_nearest(tmp_path):
  cfg = dataclasses.replace(FAMILIES['gemma2'], num_layers=3, hidden_dim=97)
  path = flax_fixture.save(tmp_path / 'c', cfg, flax_fixture.tiny_params(cfg))
  refusal(
    lambda: _read(path),
    path,
    'tiny_gemma2: num_layers 3 (there 2), hidden_dim 97 (there 96);',
    'mt/gemma/sizes.py',
  )


# Folders and tokenizers.


@pytest.mark.parametrize('where', ['above', 'inside', 'other name'])
def test_the_tokenizer_beside_the_checkpoint(saved, tmp_path, where):
  checkpoint = tmp_path / '2' / '2b-it'
  shutil.copytree(saved, checkpoint)
  folder = checkpoint if where == 'inside' else checkpoint.parent
  name = 'spiece.model' if where == 'other name' else 'tokenizer.model'
  (folder / name).write_bytes(gguf_fixture.train_proto())
  for path in (checkpoint, checkpoint.parent):  # Kaggle's folder, or the inner.
    source = _open(path)
    assert source.config == FAMILIES['gemma3']
    assert source.tokenizer.proto == gguf_fixture.train_proto()
  if where == 'above':  # The name decides among several.
    (folder / 'other.model').write_bytes(b'')
    assert _open(checkpoint).tokenizer.proto == gguf_fixture.train_proto()


def test_a_tokenizer_that_is_not_there(saved, tmp_path):
  checkpoint = tmp_path / '2' / '2b-it'
  shutil.copytree(saved, checkpoint)
  refusal(
    lambda: _open(checkpoint),
    checkpoint,
    'no *.model',
    'weights.tokenizer',
  )
  path = tmp_path / 'mine.model'
  path.write_bytes(gguf_fixture.train_proto())
  assert _open(checkpoint, path).tokenizer.vocab_size == 400
  (checkpoint.parent / 'a.model').write_bytes(b'')
  (checkpoint.parent / 'b.model').write_bytes(b'')
  refusal(
    lambda: _open(checkpoint),
    'several *.model',
    'weights.tokenizer',
  )


def test_folders_without_a_checkpoint(saved, tmp_path):
  refusal(
    lambda: _open(tmp_path),
    tmp_path,
    'none found',
    'weights.source',
  )
  for name in ('2b', '2b-it'):
    shutil.copytree(saved, tmp_path / name)
  refusal(lambda: _open(tmp_path), tmp_path, '2b, 2b-it found')


# Damage.


def _copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'checkpoint'))


def _arrays(path, ocdbt):
  """Orbax's own checkpoint of a tiny tree, to be spoilt array by array."""
  cfg = FAMILIES['gemma3']
  params = flax_fixture.tiny_params(cfg)
  return flax_fixture.save(path, cfg, params, ocdbt=ocdbt)


@pytest.mark.parametrize(
  'array, change, words',
  [
    ('attn/q_einsum.w', None, ('no tensor', 'layer_1.attn.q_einsum')),
    ('attn/q_einsum.w', {'shape': [4, 32, 17]}, ('(4, 32, 17)', '(4, 32, 16)')),
    ('mlp/linear.w', {'shape': [2**40, 2**40]}, ('1099511627776',)),
    ('mlp/linear.w', {'chunks': [2**20, 2**12]}, ('chunks of',)),
    ('mlp/linear.w', {'shape': [-1, 32]}, ('cannot be opened',)),
    ('mlp/linear.w', {'dtype': '|O'}, ('cannot be opened',)),
    ('mlp/linear.w', {'dtype': '<i4'}, ('int32', 'quantised')),
    ('mlp/linear.w', {'filters': [{'id': 'pickle'}]}, ('cannot be opened',)),
    ('mlp/linear.w', {'compressor': {'id': 'pickle'}}, ('cannot be opened',)),
    ('pre_ffw_norm.scale', {'shape': [64]}, ('(64,)', '(32,)')),
  ],
)
def test_a_hostile_header(tmp_path, array, change, words):
  path = _arrays(tmp_path / 'checkpoint', ocdbt=False)
  folder = path / 'transformer' / 'layer_1' / array
  if change is None:
    shutil.rmtree(folder)
  else:
    header = json.loads((folder / '.zarray').read_text()) | change
    (folder / '.zarray').write_text(json.dumps(header))
  refusal(lambda: _read(path), path, *words)


@pytest.mark.parametrize(
  'array', ['embedder.input_embedding', 'final_norm.scale']
)
def test_a_chunk_that_is_gone(tmp_path, array):
  path = _arrays(tmp_path / 'checkpoint', ocdbt=False)
  for chunk in (path / 'transformer' / array).glob('[0-9]*'):
    chunk.unlink()
  refusal(lambda: _read(path), path, array, 'incomplete')


def test_old_orbax_left_zeros_out(tmp_path):
  cfg = FAMILIES['gemma3']
  params = flax_fixture.tiny_params(cfg)
  params['layers']['attn_norm'][:] = 0
  path = tmp_path / 'checkpoint'
  flax_fixture.save(path, cfg, params, ocdbt=False)
  metadata = json.loads((path / '_METADATA').read_text())
  del metadata['store_array_data_equal_to_fill_value']
  (path / '_METADATA').write_text(json.dumps(metadata))
  for chunk in path.glob('transformer/layer_*/pre_attention_norm.scale/0'):
    chunk.unlink()
  flax_fixture.assert_same(_read(path)[1], params)
  # No matrix of a trained model is zero.
  (path / 'transformer' / 'layer_0' / 'mlp' / 'linear.w' / '0.0').unlink()
  refusal(lambda: _read(path), path, 'linear', 'incomplete')


@pytest.mark.parametrize(
  'name',
  [
    'layer_1.mlp.router',
    'lm_head',
    'embedder.per_layer_input_embedding',
    'altup.projection',
    'final_norm.bias',
  ],
)
@pytest.mark.parametrize('outer', ('', 'transformer', 'params'))
def test_more_than_a_gemma(tmp_path, name, outer):
  cfg = FAMILIES['gemma3']
  tree = flax_fixture.nested_tree(cfg, flax_fixture.tiny_params(cfg))
  *place, last = name.split('.')
  functools.reduce(lambda t, k: t.setdefault(k, {}), place, tree)[last] = {
    'w': jnp.ones(3)
  }
  tree = {outer: tree} if outer else tree
  gemma_params.save_params(tree, str(tmp_path / 'checkpoint'))
  path = tmp_path / 'checkpoint'
  refusal(lambda: _read(path), path, name, 'no part')


def test_not_a_gemma(tmp_path):
  gemma_params.save_params({'w': jnp.ones(3)}, str(tmp_path / 'checkpoint'))
  path = tmp_path / 'checkpoint'
  refusal(
    lambda: _read(path), path, 'embedder.input_embedding', 'weights.source'
  )


def test_a_link_to_a_file_is_followed(saved, tmp_path):
  path = _copy(saved, tmp_path)
  for file in [p for p in path.rglob('*') if p.is_file()]:
    file.unlink()
    file.symlink_to(saved / file.relative_to(path))
  (path / 'loop').symlink_to(path)
  assert _read(path)[0] == FAMILIES['gemma3']


def test_nothing_of_orbax_json_is_needed(saved, tmp_path):
  path = _copy(saved, tmp_path)
  for name in ('_METADATA', '_sharding', '_CHECKPOINT_METADATA'):
    (path / name).unlink()
  want = flax_fixture.tiny_params(FAMILIES['gemma3'])
  flax_fixture.assert_same(_read(path)[1], want)


# Memory.

_MEASURE = """
import pathlib, re, sys
import jax
import numpy as np
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import load
cfg = sizes.ModelConfig(**eval(sys.argv[2]))
sizes.SIZES['measured'] = cfg
jax.numpy.zeros(3).block_until_ready()
def peak():  # Not getrusage's, which starts from what the parent took.
  status = open('/proc/self/status').read()
  return 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', status)[1])
weights = flax.open_folder(pathlib.Path(sys.argv[1]))
assert weights.config == cfg
np.ones(2**20).sum()
before = peak()
params = load.read(weights, jax.random.key(0))[0]
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def test_reading_takes_little_more_than_the_parameters(tmp_path):
  """At most 1.35 times of them and one tensor more; they are 193 MB."""
  cfg = dataclasses.replace(
    FAMILIES['gemma3'],
    vocab_size=16_000,
    num_layers=4,
    embed_dim=640,
    hidden_dim=4096,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
  )
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(99_991)
  params = parameters.unflatten(
    {
      k: jnp.asarray(np.resize(noise, shape))
      for k, shape in parameters.shapes(cfg).items()
    }
  )
  path = tmp_path / 'checkpoint'
  flax_fixture.save(path, cfg, params, dtype='bfloat16')
  done = subprocess.run(
    [sys.executable, '-c', _MEASURE, path, repr(dataclasses.asdict(cfg))],
    cwd=ROOT,
    capture_output=True,
    text=True,
    # What is freed goes back at once, so that the peak is what was held.
    env=os.environ | {'MALLOC_MMAP_THRESHOLD_': '100000'},
  )
  assert done.returncode == 0, done.stderr
  grown, final = map(int, done.stdout.split())
  assert final == 4 * sum(x.size for x in jax.tree.leaves(params))
  print(f'{grown / final:.3f} times of {final:,} bytes')
  assert final < grown <= 1.35 * final + 2 * params['embedding'].size
