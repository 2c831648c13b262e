"""The same numbers on any mesh, and each device with its share only."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import debug
from mt.gemma import embedding
from mt.gemma import fused
from mt.gemma import loss
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import run as run_lib
from mt.train import state as state_lib
from mt.train import step
from tests.fixtures.refusal import refusal

# Four query heads over two key/value heads: a tensor axis of 4 or 8 divides
# neither or one of them.
CFG = dataclasses.replace(
  sizes.SIZES['debug'],
  num_layers=2,
  vocab_size=96,
  embed_dim=32,
  hidden_dim=48,
  num_kv_heads=2,
)
B, L = 8, 12
MESHES = [
  (d, f, t)
  for d in (1, 2, 4, 8)
  for f in (1, 2, 4, 8)
  for t in (1, 2, 4, 8)
  if d * f * t in (2, 4, 8)
]


def _mesh(data, fsdp, tensor):
  knobs = ml_collections.ConfigDict(
    {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  )
  return sharding.make_mesh(knobs)


def _batch(seed):
  """Rows of unequal length; one of them without any target."""
  rng = np.random.default_rng(seed)
  inside = np.arange(L) < rng.integers(8, L + 1, (B, 1))
  target_mask = inside & (np.arange(L) >= rng.integers(3, 7, (B, 1)))
  target_mask[seed % B] = False
  return {
    'tokens': rng.integers(3, CFG.vocab_size, (B, L)).astype(np.int32),
    'positions': np.where(inside, np.arange(L), 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'target_mask': target_mask,
  }


def _config(parts='all', **train):
  config = debug.get_config()
  config.train.update(parts=parts, lora_rank=4, batch_size=B, **train)
  config.optim.update(learning_rate=1e-2, weight_decay=0.1, ema_decay=0.5)
  # Where a gradient is about this, its rounding decides Adam's sign.
  config.optim.epsilon = 1e-3
  return machine.here(config)


def _train(config, mesh, steps=2):
  """(losses and gradient norms, final state)."""
  params = parameters.init(CFG, jax.random.key(1))
  optimizer = optimizer_lib.make_optimizer(config.optim, 10)
  key = jax.random.key(2)
  state = state_lib.init_state(CFG, params, config, optimizer, key, mesh)
  train_step = step.make_train_step(CFG, config, optimizer, mesh)
  places = jax.tree.map(lambda x: x.sharding, state)
  nlls = []
  for i in range(steps):
    batch = sharding.put_rows(mesh, _batch(i), B)
    state, metrics = train_step(state, batch)
    nlls += [float(metrics['nll']), float(metrics['grad_norm'])]
  if mesh is not None:  # Nothing has moved; the donated memory is reused.
    for x, place in zip(
      jax.tree.leaves(state), jax.tree.leaves(places), strict=True
    ):
      assert x.sharding.is_equivalent_to(place, x.ndim)
  return nlls, state


@functools.cache
def _alone(parts, micro, frozen):
  config = _config(parts, micro_batches=micro, frozen_dtype=frozen)
  nlls, state = _train(config, None)
  return nlls, jax.tree.map(np.asarray, (state.trained, state.ema))


def _check(parts, micro, shape, frozen='auto'):
  mesh = _mesh(*shape)
  config = _config(parts, micro_batches=micro, frozen_dtype=frozen)
  nlls, state = _train(config, mesh)
  want, want_state = _alone(parts, micro, frozen)
  np.testing.assert_allclose(nlls, want, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    (state.trained, state.ema),
    want_state,
  )
  return mesh, state


QUICK = [(4, 1, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize(
  'shape',
  [
    pytest.param(s, marks=() if s in QUICK else pytest.mark.heavy)
    for s in MESHES
  ],
)
def test_any_mesh_gives_the_numbers_of_one_device(shape):
  _, state = _check('all', 1, shape)
  assert len(state.trained['layers/gate'].sharding.device_set) == np.prod(shape)


@pytest.mark.parametrize(
  'parts, micro, shape',
  [
    pytest.param('lora', 1, (2, 2, 2), marks=pytest.mark.heavy),
    ('lora', 2, (2, 2, 1)),
    pytest.param('all', 2, (1, 4, 2), marks=pytest.mark.heavy),
    pytest.param(
      'layers/(q|v)|embedding', 4, (2, 1, 4), marks=pytest.mark.heavy
    ),
  ],
)
def test_parts_and_micro_batches_on_a_mesh(parts, micro, shape):
  _check(parts, micro, shape)


def test_quantised_matrices_on_a_mesh():
  """Where a block is on two devices, too; scales go where they divide."""
  _, state = _check('lora', 1, (1, 2, 4), 'int4')
  q = state.frozen['layers/down']
  shapes = [x.addressable_shards[0].data.shape for x in (q.q, q.scale)]
  assert shapes == [(2, 6, 16), (2, 3, 16)]
  assert q.scale.shape == (2, 3, 32)


def test_each_device_holds_its_share():
  """Bytes by device against the ones of a single device, from the shapes."""
  params = parameters.init(CFG, jax.random.key(1))
  optimizer = optimizer_lib.make_optimizer(_config().optim, 10)

  def largest(shape, parts='all'):
    mesh = _mesh(*shape)
    state = state_lib.init_state(
      CFG, params, _config(parts), optimizer, jax.random.key(2), mesh
    )
    held = {}
    for x in jax.tree.leaves(state):
      for shard in x.addressable_shards:
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    assert len(held) == np.prod(shape)
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    return max(held.values()) / total

  norms = 0.03  # At most; they are whole everywhere.
  assert largest((8, 1, 1)) == 1
  assert largest((1, 8, 1)) < 1 / 8 + norms
  assert largest((2, 4, 1)) < 1 / 4 + norms
  assert largest((1, 1, 2)) < 1 / 2 + norms
  assert largest((1, 4, 2)) < 1 / 8 + norms
  # Each low-rank factor has one side that is split over one axis.
  assert 1 / 8 < largest((1, 4, 2), 'lora') < 1 / 4
  # Two key/value heads do not divide by 4: k and v are whole there.
  k = _mesh(1, 2, 4)
  spec = sharding.of_parameter(CFG, k, 'layers/k', (2, 32, 32)).spec
  assert spec == jax.sharding.PartitionSpec(None, ('fsdp',), None)


def test_only_a_mesh_of_tpus_has_options():
  tpu = types.SimpleNamespace(platform='tpu')
  mesh = types.SimpleNamespace(devices=np.array([[tpu, tpu]]))
  (name,) = sharding.compiler_options(mesh)
  assert name.endswith('threshold_for_windowed_einsum_mib')
  here = {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert not sharding.compiler_options(sharding.make_mesh(here))
  assert not sharding.compiler_options(None)


def test_what_does_not_divide_stays_whole():
  """A vocabulary of 91 = 7 * 13 on any mesh; three heads on two devices."""
  cfg = dataclasses.replace(
    CFG, vocab_size=91, num_heads=3, num_kv_heads=1, hidden_dim=45
  )
  batch = _batch(0)
  batch['tokens'] %= 91
  flat = parameters.flatten(parameters.init(cfg, jax.random.key(2)))
  train = _config().train

  def run(mesh):
    trained, rows = flat, sharding.put_rows(mesh, batch, B)
    if mesh is not None:
      trained = sharding.put(flat, sharding.of_tree(cfg, mesh, flat))
    run = functools.partial(step.accumulated_gradients, cfg, train, mesh=mesh)
    return jax.jit(run)(trained, {}, rows)

  (grads, nll), (want, want_nll) = run(_mesh(2, 2, 2)), run(None)
  assert float(nll) == pytest.approx(float(want_nll), rel=1e-5)
  for name, value in want.items():
    error = np.linalg.norm(grads[name] - np.asarray(value))
    assert error < 1e-5 * np.linalg.norm(value), name


def test_evaluation_is_the_one_of_one_device():
  params, config = parameters.init(CFG, jax.random.key(1)), _config()
  sgd = optimizer_lib.make_optimizer(config.optim, 10)

  def evaluate(mesh):
    key = jax.random.key(2)
    state = state_lib.init_state(CFG, params, config, sgd, key, mesh)
    batch = sharding.put_rows(mesh, _batch(0), B)
    metrics = step.make_eval_step(CFG, config, mesh)(state, batch)
    return float(metrics['nll']), int(metrics['targets'])

  np.testing.assert_allclose(
    evaluate(_mesh(2, 2, 2)), evaluate(None), rtol=1e-5
  )


def _put(mesh, array, *axes):
  return jax.device_put(array, sharding.place(mesh, axes, array.shape))


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 8, 1), (4, 1, 2)])
@pytest.mark.parametrize(
  'cap, smoothing, tile',
  [(None, 0.0, 2048), (3.0, 0.1, 2048), (3.0, 0.1, None)],
)
def test_the_loss_is_the_one_of_one_device(shape, cap, smoothing, tile):
  """And each device multiplies with its rows of the embedding only."""
  mesh = _mesh(*shape)
  v, d = 1009 * 8, 16
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, L, d)).astype(np.float32)
  embedding = rng.normal(scale=0.3, size=(v, d)).astype(np.float32)
  tokens = rng.integers(0, v, (B, L), np.int32)
  # All targets but one in the first row: devices have unequal work.
  weights = np.zeros((B, L), np.float32)
  weights[0], weights[5, 3] = rng.normal(size=L), 1

  def grad(mesh):
    def value(hidden, embedding, weights):
      return loss.target_nll(
        hidden,
        embedding,
        tokens,
        weights,
        final_softcap=cap,
        smoothing=smoothing,
        chunk=4,
        tile=tile,
        mesh=mesh,
      )

    return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))

  want = grad(None)(hidden, embedding, weights)
  args = (
    _put(mesh, hidden, 'rows', 'length', 'width'),
    _put(mesh, embedding, 'vocab', 'width'),
    _put(mesh, weights, 'rows', 'length'),
  )
  compiled = grad(mesh).lower(*args).compile()
  got = compiled(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  text = compiled.as_text()
  part = v // (shape[1] * shape[2])
  assert f'[{part},' in text
  assert f'[{v},' not in text


@pytest.mark.parametrize('products', ['xla', 'splash'])
@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 4, 1), (2, 1, 4)])
def test_forward_is_the_one_of_one_device(shape, products, monkeypatch):
  """With the products of splash too, whose own kernel no CPU runs on a mesh."""
  params, batch = parameters.init(CFG, jax.random.key(1)), _batch(3)
  mesh, make = _mesh(*shape), fused.make_attend
  monkeypatch.setattr(
    fused,
    'make_attend',
    lambda cfg, _, segments, mesh: make(cfg, 'xla', segments, mesh),
  )

  def forward(params, batch, mesh):
    rows = [batch[n] for n in ('tokens', 'positions', 'segment_ids')]
    name = products if mesh is not None else 'xla'
    return model.forward(CFG, params, *rows, mesh=mesh, implementation=name)

  want = jax.jit(functools.partial(forward, mesh=None))(params, batch)
  flat = parameters.flatten(params)
  placed = sharding.put(flat, sharding.of_tree(CFG, mesh, flat))
  got = jax.jit(functools.partial(forward, mesh=mesh))(
    parameters.unflatten(placed), sharding.put_rows(mesh, batch, B)
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'shape', [(2, 2, 2), (1, 8, 1), (1, 1, 4), (2, 1, 1), (8, 1, 1)]
)
@pytest.mark.parametrize('v', [96, 91])
def test_gradient_of_the_look_up_is_the_one_of_one_device(shape, v):
  """A vocabulary of 91 = 7 * 13 stays whole."""
  mesh, rng = _mesh(*shape), np.random.default_rng(0)
  before = rng.normal(size=(v, 6)).astype(np.float32)
  d_x = rng.normal(size=(B, L, 6)).astype(np.float32)
  tokens = rng.integers(0, v, (B, L)).astype(np.int32)
  want = before.copy()
  np.add.at(want, tokens, d_x * 6**0.5)
  args = (
    _put(mesh, before, 'vocab', 'width'),
    _put(mesh, tokens, 'rows', 'length'),
    _put(mesh, d_x, 'rows', 'length', 'width'),
  )
  got = jax.jit(functools.partial(embedding.add_grad, mesh=mesh))(*args)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert got.sharding.is_equivalent_to(args[0].sharding, 2)


@pytest.mark.parametrize(
  'shape, words',
  [
    ((-1, -1, 1), ('(-1, -1, 1)', 'at most one')),
    ((-1, 3, 1), ('3', '8 devices')),
    ((4, 4, 1), ('16 devices', '8 are here')),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, words):
  refusal(lambda: _mesh(*shape), 'mesh.data', *words)


def test_what_is_left_and_what_is_not_used():
  assert dict(_mesh(-1, 2, 2).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert dict(_mesh(2, -1, 1).shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert _mesh(1, 2, 1).size == 2
  assert _mesh(1, 1, 1) is None


def test_what_is_made_on_the_host_is_there():
  made = sharding.on_host(lambda: jnp.ones(3))
  assert made.devices() == {jax.local_devices(backend='cpu')[0]}


def test_rows_of_a_process():
  """All of them in one process, whatever the mesh."""
  for shape in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
    np.testing.assert_array_equal(
      sharding.own_rows(_mesh(*shape), 16), np.arange(16)
    )


def test_rows_that_do_not_divide_are_refused():
  mesh = _mesh(2, 2, 2)
  for batch_size, micro_batches in ((8, 1), (8, 2), (16, 4)):
    sharding.check_rows(mesh, batch_size, micro_batches)
  refusal(lambda: sharding.check_rows(mesh, 6, 1), 'train.batch_size', '6', '4')
  refusal(
    lambda: sharding.check_rows(mesh, 12, 2), 'train.micro_batches', '12', '8'
  )
  sharding.check_rows(None, 12, 2)


@pytest.mark.heavy
def test_a_run_on_a_mesh_goes_on_from_a_run_on_one(debug_config, tmp_path):
  """Two steps on one device, two on eight: the losses of four on one."""
  debug_config.train.batch_size = 4
  debug_config.eval.every = debug_config.checkpoint.every = 2
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path / 'whole')
  debug_config.train.max_steps = 2
  run_lib.run(debug_config, tmp_path / 'moved')
  debug_config.train.max_steps = 4
  debug_config.mesh.update(data=2, fsdp=2, tensor=2)
  run_lib.run(debug_config, tmp_path / 'moved')

  def losses(folder):
    lines = (tmp_path / folder / 'metrics.jsonl').read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    return [x.get('loss', x.get('valid_loss')) for x in lines]

  assert len(losses('whole')) == 4 + 3
  np.testing.assert_allclose(losses('moved'), losses('whole'), rtol=1e-5)
  for folder in ('whole', 'moved'):
    assert (tmp_path / folder / 'scores.json').exists()
