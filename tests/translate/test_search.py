"""Searches over a model that is a table, against brute force.

The table's row is found by a hash of all tokens so far; the cache holds each
where it was read. A search that let a hypothesis go on with what another has
read would be found out.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.translate import search as search_lib
from mt.translate.search import Search
from tests.translate.test_next_token import kept

V = 5
STOPS = np.array([1, 3], np.int32)
ROWS = 997  # Of the table; a prime.
B = 4
WIDTH = 6  # T.
LAST = np.array([0, 2, 4, 2], np.int32)  # Of the prompts.
HASHES = np.array([11, 222, 3, 505], np.int32)  # What the prompts left.
LENGTHS = np.array([1, 7, 3, 2], np.int32)


@functools.cache
def _table(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(scale=1.5, size=(ROWS, V)).astype(np.float32)


def _mix(h, token, position):
  return (h * 31 + token * 7 + position * 3 + 1) % ROWS


def _step(table):
  def step(cache, tokens, start, made, ancestors):
    b = jnp.arange(len(tokens))
    read = cache['read'].at[b, :, made].set(tokens)
    h = jnp.broadcast_to(cache['prompt'][:, None], tokens.shape)
    for n in range(WIDTH):
      token = jnp.take_along_axis(read[:, :, n], ancestors[:, :, n], 1)
      mixed = _mix(h, token, (start + n)[:, None])
      h = jnp.where((n <= made)[:, None], mixed, h)
    return jnp.asarray(table)[h.ravel()].T, cache | {'read': read}

  return step


def _cache(hashes, width):
  read = jnp.zeros((len(hashes), width, WIDTH), jnp.int32)
  return {'prompt': jnp.asarray(hashes), 'read': read}


@functools.partial(jax.jit, static_argnums=0)
def _jitted(search, table, numbers, hashes, last, lengths, limits, floor):
  state = search_lib.start(search, numbers, last, lengths, limits, WIDTH)
  cache = _cache(hashes, search.width)
  return search_lib.run(search, _step(table), cache, state, STOPS, floor)[1]


def _run(search, limits, *, seed=0, floor=0, first=0):
  """The final State, as NumPy."""
  numbers = np.arange(first, first + B, dtype=np.int32)
  args = numbers, HASHES, LAST, LENGTHS, np.array(limits, np.int32)
  state = _jitted(search, _table(seed), *args, np.int32(floor))
  return jax.device_get(state)


def _found(search, state, row):
  """(score, tokens) of each hypothesis, best first."""
  out = []
  for w in range(search.width):
    logp, n = state.logp[row, w], state.counts[row, w]
    if np.isfinite(logp):
      out.append((logp / n**search.length_penalty, state.tokens[row, w, :n]))
  return sorted(((s, t.tolist()) for s, t in out), reverse=True)


def _log_probs(row, prefix, seed=0):
  """Of what may follow the prompt and `prefix`: [V] float64."""
  h, position = HASHES[row], LENGTHS[row] - 1
  for token in [LAST[row], *prefix]:
    h, position = _mix(h, token, position), position + 1
  x = _table(seed)[h].astype(np.float64)
  return x - np.log(np.sum(np.exp(x)))


def _brute_force(row, limit, penalty):
  """All texts that end with a stop token or at the limit, best first.

  Of those that differ in the last, ending token only, the best.
  """
  goes_on = [t for t in range(V) if t not in STOPS]
  out = []
  for n in range(limit):
    for prefix in itertools.product(goes_on, repeat=n):
      logp = sum(_log_probs(row, prefix[:i])[t] for i, t in enumerate(prefix))
      last = _log_probs(row, prefix)
      ends = [STOPS[np.argmax(last[STOPS])]]
      ends += goes_on if n + 1 == limit else []
      for t in ends:
        score = (logp + last[t]) / (n + 1) ** penalty
        out.append((score, [*prefix, int(t)]))
  return sorted(out, reverse=True)


@pytest.mark.parametrize('penalty', [0.0, 0.6])
def test_a_wide_beam_is_exact(penalty):
  """As many places as there are hypotheses: 1 + 3 + 9 + 27 + 27 * 3."""
  limits = [4, 3, 2, 1]
  search = Search(beam=121, n_best=7, length_penalty=penalty)
  state = _run(search, limits)
  for row, limit in enumerate(limits):
    want = _brute_force(row, limit, penalty)[:7]
    got = _found(search, state, row)[:7]
    assert [t for _, t in got] == [t for _, t in want]
    np.testing.assert_allclose(
      [s for s, _ in got], [s for s, _ in want], rtol=1e-5
    )
  assert len({len(_found(search, state, 0)[i][1]) for i in range(7)}) > 1


def _reference_beam(row, limit, search, seed):
  """The same algorithm in words of Python, never ending early."""
  living, ended = [(0.0, [])], []
  for n in range(1, limit + 1):
    candidates = []
    for logp, tokens in living:
      p = logp + _log_probs(row, tokens, seed)
      stop = STOPS[np.argmax(p[STOPS])]
      allowed = [t for t in range(V) if t not in STOPS] + [int(stop)]
      candidates += [(p[t], [*tokens, t]) for t in allowed]
    candidates.sort(reverse=True)
    living = []
    for logp, tokens in candidates[: search.beam - len(ended)]:
      over = tokens[-1] in STOPS or n == limit
      (ended if over else living).append((logp, tokens))
  scored = [(p / len(t) ** search.length_penalty, t) for p, t in ended]
  return sorted(scored, reverse=True)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('penalty', [0.0, 1.0])
def test_a_narrow_beam(penalty, seed):
  """Ending early changes nothing."""
  for beam, n_best in ((2, 2), (3, 1)):
    search = Search(beam=beam, n_best=n_best, length_penalty=penalty)
    state = _run(search, [6, 5, 6, 4], seed=seed)
    for row, limit in enumerate([6, 5, 6, 4]):
      want = _reference_beam(row, limit, search, seed)[:n_best]
      got = _found(search, state, row)[:n_best]
      assert [t for _, t in got] == [t for _, t in want]


def test_a_beam_ends_as_soon_as_the_best_is_certain():
  """Steps that a sentence takes, against those that fill its beam."""
  search = Search(beam=12, length_penalty=0.0)
  state = _run(search, [6] * B)
  wanted = _run(dataclasses.replace(search, n_best=12), [6] * B)
  assert (state.made <= wanted.made).all()
  assert state.made.sum() < wanted.made.sum()
  for row in range(B):
    assert _found(search, state, row)[0] == _found(search, wanted, row)[0]


def test_a_beam_of_one_is_greedy():
  limits = np.array([6, 6, 3, 0], np.int32)
  numbers = np.arange(B, dtype=np.int32)
  search = Search()
  for seed in range(3):
    states = []
    for advance in (search_lib.advance, search_lib._beam):
      step = jax.jit(advance, static_argnums=0)
      state = search_lib.start(search, numbers, LAST, LENGTHS, limits, 6)
      cache = _cache(HASHES, 1)
      for _ in range(6):
        where = state.start, state.made, state.ancestors
        logits, cache = _step(_table(seed))(cache, state.last, *where)
        state = step(search, state, logits, STOPS)
        assert not state.ancestors.any()
      states.append(state)
    one, other = states
    for name in ('tokens', 'counts', 'made', 'live'):
      np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.logp, other.logp, rtol=1e-5)
    assert len({*np.asarray(one.counts).ravel()}) >= 3


def test_greedy_takes_the_most_probable():
  state = _run(Search(), [6, 6, 2, 0])
  for row, limit in enumerate([6, 6, 2, 0]):
    tokens, logp = [], 0.0
    while len(tokens) < limit and not (tokens and tokens[-1] in STOPS):
      p = _log_probs(row, tokens)
      tokens.append(int(p.argmax()))
      logp += p.max()
    n = state.counts[row, 0]
    assert state.tokens[row, 0].tolist() == tokens + [0] * (6 - n)
    assert n == len(tokens)
    if limit:
      np.testing.assert_allclose(state.logp[row, 0], logp, rtol=1e-5)
    else:
      assert np.isneginf(state.logp[row, 0])
  assert state.live.sum() == 0


def test_it_stops_at_the_floor_and_goes_on():
  made = _run(Search(), [6, 1, 6, 2]).made
  for floor in range(B):
    state = _run(Search(), [6, 1, 6, 2], floor=floor)
    assert state.live.any(1).sum() <= floor
    # No step more than was needed.
    assert state.made.max() == sorted(made)[B - 1 - floor]
    assert (state.made == np.minimum(made, state.made.max())).all()


# Sampling.


def _many(search, count=4000):
  ones = np.ones(count, np.int32)
  state = _jitted(
    search,
    _table(),
    np.arange(count, dtype=np.int32),
    ones * HASHES[1],
    ones * LAST[1],
    ones * LENGTHS[1],
    ones,
    np.int32(0),
  )
  return jax.device_get(state)


@pytest.mark.parametrize(
  'search',
  [
    Search(temperature=0.5),
    Search(temperature=2.0, top_k=3),
    Search(temperature=1.5, top_k=4, top_p=0.8),
  ],
)
def test_tokens_are_drawn_with_their_probabilities(search):
  state = _many(search)
  tokens = state.tokens[:, 0, 0]
  p = np.exp(_log_probs(1, []))
  flat = p ** (1 / search.temperature)
  want = kept(flat / flat.sum(), search.top_k, search.top_p)
  got = np.bincount(tokens, minlength=V) / len(tokens)
  assert ((got > 0) == (want > 0)).all()
  # Four standard deviations.
  assert (np.abs(got - want) < 4 * np.sqrt(want / len(tokens)) + 1e-9).all()
  # The score is the model's own, whatever was drawn from.
  np.testing.assert_allclose(state.logp[:, 0], np.log(p)[tokens], rtol=1e-4)


def test_draws_depend_on_seed_number_and_place():
  search = Search(temperature=1.0, n_best=3)
  one, again = (_run(search, [6] * B) for _ in range(2))
  np.testing.assert_array_equal(one.tokens, again.tokens)
  other = _run(dataclasses.replace(search, seed=1), [6] * B)
  assert not np.array_equal(one.tokens, other.tokens)
  other = _run(search, [6] * B, first=7)
  assert not np.array_equal(one.tokens, other.tokens)
  assert len({tuple(t) for t in one.tokens.reshape(-1, 6).tolist()}) > B


def test_each_step_draws_anew():
  """Two draws out of five equal tokens agree in a fifth of all cases."""
  search, n = Search(temperature=1.0), 1000
  ones, logits = jnp.ones(n, jnp.int32), jnp.zeros((V, n))
  state = search_lib.start(search, jnp.arange(n), ones, ones, 2 * ones, 2)
  step = jax.jit(search_lib.advance, static_argnums=0)
  for _ in range(2):
    state = step(search, state, logits, jnp.array([-1]))
  same = np.mean(state.tokens[:, 0, 0] == state.tokens[:, 0, 1])
  assert abs(same - 0.2) < 0.05


def test_no_token_comes_twice():
  """As without it, where the best has none twice."""
  limits = [WIDTH] * B
  free, state = _run(Search(), limits), _run(Search(no_repeat_ngram=1), limits)
  twice = 0
  for row in range(B):
    kept = state.tokens[row, 0, : state.counts[row, 0]].tolist()
    assert len(set(kept)) == len(kept)
    was = free.tokens[row, 0, : free.counts[row, 0]].tolist()
    twice += len(set(was)) < len(was)
    assert kept == was or len(set(was)) < len(was)
  assert twice
