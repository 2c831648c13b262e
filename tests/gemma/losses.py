"""Inputs of the loss, ours and its definition, and what a trace of them has."""

import functools

import jax
from jax.extend import core
import numpy as np

from mt.gemma import loss

# 1009 is a prime: no product of the other dimensions makes it, so that a shape
# with it in a traced program is one with the vocabulary in it.
SIZES = B, L, D, V = 3, 11, 24, 1009
ALL = (0, 1, 3)  # What can be differentiated: hidden, embedding, weights.


def inputs(seed=0, b=B, l=L, d=D, v=V):
  """hidden [B, L, D], embedding [V, D], tokens [B, L], all in NumPy."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(b, l, d)).astype(np.float32)
  embedding = rng.normal(scale=0.3, size=(v, d)).astype(np.float32)
  return hidden, embedding, rng.integers(0, v, (b, l), np.int32)


def weights(count, seed=0, b=B, l=L):
  """Real weights, negative ones too, for `count` targets anywhere."""
  rng = np.random.default_rng(seed)
  weights = np.zeros((b, l), np.float32)
  places = rng.permutation(b * (l - 1))[:count]
  some = np.zeros(b * (l - 1))
  some[places] = rng.normal(size=count)
  weights[:, 1:] = some.reshape(b, l - 1)
  weights[:, 0] = 1  # Never a target, whatever it says.
  return weights


@functools.cache
def ours(cap=None, smoothing=0.0, chunk=4, tile=2048, argnums=ALL):
  run = functools.partial(
    loss.target_nll,
    final_softcap=cap,
    smoothing=smoothing,
    chunk=chunk,
    tile=tile,
  )
  return jax.jit(jax.value_and_grad(run, argnums, has_aux=True))


@functools.cache
def definition(cap, smoothing):
  run = functools.partial(
    loss.reference_nll, final_softcap=cap, smoothing=smoothing
  )
  return jax.jit(jax.value_and_grad(run, ALL, has_aux=True))


def exact(hidden, embedding, tokens, weights, cap=None, smoothing=0.0):
  """The definition in float64, where an error is that of ours alone."""
  hidden, embedding, weights = map(np.float64, (hidden, embedding, weights))
  with jax.enable_x64(True):
    out = definition(cap, smoothing)(hidden, embedding, tokens, weights)
    out = jax.device_get(out)
  assert out[0][0].dtype == np.float64
  return out


def assert_near(got, want, tolerance=1e-6):
  """Value, nll of each position and gradients, by the norm of each."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g = np.asarray(g, np.float64)
    assert g.shape == w.shape
    assert np.linalg.norm(g - w) <= tolerance * np.linalg.norm(w) + 1e-12


def assert_total_near(got, want, tolerance=1e-6):
  """As above; terms of a sum of both signs cancel."""
  (value, nll), (exact, exact_nll) = got[0], want[0]
  size = np.abs(exact_nll).sum()
  assert abs(float(value) - exact) <= tolerance * max(size, abs(exact))
  assert_near((nll, got[1]), (exact_nll, want[1]), tolerance)


def equations(jaxpr):
  """The equations of a traced function, those inside of loops included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for x in jax.tree.leaves(list(eqn.params.values())):
      if isinstance(x, core.ClosedJaxpr):
        yield from equations(x.jaxpr)
      elif isinstance(x, core.Jaxpr):
        yield from equations(x)


def results_traced(fn, *args):
  """(primitive, shape, dtype) of every result."""
  fn = fn.__wrapped__ if hasattr(fn, 'lower') else fn  # Of jit.
  for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
    for v in eqn.outvars:
      yield eqn.primitive.name, v.aval.shape, v.aval.dtype
