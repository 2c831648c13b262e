"""What the loss must never build, and what it costs: in its traced program."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from mt.gemma import loss
from tests.gemma import losses

B, L, D, V = losses.SIZES


def _sizes(fn, *args):
  """Of all results that have the vocabulary in them, in units of it."""
  found = {math.prod(s) for _, s, _ in losses.results_traced(fn, *args)}
  return {n // V for n in found if n % V == 0 and n}


@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_logits_of_all_places_are_never_built(cap, smoothing):
  args = (*losses.inputs(), losses.weights(14))
  assert B * (L - 1) in _sizes(losses.definition(cap, smoothing), *args)
  run = losses.ours(cap, smoothing)
  one, chunk, embedding = 1, 4, D
  assert chunk in _sizes(run, *args)
  assert _sizes(run, *args) <= {one, chunk, embedding}


@pytest.mark.parametrize(
  ('argnums', 'd_hidden', 'd_embedding'),
  [((), False, False), ((0,), True, False), ((1,), True, True)],
)
def test_what_is_not_asked_for_costs_nothing(argnums, d_hidden, d_embedding):
  """A frozen embedding, and an evaluation."""
  args = (*losses.inputs(), losses.weights(14))
  run = functools.partial(loss.target_nll, chunk=4)
  if argnums:
    run = jax.grad(run, argnums, has_aux=True)
  traced = list(losses.results_traced(run, *args))
  # Zeros to add to; the rows of the vocabulary are read in one tile.
  made = [s for name, s, _ in traced if name == 'broadcast_in_dim']
  # The states themselves are filled up once.
  assert made.count((B * (L - 1), D)) == d_hidden
  assert ((V, D) in made) == d_embedding
  products = [s for name, s, _ in traced if name == 'dot_general']
  assert len(set(products)) == 1 + d_hidden + d_embedding


@pytest.mark.parametrize('chunk', [16, 48, 144, 576, 4096])
@pytest.mark.parametrize('argnums', [(0,), (0, 1)])
def test_few_sizes_of_a_chunk_are_compiled(argnums, chunk):
  l = 20_000
  args = (
    jax.ShapeDtypeStruct((1, l, 640), jnp.float32),
    jax.ShapeDtypeStruct((V, 640), jnp.float32),
    jax.ShapeDtypeStruct((1, l), jnp.int32),
    jax.ShapeDtypeStruct((1, l), jnp.float32),
  )
  run = functools.partial(loss.target_nll, chunk=chunk)
  jaxpr = jax.make_jaxpr(jax.grad(run, argnums, has_aux=True))(*args)
  branches = [
    len(eqn.params['branches'])
    for eqn in losses.equations(jaxpr.jaxpr)
    if eqn.primitive.name == 'cond'
  ]
  assert max(branches, default=1) <= 4


def test_logits_of_a_single_chunk_take_no_memory():
  """They stand in the gradient, which is an output."""
  d, v = 64, 4 * V
  args = (
    jax.ShapeDtypeStruct((3, 21, d), jnp.float32),  # 60 places.
    jax.ShapeDtypeStruct((v, d), jnp.float32),
    jax.ShapeDtypeStruct((3, 21), jnp.int32),
    jax.ShapeDtypeStruct((3, 21), jnp.float32),
  )

  def temporary(chunk):
    run = functools.partial(loss.target_nll, chunk=chunk, tile=V)
    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    memory = run.lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary(60) < 0.7 * v * 60 * 4
  assert temporary(40) > v * 40 * 4  # Up to two chunks.


def test_no_vocabulary_is_cut_into_crumbs():
  """One that nothing divides took a tile for each row."""
  args = (*losses.inputs(), losses.weights(14))
  run = functools.partial(loss.target_nll, chunk=4, tile=100)
  traced = losses.results_traced(run, *args)
  rows = [shape[0] for name, shape, _ in traced if name == 'dot_general']
  assert rows and min(rows) > 50
