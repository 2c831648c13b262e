"""The optimizer, the state, and what a jitted step does with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from mt.gemma import loss
from mt.train import optimizer as optimizer_lib
from mt.train import step
from tests.fixtures.tiny_step import CFG
from tests.fixtures.tiny_step import make_batch
from tests.fixtures.tiny_step import setup

# Most of the time is compiling.
pytestmark = pytest.mark.usefixtures('quick_compilation')


def _copy(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


@functools.cache
def _reference():
  """Mean negative log-likelihood of all weights, and its gradient."""
  train = debug.get_config().train
  train.parts = 'all'

  @jax.jit
  @jax.value_and_grad
  def reference(params, batch):
    params = step.model_params(train, params, {})
    return step.batch_nll(CFG, params, batch, train) / jnp.sum(
      batch['target_mask']
    )

  return reference


def _mean_nll(params, batch):
  return float(_reference()(params, batch)[0])


def _gradients(params, batch):
  return _reference()(params, batch)[1]


def test_sgd_step_is_the_hand_computed_one():
  config, optimizer, state = setup(name='sgd', learning_rate=0.1, clip_norm=0.0)
  batch = make_batch()
  grads = _gradients(state.trained, batch)
  want = jax.tree.map(lambda p, g: np.array(p - 0.1 * g), state.trained, grads)
  norm = float(optax.tree.norm(grads))
  new, metrics = step.make_train_step(CFG, config, optimizer)(state, batch)
  for name, value in want.items():
    np.testing.assert_allclose(new.trained[name], value, rtol=1e-5, atol=1e-7)
  assert int(new.step) == 1
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  assert int(metrics['targets']) == batch['target_mask'].sum()
  assert int(metrics['tokens']) == batch['segment_ids'].sum()


def test_labels_are_smoothed_in_training_alone():
  config, optimizer, state = setup(train={'label_smoothing': 0.3})
  batch = make_batch()
  plain = _mean_nll(state.trained, batch) * batch['target_mask'].sum()
  params = step.model_params(config.train, state.trained, {})
  smooth = step.batch_nll(CFG, params, batch, config.train, smoothing=0.3)
  assert abs(float(smooth - plain)) > 0.1
  seen = step.make_eval_step(CFG, config)(state, batch)['nll']
  np.testing.assert_allclose(seen, plain, rtol=1e-6)
  _, metrics = step.make_train_step(CFG, config, optimizer)(state, batch)
  np.testing.assert_allclose(metrics['nll'], smooth, rtol=1e-6)


def test_clipping_scales_the_step_to_the_norm():
  config, optimizer, state = setup(
    name='sgd', learning_rate=1.0, clip_norm=0.01
  )
  old = _copy(state.trained)
  new, metrics = step.make_train_step(CFG, config, optimizer)(
    state, make_batch()
  )
  assert float(metrics['grad_norm']) > 0.01
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, new.trained, old))
  assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_adamw_is_optax_with_decay_on_matrices_only():
  config, optimizer, state = setup(
    learning_rate=1e-2, weight_decay=0.3, clip_norm=0.0
  )
  batch = make_batch()
  old = _copy(state.trained)
  grads = _gradients(state.trained, batch)
  new, _ = step.make_train_step(CFG, config, optimizer)(state, batch)
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
    made = optimizer_lib.make_schedule(optim, 14)
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
def test_only_the_trained_part_moves(parts):
  config, optimizer, state = setup(parts)
  trained, frozen = _copy(state.trained), _copy(state.frozen)
  train_step = step.make_train_step(CFG, config, optimizer)
  for seed in (0, 1):  # LoRA's A moves from the second step on.
    state, _ = train_step(state, make_batch(seed))
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
  config, optimizer, state = setup()
  train_step = step.make_train_step(CFG, config, optimizer)
  state, _ = train_step(state, make_batch(l=20))
  state, _ = train_step(state, make_batch(1, l=20))
  with pytest.raises(AssertionError, match='trace'):
    train_step(state, make_batch(l=24))


def test_every_row_counts():
  """The tutorial's loss reads row 0 only."""
  config, _, state = setup()
  eval_step = step.make_eval_step(CFG, config)
  batch = make_batch()
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
  config, optimizer, state = setup(name='sgd')
  old = _copy(state.trained)
  batch = make_batch()
  batch['target_mask'] = np.zeros_like(batch['target_mask'])
  new, metrics = step.make_train_step(CFG, config, optimizer)(state, batch)
  assert float(metrics['nll']) == 0 and int(metrics['targets']) == 0
  for name, value in old.items():
    np.testing.assert_array_equal(new.trained[name], value)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_bfloat16_keeps_a_float32_state(remat):
  config, optimizer, state = setup()
  config.train.dtype, config.train.remat = 'bfloat16', remat
  exact = _mean_nll(state.trained, make_batch())
  new, metrics = step.make_train_step(CFG, config, optimizer)(
    state, make_batch()
  )
  assert all(x.dtype == jnp.float32 for x in new.trained.values())
  loss = float(metrics['nll']) / float(metrics['targets'])
  assert loss == pytest.approx(exact, rel=2e-2)
  assert loss != exact


def test_training_learns():
  config, optimizer, state = setup('lora', learning_rate=3e-2)
  train_step = step.make_train_step(CFG, config, optimizer)
  losses = []
  for _ in range(30):
    state, metrics = train_step(state, make_batch())
    losses.append(float(metrics['nll']))
  assert losses[-1] < 0.5 * losses[0]


def _run(config, optimizer, state, batches):
  train_step = step.make_train_step(CFG, config, optimizer)
  for batch in batches:
    state, metrics = train_step(state, batch)
  return state, metrics


def _assert_near(got, want):
  """To 1e-6 as a whole; in a norm's few numbers large terms cancel."""
  square = {'error': 0.0, 'value': 0.0}
  for name, value in want.items():
    error = np.linalg.norm(np.asarray(got[name]) - np.asarray(value))
    assert error <= 2e-6 * np.linalg.norm(value), name
    square['error'] += error**2
    square['value'] += np.linalg.norm(value) ** 2
  assert square['error'] <= 1e-12 * square['value']


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

  def gradients(number):
    config, _, state = setup(parts, {'micro_batches': number})
    compiled = jax.jit(functools.partial(step.gradients, CFG, config.train))
    return compiled(state.trained, state.frozen, batch)

  sgd = {'name': 'sgd', 'learning_rate': 0.1}
  grads, nll = gradients(1)
  want, want_metrics = _run(*setup(parts, **sgd), [batch])
  got_grads, got_nll = gradients(3)
  assert float(got_nll) == pytest.approx(float(nll), rel=1e-6)
  _assert_near(got_grads, grads)
  got, metrics = _run(*setup(parts, {'micro_batches': 3}, **sgd), [batch])
  for name, value in want.trained.items():
    np.testing.assert_allclose(got.trained[name], value, atol=1e-7)
  for key in ('nll', 'grad_norm', 'targets', 'tokens'):
    assert float(metrics[key]) == pytest.approx(
      float(want_metrics[key]), rel=1e-6
    ), key


@pytest.mark.parametrize(
  'parts, dtype',
  [
    ('lora', 'bfloat16'),
    ('layers/(q|v)', 'float32'),
    pytest.param('lora', 'float32', marks=pytest.mark.heavy),
    pytest.param('layers/(q|v)', 'bfloat16', marks=pytest.mark.heavy),
  ],
)
def test_frozen_weights_may_be_bfloat16(parts, dtype):
  config, optimizer, state = setup(
    parts, {'frozen_dtype': 'bfloat16', 'dtype': dtype}
  )
  exact = _mean_nll(setup()[2].trained, make_batch())
  new, metrics = _run(config, optimizer, state, [make_batch(), make_batch()])
  assert {x.dtype for x in new.frozen.values()} == {jnp.dtype('bfloat16')}
  floats = [
    x
    for x in jax.tree.leaves((new.trained, new.opt_state))
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  assert {x.dtype for x in floats} == {jnp.dtype('float32')}
  assert float(metrics['nll']) / float(metrics['targets']) < exact


def test_adafactor_is_optax_and_small():
  config, optimizer, state = setup(
    name='adafactor', learning_rate=1e-2, clip_norm=0.0
  )
  batch = make_batch()
  old = _copy(state.trained)
  grads = _gradients(state.trained, batch)
  new, _ = _run(config, optimizer, state, [batch])
  for name in ('layers/q', 'final_norm'):
    g, p = np.array(grads[name]), old[name]
    # Step 1: the average is the square itself (decay 1 - 1^-0.8 = 0), nothing
    # is factored below 128 columns, so the update is g / |g| with RMS 1, times
    # the RMS of the weights (1e-3 at least).
    scale = max(1e-3, np.sqrt(np.mean(p**2)))
    want = p - 1e-2 * scale * np.sign(g)
    sure = np.abs(g) > 1e-6
    assert sure.mean() > 0.2
    np.testing.assert_allclose(
      np.array(new.trained[name])[sure], want[sure], rtol=1e-3, atol=1e-6
    )
  # Rows and columns instead of a number for each weight.
  shapes = {'w': jnp.zeros((3, 256, 512))}
  numbers = sum(x.size for x in jax.tree.leaves(optimizer.init(shapes)))
  assert numbers < 0.01 * 3 * 256 * 512


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
    nll = real(hidden, embedding, tokens, *args, **kwargs)
    here = jnp.any(tokens == 95)
    if bad == 'loss':
      return jnp.where(here, jnp.inf, nll)
    return _with_gradient(nll, jnp.where(here, jnp.nan, 1.0))

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
  assert step.all_finite(state)
  for part in ('trained', 'opt_state', 'ema'):
    leaves, treedef = jax.tree.flatten(getattr(state, part))
    at = next(i for i, x in enumerate(leaves) if x.ndim == 3)
    leaves[at] = leaves[at].at[-1, -1, -1].set(jnp.nan)
    bad = dataclasses.replace(state, **{part: treedef.unflatten(leaves)})
    assert not step.all_finite(bad), part
