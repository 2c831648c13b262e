"""Frozen matrices in 8 or 4 bits: what is lost, and that no more is."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import quantize
from mt.gemma import sizes
from mt.train import programs
from mt.train import state as state_lib
from mt.train import step
from mt.translate import decode
from mt.translate import kv_cache
from tests.fixtures.refusal import refusal
from tests.fixtures.tiny_step import CFG
from tests.fixtures.tiny_step import make_batch
from tests.fixtures.tiny_step import setup

each_kind = pytest.mark.parametrize('kind', quantize.BITS)
# Half of the largest step between two numbers, in scales.
WORST = {'int8': 0.5, 'int4': (1 - 0.6961928) / 2}


def _stack():
  """[2, 128, 3] with two blocks a column, of sizes from 1e-3 to 1e3."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 2, 64, 3)) * 10 ** rng.uniform(-3, 3, (2, 2, 1, 3))
  return jnp.asarray(x.reshape(2, 128, 3), jnp.float32)


def _dense(w, dtype=jnp.float32):
  """All layers of it."""
  return jax.vmap(lambda w: quantize.dequantize(w, dtype))(w)


@each_kind
def test_the_error_of_each_weight_is_bounded(kind):
  x = _stack()
  w = quantize.quantize(x, quantize.BITS[kind])
  assert w.scale.dtype == jnp.bfloat16 and w.scale.shape == (2, 2, 3)
  bits = 8 * (w.q.nbytes + w.scale.nbytes) / x.size
  assert bits == quantize.BITS[kind] + 0.25
  error = jnp.abs(_dense(w) - x).reshape(2, 2, 64, 3)
  scale = w.scale.astype(jnp.float32)[:, :, None]
  assert jnp.all(error <= 1.0001 * WORST[kind] * scale)
  largest = jnp.max(jnp.abs(x.reshape(error.shape)), 2, keepdims=True)
  levels = {'int8': 127, 'int4': 1}[kind]
  np.testing.assert_allclose(levels * scale, largest, rtol=2**-8)


@each_kind
def test_what_can_be_represented_stays(kind):
  """In its place too; and what is zero."""
  bits = quantize.BITS[kind]
  x = _dense(quantize.quantize(_stack(), bits)).at[:, 64:, 1].set(0)
  chex.assert_trees_all_equal(_dense(quantize.quantize(x, bits)), x)


def test_64_divides_what_products_of_published_models_sum_over():
  for cfg in sizes.SIZES.values():
    shapes = parameters.shapes(cfg)
    for row in parameters.table(cfg):
      assert not row.lora or shapes[row.path][1] % 64 == 0


def _lora(kind):
  """(config, trained with B that is not zero, frozen)."""
  config, _, state = setup('lora', {'frozen_dtype': kind})
  rng = np.random.default_rng(0)
  trained = {
    k: jnp.asarray(rng.normal(size=v.shape, scale=0.1), jnp.float32)
    for k, v in state.trained.items()
  }
  return config, trained, state.frozen


def _with_dense(frozen):
  return {
    k: _dense(v) if isinstance(v, quantize.Quantized) else v
    for k, v in frozen.items()
  }


@each_kind
def test_gradients_are_those_of_the_same_weights_in_float32(kind):
  config, trained, frozen = _lora(kind)
  quantised = {k for k, v in frozen.items() if not hasattr(v, 'dtype')}
  assert quantised == {f'layers/{name}' for name in lora.targets(CFG)}
  run = jax.jit(functools.partial(step.gradients, CFG, config.train))
  batch = make_batch()
  weights = step.target_weights(batch)
  got = run(trained, frozen, batch, weights)
  want = run(trained, _with_dense(frozen), batch, weights)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_decoding_reads_them_as_training_does():
  config, trained, frozen = _lora('int4')
  params = state_lib.model_params(config.train, trained, frozen)
  tokens = make_batch()['tokens']
  at = jnp.broadcast_to(jnp.arange(20), tokens.shape)
  want = model.forward(CFG, params, tokens, at, jnp.ones_like(at))
  parts = decode.unstack(params)
  assert parts['layers'][1]['q'].q.dtype == frozen['layers/q'].q.dtype
  cache = kv_cache.empty(CFG, 3, 20, jnp.float32)
  before = at[:, :, None] - at[:, None]
  seen = {'L': (before >= 0) & (before < CFG.window), 'G': before >= 0}
  read = jax.jit(functools.partial(decode.extend, CFG))
  got, _ = read(parts, cache, tokens, at, seen)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_step_keeps_no_matrix_that_was_made_whole(remat):
  cfg = dataclasses.replace(CFG, num_layers=12)

  def temporary(kind):
    config, *_ = setup('lora', {'frozen_dtype': kind, 'remat': remat})
    state = programs.abstract_state(cfg, config, None)
    run = functools.partial(step.accumulated_gradients, cfg, config.train)
    args = state.trained, state.frozen, make_batch(b=1)
    compiled = jax.jit(run).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  shapes = parameters.shapes(cfg)
  whole = sum(math.prod(shapes[f'layers/{n}']) for n in lora.targets(cfg))
  # One layer of twelve may be there, and is made anew in the backward pass.
  assert temporary('int4') < temporary('float32') + 4 * whole / 4


@pytest.mark.parametrize('parts', ['all', 'blocks', 'layers/.*'])
def test_something_must_be_frozen(parts):
  refusal(
    lambda: setup(parts, {'frozen_dtype': 'int4'}),
    "train.frozen_dtype is 'int4'",
    'leaves no matrix of a layer frozen',
  )
