"""Gemma 4: stacks of layers of several shapes, in training.

What transformers makes of the same models: tests/weights/test_gemma4.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import optimizer as optimizer_lib
from mt.weights import peft
from tests.fixtures import tiny_gemma4

SHAPES = tiny_gemma4.SHAPES
_L = 14
_LENGTHS = (6, 8, 14)
_ALONE, _PACKED = ((0,), (1,), (2,), ()), ((0, 1), (2,), (), ())


def _batch(layout):
  """Examples of random tokens, in rows of `layout`."""
  tokens, positions, segments = np.zeros((3, len(layout), _L), np.int32)
  where = {}
  for row, examples in enumerate(layout):
    end = 0
    for segment, i in enumerate(examples, 1):
      start, end = end, end + _LENGTHS[i]
      rng = np.random.default_rng(i)
      tokens[row, start:end] = rng.integers(0, 96, _LENGTHS[i])
      positions[row, start:end] = np.arange(_LENGTHS[i])
      segments[row, start:end] = segment
      where[i] = row, slice(start, end)
  return (tokens, positions, segments), [where[i] for i in sorted(where)]


@functools.cache
def _run(name, layout, remat, mesh=None):
  """Hidden states of each example, and gradients of the sum of their cubes."""
  cfg = SHAPES[name]
  inputs, places = _batch(layout)

  def total(params):
    x = model.forward(cfg, params, *inputs, remat=remat, mesh=mesh)
    return jnp.sum((x * (inputs[2] > 0)[..., None]) ** 3), x

  params = tiny_gemma4.params(cfg)
  if mesh is not None:
    flat = parameters.flatten(params)
    flat = sharding.put(flat, sharding.of_tree(cfg, mesh, flat))
    params = parameters.unflatten(flat)
  grads, x = jax.jit(jax.grad(total, has_aux=True))(params)
  return [np.asarray(x[place]) for place in places], grads


def _assert_near(got, want, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # The last layer's scale has no effect before a norm: its gradient is none.
    assert np.linalg.norm(a - b) < tolerance * max(np.linalg.norm(b), 1)


@pytest.mark.parametrize(
  'name', ['e2b', pytest.param('12b', marks=pytest.mark.heavy)]
)
def test_packed_and_recomputed_is_alone_and_kept(name):
  found, want = _run(name, _PACKED, 'full'), _run(name, _ALONE, 'none')
  _assert_near(found, want, 5e-5)
  for path, x in parameters.flatten(found[1]).items():
    assert np.any(x), path  # All of it counts.


@pytest.mark.parametrize('name', SHAPES)
def test_the_program_does_not_grow_with_depth(name):
  cfg = SHAPES[name]

  def lines(cfg):
    shapes = parameters.unflatten(
      {
        k: jax.ShapeDtypeStruct(v, jnp.float32)
        for k, v in parameters.shapes(cfg).items()
      }
    )
    run = functools.partial(model.forward, cfg)
    return str(jax.make_jaxpr(run)(shapes, *_batch(_ALONE)[0])).count('\n')

  deeper = dataclasses.replace(
    cfg, num_layers=cfg.num_layers + 6, sharing_layers=cfg.sharing_layers * 2
  )
  # A gather of a layer's own input is written out for each number of layers.
  assert abs(lines(deeper) - lines(cfg)) < 0.02 * lines(cfg)


def test_a_mesh_gives_the_numbers_of_one_device():
  cfg = SHAPES['e2b']
  axes = ml_collections.ConfigDict({'data': 1, 'fsdp': 2, 'tensor': 2})
  mesh = sharding.make_mesh(axes)
  flat = parameters.flatten(tiny_gemma4.params(cfg))
  places = sharding.of_tree(cfg, mesh, flat)
  # A single key head is on every device.
  assert places['local/q'].shard_shape((4, 24, 32)) == (4, 12, 16)
  assert places['global/k'].shard_shape((2, 24, 16)) == (2, 12, 16)
  _assert_near(
    _run('e2b', _ALONE, 'none', mesh), _run('e2b', _ALONE, 'none'), 1e-4
  )


@pytest.mark.parametrize('name', ('e2b', '12b'))
def test_low_rank_factors_are_on_what_counts(tmp_path, name):
  """What there is of parameters counts: see the gradients above."""
  cfg = SHAPES[name]
  params = tiny_gemma4.params(cfg)
  trained, frozen = lora.partition(
    cfg, params, 'lora', rank=2, key=jax.random.key(0)
  )
  matrices = {k for k in frozen if '/' in k and 'norm' not in k}
  matrices = {k for k in matrices if not k.endswith('/scale')}
  assert {k.partition('_lora_')[0] for k in trained} == matrices
  assert not {'local_sharing/k', 'global_sharing/v'} & matrices
  rng = np.random.default_rng(0)
  trained = {k: rng.normal(size=v.shape) for k, v in trained.items()}
  # PEFT's folder numbers the layers as the model does.
  peft.write(tmp_path, cfg, trained, alpha=1.0, base='x')
  found = safetensors_numpy.load_file(tmp_path / 'adapter_model.safetensors')
  own = cfg.num_layers - cfg.sharing_layers
  wanted = dict.fromkeys(('q_proj', 'o_proj', 'mlp.up_proj'), cfg.num_layers)
  wanted |= {'k_proj': own, 'v_proj': own}
  if cfg.keys_are_values:
    wanted['v_proj'] = own - own // 3
  for module, number in wanted.items():
    names = [n.split('.') for n in found if f'{module}.lora_B' in n]
    numbers = {int(n[n.index('layers') + 1]) for n in names}
    assert len(numbers) == len(names) == number
    assert max(numbers) < (own if module[0] in 'kv' else cfg.num_layers)
  b = found['base_model.model.model.layers.5.self_attn.o_proj.lora_B.weight']
  want = trained['global/o_lora_b'][1].astype(np.float32)
  np.testing.assert_array_equal(b.T, want)
  modules = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert 'v_proj' in modules['target_modules']


def test_low_rank_products_are_added_to_each_stack():
  params = tiny_gemma4.params(SHAPES['12b'])
  trained, frozen = lora.partition(
    SHAPES['12b'], params, 'lora', rank=2, key=jax.random.key(0), matrices='o'
  )
  trained = {k: v + 0.01 for k, v in trained.items()}
  folded = lora.fold(lora.merge(trained, frozen, lora_scale=0.5))
  assert parameters.flatten(folded).keys() == frozen.keys()
  for stack in ('local', 'global'):
    a, b = (np.asarray(trained[f'{stack}/o_lora_{x}']) for x in 'ab')
    want = params[stack]['o'] + np.einsum('nir,nro->nio', a, b) / 2
    np.testing.assert_allclose(folded[stack]['o'], want, rtol=1e-5, atol=1e-6)


def test_blocks_are_all_but_the_embeddings():
  cfg = SHAPES['e2b']
  trained, frozen = lora.partition(
    cfg, tiny_gemma4.params(cfg), 'blocks', rank=1, key=jax.random.key(0)
  )
  assert set(frozen) == {'embedding', 'layer_input_embedding'}
  decayed = optimizer_lib.decayed(trained)
  kept = {k.rpartition('/')[2] for k, v in decayed.items() if not v}
  assert {'scale', 'q_norm', 'final_norm', 'layer_input_norm'} <= kept
  assert decayed['local/q'] and decayed['layer_input_proj']


def test_a_layer_sees_the_last_keys_of_its_kind():
  cfg = sizes.SIZES['gemma4_e2b']
  assert {cfg.kv_layer(n) for n in range(15, 35)} == {13, 14}
  assert [n for n in range(35) if cfg.kv_layer(n) == 14] == [14, 19, 24, 29, 34]
  assert [cfg.kv_layer(n) for n in range(15)] == list(range(15))
