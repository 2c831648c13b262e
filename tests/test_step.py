"""The optimizer, the state, and what a jitted step does with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from mt import model
from mt import sizes
from mt import step

CFG = dataclasses.replace(sizes.SIZES['debug'], num_layers=2, vocab_size=96)


def _batch(seed=0, b=3, l=20):
  rng = np.random.default_rng(seed)
  lengths = np.array([l, l - 4, l - 9])[:b]
  at = np.arange(l)
  inside = at < lengths[:, None]
  return {
    'tokens': rng.integers(3, 96, (b, l)).astype(np.int32),
    'positions': np.where(inside, at, 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'target_mask': inside & (at >= 6),
  }


def _setup(parts='all', **optim):
  config = debug.get_config()
  config.train.parts, config.train.lora_rank = parts, 4
  config.optim.update(optim)
  optimizer = step.make_optimizer(config.optim, config.train.max_steps)
  params = model.init_params(CFG, jax.random.key(1))
  state = step.init_state(params, config.train, optimizer, jax.random.key(2))
  return config, optimizer, state


def _copy(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


def _mean_nll(config, trained, frozen, batch):
  params = step.model_params(config.train, trained, frozen)
  nll = step.batch_nll(CFG, params, batch, config.train)
  return nll / batch['target_mask'].sum()


def test_sgd_step_is_the_hand_computed_one():
  config, optimizer, state = _setup(
    name='sgd', learning_rate=0.1, clip_norm=0.0
  )
  batch = _batch()
  grads = jax.grad(lambda t: _mean_nll(config, t, {}, batch))(state.trained)
  want = jax.tree.map(lambda p, g: np.array(p - 0.1 * g), state.trained, grads)
  norm = float(optax.tree.norm(grads))
  new, metrics = step.make_train_step(CFG, config.train, optimizer)(
    state, batch
  )
  for name, value in want.items():
    np.testing.assert_allclose(new.trained[name], value, rtol=1e-5, atol=1e-7)
  assert int(new.step) == 1
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  assert int(metrics['targets']) == batch['target_mask'].sum()
  assert int(metrics['tokens']) == batch['segment_ids'].sum()


def test_clipping_scales_the_step_to_the_norm():
  config, optimizer, state = _setup(
    name='sgd', learning_rate=1.0, clip_norm=0.01
  )
  old = _copy(state.trained)
  new, metrics = step.make_train_step(CFG, config.train, optimizer)(
    state, _batch()
  )
  assert float(metrics['grad_norm']) > 0.01
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, new.trained, old))
  assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_adamw_is_optax_with_decay_on_matrices_only():
  config, optimizer, state = _setup(
    learning_rate=1e-2, weight_decay=0.3, clip_norm=0.0
  )
  batch = _batch()
  old = _copy(state.trained)
  grads = jax.grad(lambda t: _mean_nll(config, t, {}, batch))(state.trained)
  new, _ = step.make_train_step(CFG, config.train, optimizer)(state, batch)
  for name, p in old.items():
    g = np.array(grads[name])
    # Step 1 of Adam: both averages are unbiased to g and g^2.
    want = p - 1e-2 * g / (np.abs(g) + 1e-8)
    if 'norm' not in name:
      want -= 1e-2 * 0.3 * p
    # Where g is about epsilon, its rounding decides the sign.
    sure = np.abs(g) > 1e-6
    assert sure.mean() > 0.2
    np.testing.assert_allclose(
      np.array(new.trained[name])[sure], want[sure], rtol=1e-4, atol=1e-5
    )


def test_schedules():
  optim = debug.get_config().optim
  optim.learning_rate, optim.warmup_steps = 1.0, 4

  def rates(schedule):
    optim.schedule = schedule
    made = step.make_schedule(optim, 14)
    return [float(made(i)) for i in range(14)]

  for name in ('constant', 'linear', 'cosine'):
    np.testing.assert_allclose(rates(name)[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
  assert rates('constant')[5:] == [1.0] * 9
  np.testing.assert_allclose(
    rates('linear')[4:], 1 - np.arange(10) / 10, rtol=1e-6
  )
  np.testing.assert_allclose(
    rates('cosine')[4:], (1 + np.cos(np.pi * np.arange(10) / 10)) / 2, atol=1e-6
  )


@pytest.mark.parametrize('parts', ['all', 'blocks', 'lora'])
def test_state_is_donated_and_aliased(parts):
  config, optimizer, state = _setup(parts)
  compiled = (
    step.make_train_step(CFG, config.train, optimizer)
    .lower(state, _batch())
    .compile()
  )
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == size
  leaves = jax.tree.leaves(state)
  new, _ = step.make_train_step(CFG, config.train, optimizer)(state, _batch())
  assert all(x.is_deleted() for x in leaves)
  assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@pytest.mark.parametrize('parts', ['all', 'blocks', 'lora'])
def test_only_the_trained_part_moves(parts):
  config, optimizer, state = _setup(parts)
  trained, frozen = _copy(state.trained), _copy(state.frozen)
  train_step = step.make_train_step(CFG, config.train, optimizer)
  for seed in (0, 1):  # LoRA's A moves from the second step on.
    state, _ = train_step(state, _batch(seed))
  for name, old in frozen.items():
    np.testing.assert_array_equal(state.frozen[name], old)
  for name, old in trained.items():
    assert not np.array_equal(state.trained[name], old), name
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  # Adam's two averages, of the trained part alone.
  assert sum(x.size for x in moments) == 2 * sum(
    x.size for x in trained.values()
  )


def test_a_second_shape_is_refused():
  config, optimizer, state = _setup()
  train_step = step.make_train_step(CFG, config.train, optimizer)
  state, _ = train_step(state, _batch(l=20))
  state, _ = train_step(state, _batch(1, l=20))
  with pytest.raises(AssertionError, match='trace'):
    train_step(state, _batch(l=24))


def test_every_row_counts():
  """The tutorial's loss reads row 0 only."""
  config, _, state = _setup()
  eval_step = step.make_eval_step(CFG, config.train)
  batch = _batch()
  rows = []
  for i in range(3):
    mask = np.zeros_like(batch['target_mask'])
    mask[i] = batch['target_mask'][i]
    rows.append(eval_step(state, batch | {'target_mask': mask}))
  whole = eval_step(state, batch)
  assert all(float(r['nll']) > 0 for r in rows)
  for key in ('nll', 'targets'):
    total = sum(float(r[key]) for r in rows)
    assert float(whole[key]) == pytest.approx(total, rel=1e-6)


def test_a_batch_without_targets_changes_nothing():
  config, optimizer, state = _setup(name='sgd')
  old = _copy(state.trained)
  batch = _batch()
  batch['target_mask'] = np.zeros_like(batch['target_mask'])
  new, metrics = step.make_train_step(CFG, config.train, optimizer)(
    state, batch
  )
  assert float(metrics['nll']) == 0 and int(metrics['targets']) == 0
  for name, value in old.items():
    np.testing.assert_array_equal(new.trained[name], value)


@pytest.mark.parametrize('remat', [False, True])
def test_bfloat16_keeps_a_float32_state(remat):
  config, optimizer, state = _setup()
  config.train.dtype, config.train.remat = 'bfloat16', remat
  exact = float(_mean_nll(debug.get_config(), state.trained, {}, _batch()))
  new, metrics = step.make_train_step(CFG, config.train, optimizer)(
    state, _batch()
  )
  assert all(x.dtype == jnp.float32 for x in new.trained.values())
  loss = float(metrics['nll']) / float(metrics['targets'])
  assert loss == pytest.approx(exact, rel=2e-2)
  assert loss != exact


def test_training_learns():
  config, optimizer, state = _setup('lora', learning_rate=3e-2)
  train_step = step.make_train_step(CFG, config.train, optimizer)
  losses = []
  for _ in range(30):
    state, metrics = train_step(state, _batch())
    losses.append(float(metrics['nll']))
  assert losses[-1] < 0.5 * losses[0]
