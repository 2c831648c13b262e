"""What is trained and what is frozen, and the low-rank factors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from tests.fixtures import gemma_oracle
from tests.fixtures.refusal import refusal

CFG = dataclasses.replace(
  gemma_oracle.FAMILIES['gemma3'], num_layers=2, attention='LG'
)
RANK = 3
SCALE = 0.37  # Neither 1 nor its own square: alpha / rank applied once.
KEY = jax.random.key(11)
MATRICES = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')

_TOKENS = np.random.default_rng(3).integers(0, 61, (2, 7), np.int32)
_POSITIONS = np.tile(np.arange(7, dtype=np.int32), (2, 1))
_SEGMENTS = np.ones((2, 7), np.int32)


@functools.cache
def _base(dtype=np.float32):
  return gemma_oracle.random_params(CFG, dtype)


def _partition(parts, base=None, rank=RANK, key=KEY, **on):
  return lora.partition(CFG, base or _base(), parts, rank=rank, key=key, **on)


def _lora(base=None):
  return _partition('lora', base)


def _with_random_b(trained):
  rng = np.random.default_rng(1)
  return {
    k: jnp.asarray(rng.normal(size=v.shape), jnp.float32)
    if k.endswith('_lora_b')
    else v
    for k, v in trained.items()
  }


@jax.jit
def _forward(params):
  return model.forward(CFG, params, _TOKENS, _POSITIONS, _SEGMENTS)


def _loss(params):
  x = model.forward(CFG, params, _TOKENS, _POSITIONS, _SEGMENTS)
  return jnp.sum(x**3)


@functools.cache
def _gradients_of_factors():
  def loss(trained, frozen):
    return _loss(lora.merge(trained, frozen, lora_scale=SCALE))

  return jax.jit(jax.grad(loss))


def _merged_by_hand(trained, base, scale):
  """W + scale * A B for every matrix, one layer at a time, in float64."""
  layers = dict(base['layers'])
  for name in MATRICES:
    a = np.float64(trained[f'layers/{name}_lora_a'])
    b = np.float64(trained[f'layers/{name}_lora_b'])
    w = np.float64(layers[name])
    merged = [w[n] + scale * (a[n] @ b[n]) for n in range(len(w))]
    layers[name] = jnp.asarray(np.stack(merged), jnp.float32)
  return base | {'layers': layers}


def _relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  assert np.linalg.norm(want) > 0, 'nothing to compare'
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def _paths(params):
  return set(parameters.flatten(params))


@pytest.mark.parametrize('mode', ['all', 'blocks', 'lora', 'layers/(q|v)'])
def test_parts_are_disjoint_and_complete(mode):
  base = _base()
  trained, frozen = _partition(mode)
  assert not set(trained) & set(frozen)
  joined = lora.merge(trained, frozen, lora_scale=SCALE)
  factors = {k for k in trained if '_lora_' in k}
  assert set(trained) | set(frozen) == _paths(base) | factors == _paths(joined)
  if mode == 'lora':
    assert set(trained) == factors and len(factors) == 2 * 7
  else:
    assert not factors
  # Joining gives back the very numbers.
  back = parameters.flatten(joined)
  for path, leaf in parameters.flatten(base).items():
    np.testing.assert_array_equal(back[path], leaf)


def test_what_each_mode_trains():
  base = _base()
  everything = _paths(base)
  assert set(_partition('all')[0]) == everything and not _partition('all')[1]
  assert set(_partition('blocks')[0]) == everything - {'embedding'}
  assert set(_partition('blocks')[1]) == {'embedding'}
  assert set(_partition('lora')[1]) == everything


@pytest.mark.parametrize('parts', ['lora ', 'none', 'layers', 'layers/(q'])
def test_parts_that_fit_nothing_are_refused(parts):
  names = ('all', 'lora') if '(' not in parts else ('regular expression',)
  refusal(
    lambda: _partition(parts),
    'train.parts',
    repr(parts),
    *names,
  )


def test_a_pattern_trains_what_it_fits():
  base = _base()
  trained, frozen = _partition(r'layers/(q|.*norm)|final_norm')
  norms = ('attn_norm', 'ffw_norm', 'post_attn_norm', 'post_ffw_norm')
  want = {f'layers/{n}' for n in (*norms, 'q_norm', 'k_norm', 'q')}
  assert set(trained) == want | {'final_norm'}
  assert set(frozen) == _paths(base) - set(trained)


def test_lora_targets_choose_matrices():
  trained, frozen = _partition('lora', matrices='q|v')
  names = {f'layers/{m}_lora_{x}' for m in 'qv' for x in 'ab'}
  assert set(trained) == names and set(frozen) == _paths(_base())
  every, _ = _lora()
  for name in names:  # The choice of the others decides nothing.
    np.testing.assert_array_equal(trained[name], every[name])
  joined = lora.merge(_with_random_b(trained), frozen, lora_scale=SCALE)
  folded = lora.fold(joined)
  assert _relative_error(_forward(folded), _forward(joined)) < 1e-5
  np.testing.assert_array_equal(folded['layers']['k'], frozen['layers/k'])
  refusal(
    lambda: _partition('lora', matrices='w'),
    'train.lora_targets',
    "'w'",
    'gate',
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_factors_fit_their_matrices(dtype):
  base = _base(dtype)
  trained, frozen = _lora(base)
  for name in MATRICES:
    n, fan_in, fan_out = base['layers'][name].shape
    a, b = (trained[f'layers/{name}_lora_{x}'] for x in 'ab')
    assert a.shape == (n, fan_in, RANK) and b.shape == (n, RANK, fan_out)
    # Whatever the base is: small steps would be lost in bfloat16.
    assert a.dtype == b.dtype == jnp.float32
    assert not np.any(b)
    assert np.std(a) == pytest.approx(fan_in**-0.5, rel=0.25)
    assert abs(np.mean(a)) < 0.3 * fan_in**-0.5
  assert {v.dtype for v in frozen.values()} == {jnp.dtype(dtype)}


def test_factors_come_from_the_key():
  first, again = _lora()[0], _lora()[0]
  other, _ = _partition('lora', key=jax.random.key(12))
  for path in first:
    np.testing.assert_array_equal(first[path], again[path])
    if path.endswith('_lora_a'):
      assert not np.array_equal(first[path], other[path])
  # Two matrices of the same shape start from different factors.
  assert not np.array_equal(
    first['layers/gate_lora_a'], first['layers/up_lora_a']
  )
  assert not np.array_equal(
    first['layers/k_lora_a'][0], first['layers/k_lora_a'][1]
  )


def test_lora_starts_from_the_pretrained_function():
  base = _base()
  joined = lora.merge(*_lora(base), lora_scale=SCALE)
  for name in MATRICES:
    layer = {k: v[1] for k, v in joined['layers'].items()}
    assert f'{name}_lora_a' in layer
    x = np.random.default_rng(2).normal(size=(1, 5, layer[name].shape[0]))
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(
      model.dense(layer, name, x), x @ base['layers'][name][1]
    )
  jax.tree.map(np.testing.assert_array_equal, lora.fold(joined), base)
  # As a whole only nearly: two compiled programs round differently.
  assert _relative_error(_forward(joined), _forward(base)) < 1e-6


def test_a_step_can_leave_the_start():
  """B must get a gradient through a random A; that of A is zero at first."""
  trained, frozen = _lora()
  for path, grad in _gradients_of_factors()(trained, frozen).items():
    assert np.any(grad) == path.endswith('_lora_b'), path


@pytest.mark.parametrize('scale', [SCALE, 2.0])
def test_scale_is_applied_once(scale):
  base = _base()
  trained, frozen = _lora(base)
  trained = _with_random_b(trained)
  want = _merged_by_hand(trained, base, scale)
  joined = lora.merge(trained, frozen, lora_scale=scale)
  for got in (joined, lora.fold(joined)):
    assert _relative_error(_forward(got), _forward(want)) < 1e-5
  # Were the factors too small to be seen, the lines above would show nothing.
  assert _relative_error(_forward(base), _forward(want)) > 0.1


def test_merge_does_not_scale_what_it_was_given():
  trained, frozen = _lora()
  trained = _with_random_b(trained)
  once = lora.merge(trained, frozen, lora_scale=SCALE)
  twice = lora.merge(trained, frozen, lora_scale=SCALE)
  jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_gradients_are_those_of_the_merged_matrices():
  base = _base()
  trained, frozen = _lora(base)
  trained = _with_random_b(trained)
  got = _gradients_of_factors()(trained, frozen)
  merged = _merged_by_hand(trained, base, SCALE)
  of_merged = jax.jit(jax.grad(_loss))(merged)
  for name in MATRICES:
    # y = x (W + s A B):  dA = s dW B^T  and  dB = s A^T dW.
    d_w = np.float64(of_merged['layers'][name])
    a, b = (
      np.float64(trained[f'layers/{name}_lora_{x}']).swapaxes(1, 2)
      for x in 'ab'
    )
    d_a, d_b = (got[f'layers/{name}_lora_{x}'] for x in 'ab')
    assert _relative_error(d_a, SCALE * (d_w @ b)) < 1e-5, name
    assert _relative_error(d_b, SCALE * (a @ d_w)) < 1e-5, name


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_fold_leaves_the_layout_of_the_base(dtype):
  base = _base(dtype)
  trained, frozen = _lora(base)
  joined = lora.merge(_with_random_b(trained), frozen, lora_scale=SCALE)
  before = _paths(joined)
  folded = lora.fold(joined)
  assert jax.tree.structure(folded) == jax.tree.structure(base)
  for got, want in zip(
    jax.tree.leaves(folded), jax.tree.leaves(base), strict=True
  ):
    assert got.shape == want.shape and got.dtype == want.dtype
  np.testing.assert_array_equal(folded['embedding'], base['embedding'])
  assert _paths(joined) == before  # The argument is left alone.


def test_fold_adds_in_float32():
  """In bfloat16 the product would be rounded before it is added."""
  base = _base(jnp.bfloat16)
  trained, frozen = _lora(base)
  trained = _with_random_b(trained)
  folded = lora.fold(lora.merge(trained, frozen, lora_scale=SCALE))
  want = _merged_by_hand(trained, base, SCALE)['layers']
  for name in MATRICES:
    got = np.float32(folded['layers'][name])
    exact = np.float32(want[name])
    # bfloat16 keeps 8 bits, so that one rounding is off by 2 ** -8 at most.
    worst = np.max(np.abs(got - exact) / np.abs(exact))
    assert worst < 2**-8 * 1.01, name


def test_fold_of_no_factors_changes_nothing():
  jax.tree.map(np.testing.assert_array_equal, lora.fold(_base()), _base())
