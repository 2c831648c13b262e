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

from configs import debug
from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import step
from mt.weights import peft
from tests.fixtures import tiny_gemma4
from tests.fixtures.gemma_oracle import jit

SHAPES = tiny_gemma4.SHAPES
_L = 14
_LENGTHS = (6, 8, 14)
_ALONE, _PACKED = ((0,), (1,), (2,)), ((0, 1), (2,), ())


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
def _run(name, layout, remat):
  """Hidden states of each example, and gradients of their squares' sum."""
  cfg = SHAPES[name]
  inputs, places = _batch(layout)

  def total(params):
    x = model.forward(cfg, params, *inputs, remat=remat)
    return jnp.sum((x * (inputs[2] > 0)[..., None]) ** 3), x

  grads, x = jit(jax.grad(total, has_aux=True))(tiny_gemma4.params(cfg))
  return [np.asarray(x[place]) for place in places], grads


def _assert_near(got, want, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # The last layer's scale has no effect before a norm: its gradient is none.
    assert np.linalg.norm(a - b) < tolerance * max(np.linalg.norm(b), 1)


@pytest.mark.parametrize('name', ('e2b', '12b'))
def test_packed_and_recomputed_is_alone_and_kept(name):
  found, want = _run(name, _PACKED, 'full'), _run(name, _ALONE, 'none')
  _assert_near(found, want, 2e-5)
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


@functools.cache
def _trained(shape):
  """Parameters after two steps on a mesh, in which everything is trained."""
  cfg = SHAPES['e2b']
  config = debug.get_config()
  config.train.update(parts='all', batch_size=4)
  config.optim.update(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-3)
  config = machine.here(config)
  axes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  mesh = sharding.make_mesh(ml_collections.ConfigDict(axes))
  optimizer = optimizer_lib.make_optimizer(config.optim, 10)
  state = state_lib.init_state(
    cfg, tiny_gemma4.params(cfg), config, optimizer, jax.random.key(2), mesh
  )
  train_step = step.make_train_step(cfg, config, optimizer, mesh)
  (tokens, positions, segments), _ = _batch((*_ALONE, (2,)))
  batch = {
    'tokens': tokens,
    'positions': positions,
    'segment_ids': segments,
    'target_mask': (positions > 2) & (segments > 0),
  }
  for _ in range(2):
    rows = sharding.put_rows(mesh, batch, 4)
    state, metrics = train_step(state, rows)
  return state.trained, float(metrics['nll'])


@pytest.mark.usefixtures('quick_compilation')
def test_a_mesh_gives_the_numbers_of_one_device():
  found, nll = _trained((1, 2, 2))
  want, want_nll = _trained((1, 1, 1))
  assert found['local/q'].sharding.shard_shape((4, 24, 32)) == (4, 12, 16)
  # A single key head is on every device.
  assert found['global/k'].sharding.shard_shape((2, 24, 16)) == (2, 12, 16)
  assert nll == pytest.approx(want_nll, rel=1e-5)
  for path, x in want.items():
    np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', SHAPES)
def test_low_rank_factors_are_on_what_counts(tmp_path, name):
  cfg = SHAPES[name]
  params = tiny_gemma4.params(cfg)
  trained, frozen = lora.partition(
    cfg, params, 'lora', rank=2, key=jax.random.key(0)
  )
  inputs, _ = _batch(_PACKED)

  def total(trained):
    params = lora.merge(trained, frozen, lora_scale=0.5)
    return jnp.sum(model.forward(cfg, params, *inputs) ** 3)

  trained = {k: v + 0.01 for k, v in trained.items()}
  for path, x in jit(jax.grad(total))(trained).items():
    assert all(np.any(layer) for layer in x), path
  folded = lora.fold(lora.merge(trained, frozen, lora_scale=0.5))
  assert parameters.flatten(folded).keys() == frozen.keys()
  a, b = (np.asarray(trained[f'global/o_lora_{x}']) for x in 'ab')
  want = params['global']['o'] + np.einsum('nir,nro->nio', a, b) / 2
  np.testing.assert_allclose(folded['global']['o'], want, rtol=1e-5, atol=1e-6)
  # PEFT's folder names the layers as the model counts them.
  peft.write(tmp_path, cfg, trained, alpha=1.0, base='x')
  found = safetensors_numpy.load_file(tmp_path / 'adapter_model.safetensors')
  keys = {n.split('.layers.')[1].split('.')[0] for n in found if 'k_proj' in n}
  own = cfg.num_layers - cfg.sharing_layers
  assert keys == set(map(str, range(own)))
  values = {n for n in found if 'v_proj' in n}
  own -= own // 3 if cfg.keys_are_values else 0
  assert len(values) == 2 * own
  modules = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert 'v_proj' in modules['target_modules']


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
