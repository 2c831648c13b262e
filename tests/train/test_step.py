"""The optimizer, the state, and what a jitted step does with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from configs import default
from mt.gemma import loss
from mt.gemma import model
from mt.gemma import parameters
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import step
from tests.fixtures.tiny_step import CFG
from tests.fixtures.tiny_step import make_batch
from tests.fixtures.tiny_step import make_config
from tests.fixtures.tiny_step import setup


def _copy(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


@functools.cache
def _reference(smoothing=0.0):
  """The naive mean of all weights, and autodiff's gradient: embedding tied."""

  @jax.jit
  @jax.value_and_grad
  def reference(flat, batch):
    params = parameters.unflatten(flat)
    names = 'tokens', 'positions', 'segment_ids'
    hidden = model.forward(CFG, params, *(batch[n] for n in names))
    weights = batch['target_mask'] / jnp.sum(batch['target_mask'])
    embedding, tokens = params['embedding'], batch['tokens']
    return loss.reference_nll(
      hidden, embedding, tokens, weights, smoothing=smoothing
    )[0]

  return reference


def _mean_nll(params, batch):
  return float(_reference()(params, batch)[0])


def _gradients(parts='all', batch=None, **train):
  """(gradients, nll, all weights) of the tiny model before its first step."""
  config, _, state = setup(parts, train)
  run = functools.partial(step.accumulated_gradients, CFG, config.train)
  grads, nll = jax.jit(run)(
    state.trained, state.frozen, make_batch() if batch is None else batch
  )
  return grads, float(nll), state.frozen | state.trained


def test_sgd_step_is_the_hand_computed_one():
  """Gradients are scaled to a norm of 0.01; no target, no step."""
  config, optimizer, state = setup(
    name='sgd', learning_rate=0.1, clip_norm=0.01
  )
  batch = make_batch()
  _, grads = _reference()(state.trained, batch)
  norm = float(optax.tree.norm(grads))
  assert norm > 0.01
  want = jax.tree.map(
    lambda p, g: np.array(p - 0.1 * 0.01 / norm * g), state.trained, grads
  )
  train_step = step.make_train_step(CFG, config, optimizer)
  new, metrics = train_step(state, batch)
  for name, value in want.items():
    np.testing.assert_allclose(new.trained[name], value, rtol=1e-5, atol=1e-7)
  assert int(new.step) == 1
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  assert int(metrics['targets']) == batch['target_mask'].sum()
  assert int(metrics['tokens']) == batch['segment_ids'].sum()

  old = _copy(new.trained)
  batch['target_mask'] = np.zeros_like(batch['target_mask'])
  new, metrics = train_step(new, batch)
  assert float(metrics['nll']) == 0 and int(metrics['targets']) == 0
  jax.tree.map(np.testing.assert_array_equal, new.trained, old)
  assert int(new.step) == 2 and int(new.skipped) == 0
  # It was traced once; another shape would be compiled anew.
  with pytest.raises(AssertionError, match='trace'):
    train_step(new, make_batch(l=24))


@pytest.mark.parametrize('parts', ['blocks', 'layers/(q|.*norm)|embedding'])
def test_gradients_of_a_part_are_autodiffs(parts):
  """Of all weights it is the SGD step; of LoRA, tests/gemma/test_lora.py."""
  batch = make_batch()
  grads, nll, params = _gradients(parts, batch)
  mean, want = _reference()(params, batch)
  assert nll == pytest.approx(
    float(mean) * batch['target_mask'].sum(), rel=1e-6
  )
  _assert_near(grads, {name: want[name] for name in grads}, 1e-5)
  assert 0 < len(grads) < len(want)


def test_labels_are_smoothed_in_training_alone():
  """And every row counts: the tutorial's loss reads row 0 only."""
  batch = make_batch()
  grads, nll, params = _gradients('all', batch, label_smoothing=0.3)
  mean, want = _reference(0.3)(params, batch)
  targets = batch['target_mask'].sum()
  assert nll == pytest.approx(float(mean) * targets, rel=1e-6)
  _assert_near(grads, want, 1e-5)
  config, _, state = setup(train={'label_smoothing': 0.3})
  eval_step = step.make_eval_step(CFG, config)
  whole = eval_step(state, batch)
  plain = _mean_nll(params, batch) * targets
  assert float(whole['nll']) == pytest.approx(plain, rel=1e-6)
  assert abs(plain - nll) > 0.1
  rows = []
  for i in range(3):
    mask = np.zeros_like(batch['target_mask'])
    mask[i] = batch['target_mask'][i]
    rows.append(eval_step(state, batch | {'target_mask': mask}))
  assert all(float(r['nll']) > 0 for r in rows)
  for key in ('nll', 'targets'):
    total = sum(float(r[key]) for r in rows)
    assert float(whole[key]) == pytest.approx(total, rel=1e-6)


def _first_update(name, **optim):
  """(updates, weights, gradients) of an optimizer's first step, clip aside."""
  optim = make_config(name=name, learning_rate=1e-2, **optim).optim
  optimizer, rng = (
    optimizer_lib.make_optimizer(optim, 20),
    np.random.default_rng,
  )
  shapes = {'layers/q': (2, 5, 7), 'final_norm': (5,)}
  params, grads = (
    {k: rng(seed).normal(size=v).astype(np.float32) for k, v in shapes.items()}
    for seed in (0, 1)
  )

  @jax.jit
  def first(params, grads):
    return optimizer.update(grads, optimizer.init(params), params)[0]

  return first(params, grads), params, grads


def test_adamw_is_optax_with_decay_on_matrices_only():
  updates, params, grads = _first_update('adamw', weight_decay=0.3)
  for name, p in params.items():
    g = grads[name]
    # Step 1 of Adam: both averages are unbiased to g and g^2.
    want = -1e-2 * g / (np.abs(g) + 1e-8)
    if 'norm' not in name:
      want -= 1e-2 * 0.3 * p
    np.testing.assert_allclose(updates[name], want, rtol=1e-4)


def test_adafactor_is_optax_and_small():
  updates, params, grads = _first_update('adafactor')
  for name, p in params.items():
    # Step 1: the average is the square itself (decay 1 - 1^-0.8 = 0), nothing
    # is factored below 128 columns, so the update is g / |g| with RMS 1, times
    # the RMS of the weights (1e-3 at least).
    want = -1e-2 * np.sqrt(np.mean(p**2)) * np.sign(grads[name])
    np.testing.assert_allclose(updates[name], want, rtol=1e-3)
  # Rows and columns instead of a number for each weight.
  shapes = {'w': jax.ShapeDtypeStruct((3, 256, 512), jnp.float32)}
  optim = make_config(name='adafactor').optim
  state = jax.eval_shape(optimizer_lib.make_optimizer(optim, 20).init, shapes)
  numbers = sum(x.size for x in jax.tree.leaves(state))
  assert numbers < 0.01 * 3 * 256 * 512


def test_schedules():
  optim = debug.get_config().optim
  optim.learning_rate, optim.warmup_steps = 1.0, 4

  def rates(schedule):
    optim.schedule = schedule
    made = optimizer_lib.make_schedule(optim, 14)
    return [float(made(i)) for i in range(14)]

  for name in default.SCHEDULES:
    np.testing.assert_allclose(rates(name)[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
  assert rates('constant')[5:] == [1.0] * 9
  np.testing.assert_allclose(
    rates('linear')[4:], 1 - np.arange(10) / 10, rtol=1e-6
  )
  np.testing.assert_allclose(
    rates('cosine')[4:], (1 + np.cos(np.pi * np.arange(10) / 10)) / 2, atol=1e-6
  )


def test_training_learns_and_only_the_trained_part_moves():
  config, optimizer, state = setup('lora', learning_rate=3e-2)
  trained, frozen = _copy(state.trained), _copy(state.frozen)
  train_step = step.make_train_step(CFG, config, optimizer)
  losses = []
  for _ in range(30):
    state, metrics = train_step(state, make_batch())
    losses.append(float(metrics['nll']))
  assert losses[-1] < 0.5 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
  for name, old in trained.items():
    assert not np.array_equal(state.trained[name], old), name
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  # Adam's two averages, of the trained part alone.
  size = sum(x.size for x in trained.values())
  assert sum(x.size for x in moments) == 2 * size


def _assert_near(got, want, tolerance=2e-6):
  """By the norm of each; as a whole closer, where fewer terms cancel."""
  square = {'error': 0.0, 'value': 0.0}
  for name, value in want.items():
    error = np.linalg.norm(np.asarray(got[name]) - np.asarray(value))
    assert error <= tolerance * np.linalg.norm(value), name
    square['error'] += error**2
    square['value'] += np.linalg.norm(value) ** 2
  assert square['error'] <= (tolerance / 2) ** 2 * square['value']


@pytest.mark.parametrize(
  'parts', ['all', pytest.param('lora', marks=pytest.mark.heavy)]
)
def test_micro_batches_are_the_one_large_batch(parts):
  """Rows of 1, 14, 0, 3, 6, 2 targets: means of means would be far off."""
  batch = make_batch()
  batch = {k: np.concatenate([v, v[::-1]]) for k, v in batch.items()}
  batch['tokens'] = make_batch(7, b=3)['tokens'].repeat(2, 0)
  mask = np.zeros_like(batch['target_mask'])
  for row, count in enumerate((1, 14, 0, 3, 6, 2)):
    mask[row, 3 : 3 + count] = True
  batch['target_mask'] = mask

  want, want_nll, _ = _gradients(parts, batch)
  got, nll, _ = _gradients(parts, batch, micro_batches=3)
  assert nll == pytest.approx(want_nll, rel=1e-6)
  _assert_near(got, want)


@pytest.mark.parametrize(
  'parts, remat',
  [
    ('all', 'full'),
    ('lora', 'none'),
    pytest.param('layers/(q|v)', 'dots', marks=pytest.mark.heavy),
  ],
)
def test_bfloat16_keeps_a_float32_state(parts, remat):
  """Of activations and frozen weights."""
  both = {'frozen_dtype': 'bfloat16', 'dtype': 'bfloat16'}
  config, optimizer, state = setup(parts, both | {'remat': remat})
  exact = _mean_nll(setup()[2].trained, make_batch())
  train_step = step.make_train_step(CFG, config, optimizer)
  means = []
  for _ in range(2):
    state, metrics = train_step(state, make_batch())
    means.append(float(metrics['nll']) / float(metrics['targets']))
  assert means[0] == pytest.approx(exact, rel=2e-2) and means[0] != exact
  assert means[1] < means[0]
  frozen = {x.dtype for x in state.frozen.values()}
  assert frozen == ({jnp.dtype('bfloat16')} if parts != 'all' else set())
  leaves = jax.tree.leaves((state.trained, state.opt_state))
  floats = {x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
  assert floats == {jnp.dtype('float32')}


@pytest.mark.parametrize('largest', [0.0, 0.3, 30.0])
def test_clip_is_the_one_of_optax(largest):
  grads = {'a': jnp.arange(5.0), 'b': -jnp.ones((2, 3))}
  norm = optax.tree.norm(grads)
  got = optimizer_lib.clip(grads, norm, largest)
  want = grads
  if largest:
    want, _ = optax.clip_by_global_norm(largest).update(grads, None)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-6)


def test_ema_is_the_hand_computed_one():
  config, optimizer, state = setup(ema_decay=0.75, learning_rate=1e-2)
  want = _copy(state.trained)
  train_step = step.make_train_step(CFG, config, optimizer)
  for seed in range(3):
    state, _ = train_step(state, make_batch(seed))
    want = {k: 0.75 * v + 0.25 * state.trained[k] for k, v in want.items()}
  for name, value in want.items():
    np.testing.assert_allclose(state.ema[name], value, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(state.ema[name], state.trained[name])
  # It is what is evaluated.
  got = step.make_eval_step(CFG, config)(state, make_batch())
  mean = float(got['nll']) / float(got['targets'])
  of_ema = _mean_nll(want, make_batch())
  assert mean == pytest.approx(of_ema, rel=1e-5)
  of_trained = _mean_nll(state.trained, make_batch())
  assert abs(of_ema - of_trained) > 1e-3


@jax.custom_vjp
def _with_gradient(x, gradient):
  del gradient
  return x


_with_gradient.defvjp(lambda x, g: (x, g), lambda g, upper: (upper * g, None))


@pytest.mark.parametrize(
  'name, bad',
  [
    ('adamw', 'gradient'),
    ('sgd', 'loss'),
    pytest.param('adamw', 'loss', marks=pytest.mark.heavy),
    pytest.param('sgd', 'gradient', marks=pytest.mark.heavy),
    pytest.param('adafactor', 'loss', marks=pytest.mark.heavy),
    pytest.param('adafactor', 'gradient', marks=pytest.mark.heavy),
  ],
)
def test_a_step_that_is_not_finite_is_skipped(name, bad, monkeypatch):
  config, optimizer, state = setup(name=name, ema_decay=0.5)
  # A row with one token more than the rest becomes the poisoned one.
  real = loss.target_nll

  def poisoned(hidden, embedding, tokens, *args, **kwargs):
    total, nll = real(hidden, embedding, tokens, *args, **kwargs)
    here = jnp.any(tokens == 95)
    if bad == 'loss':
      return total, jnp.where(here, jnp.inf, nll)
    return _with_gradient(total, jnp.where(here, jnp.nan, 1.0)), nll

  monkeypatch.setattr(loss, 'target_nll', poisoned)
  good = [make_batch(seed) for seed in range(3)]
  for batch in good:
    batch['tokens'][batch['tokens'] == 95] = 94
  evil = make_batch(9)
  evil['tokens'][0, 0] = 95
  train_step = step.make_train_step(CFG, config, optimizer)
  state, metrics = train_step(state, good[0])
  assert int(metrics['skipped']) == 0
  before = _copy(state)
  for count in (1, 2):
    state, metrics = train_step(state, evil)
    assert int(metrics['skipped']) == count
    assert int(metrics['skipped_in_a_row']) == count
  assert int(state.step) == 3
  after = dataclasses.replace(
    state, **{k: getattr(before, k) for k in ('step', 'skipped')}
  )
  after = dataclasses.replace(after, skipped_in_a_row=np.int32(0))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  # As if it had not been: the next good step is the second good one.
  state, metrics = train_step(state, good[1])
  assert int(metrics['skipped']) == 2 and int(metrics['skipped_in_a_row']) == 0
  other = setup(name=name, ema_decay=0.5)[2]
  for batch in good[:2]:
    other, _ = train_step(other, batch)
  for part in ('trained', 'opt_state', 'ema'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(state, part), getattr(other, part)
    )


def test_all_finite_looks_at_everything():
  *_, state = setup(ema_decay=0.5)
  assert state_lib.all_finite(state)
  for part in ('trained', 'opt_state', 'ema'):
    leaves, treedef = jax.tree.flatten(getattr(state, part))
    at = next(i for i, x in enumerate(leaves) if x.ndim == 3)
    leaves[at] = leaves[at].at[-1, -1, -1].set(jnp.nan)
    bad = dataclasses.replace(state, **{part: treedef.unflatten(leaves)})
    assert not state_lib.all_finite(bad), part
