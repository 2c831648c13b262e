"""From logits to tokens, against sorting, float64 and plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.translate import next_token


def kept(p, top_k, top_p):
  """What is drawn of probabilities [V], by sorting; the rest is 0."""
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0
    p /= p.sum()
  before = np.cumsum(p[order]) - p[order]
  p[order[before >= top_p]] = 0
  return p / p.sum()


@pytest.mark.parametrize('v', (1, 7, 1009, 5120))
def test_the_token_that_is_picked(v):
  """As in float64, but for numbers next to where another token begins."""
  rng = np.random.default_rng(v)
  logits = rng.normal(size=(v, 500)).astype(np.float32) * 4
  logits[rng.random((v, 500)) < 0.3] = -np.inf
  logits[rng.integers(v), :] = 1
  drawn = np.linspace(0, 1, 500, endpoint=False, dtype=np.float32)
  drawn[-1] = np.nextafter(np.float32(1), np.float32(0))
  got = jax.jit(next_token.pick)(logits, drawn)
  p = np.exp(logits.astype(np.float64))
  upto = np.cumsum(p, 0) / p.sum(0)
  columns = np.arange(500)
  assert (p[got, columns] > 0).all()
  near = 1e-5
  assert (upto[got, columns] > drawn - near).all()
  assert (
    upto[got, columns] - (p / p.sum(0))[got, columns] < drawn + near
  ).all()
  assert (np.argmax(upto > drawn, 0) == got).mean() > 0.98


@pytest.mark.parametrize('top_k, top_p', [(0, 0.9), (50, 1.0), (300, 0.31)])
def test_keep_probable_against_sorting(top_k, top_p):
  logits = np.random.default_rng(1).normal(scale=2.0, size=(3000, 4))
  logits = logits.astype(np.float32)
  got = np.isfinite(next_token.keep_probable(logits, top_k, top_p))
  for m in range(4):
    p = np.exp(logits[:, m].astype(np.float64))
    want = kept(p / p.sum(), top_k, top_p) > 0
    assert 1 < want.sum() < 3000
    np.testing.assert_array_equal(got[:, m], want)


def test_tokens_as_probable_as_the_last_stay():
  logits = np.log(np.array([[0.4], [0.2], [0.2], [0.2]], np.float32))
  for top_k, top_p, want in (
    (2, 1.0, [True] * 4),
    (0, 0.5, [True] * 4),
    (0, 0.4, [True, False, False, False]),
    (9, 1.0, [True] * 4),
  ):
    got = np.isfinite(next_token.keep_probable(logits, top_k, top_p))
    assert got[:, 0].tolist() == want, (top_k, top_p)


@pytest.mark.parametrize(
  'v, k', [(1, 1), (7, 4), (1009, 4), (5120, 1), (5120, 4)]
)
def test_top_is_the_one_of_xla(v, k):
  """Of rounded numbers, many of which are equal."""
  logits = jax.random.normal(jax.random.key(v), (v, 6)) * 2
  logits = jnp.round(logits).at[:, 3].set(0.0).at[:, 5].set(-jnp.inf)
  values, tokens = jax.jit(next_token.top, static_argnums=1)(logits, k)
  want_values, want_tokens = jax.lax.top_k(logits.T, k)
  np.testing.assert_array_equal(values, want_values.T)
  np.testing.assert_array_equal(tokens, want_tokens.T)


def _discouraged(ngram, penalty, history, logits):
  """In plain Python: what may follow `history`."""
  out = list(logits)
  for t in set(history):
    out[t] = out[t] / penalty if out[t] > 0 else out[t] * penalty
  for i in range(len(history) - ngram + 1 if ngram else 0):
    if history[i : i + ngram - 1] == (
      history[-(ngram - 1) :] if ngram > 1 else []
    ):
      out[history[i + ngram - 1]] = -np.inf
  return out


@pytest.mark.parametrize(
  'ngram, penalty', [(0, 1.7), (1, 1.0), (2, 1.0), (3, 1.3)]
)
def test_repetitions_are_discouraged(ngram, penalty):
  rng = np.random.default_rng(0)
  m, t, v = 10, 9, 6
  made = np.repeat(np.array([0, 1, 4, 8, 9], np.int32), 2)
  tokens = rng.integers(0, 3, (m, t), dtype=np.int32)
  logits = rng.normal(size=(v, m)).astype(np.float32)
  found = next_token.discourage(
    jnp.asarray(logits), jnp.asarray(tokens), made, ngram, penalty
  )
  for i in range(m):
    history = tokens[i, : made[i]].tolist()
    want = _discouraged(ngram, penalty, history, logits[:, i])
    np.testing.assert_allclose(found[:, i], want, rtol=1e-6)
