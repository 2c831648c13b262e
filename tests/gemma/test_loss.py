"""The loss against its definition, and what it must never build."""

import functools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mt.gemma import loss
from mt.gemma import loss_loop

# 1009 is a prime: no product of the other dimensions makes it, so that a shape
# with it in a traced program is one with the vocabulary in it.
B, L, D, V = 3, 11, 24, 1009
ALL = (0, 1, 3)  # What can be differentiated: hidden, embedding, weights.


def _inputs(seed=0, b=B, l=L, d=D, v=V):
  """hidden [B, L, D], embedding [V, D], tokens [B, L], all in NumPy."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(b, l, d)).astype(np.float32)
  embedding = rng.normal(scale=0.3, size=(v, d)).astype(np.float32)
  return hidden, embedding, rng.integers(0, v, (b, l), np.int32)


def _weights(count, seed=0, b=B, l=L):
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
def _ours(cap=None, smoothing=0.0, chunk=4, tile=2048, argnums=ALL):
  run = functools.partial(
    loss.target_nll,
    final_softcap=cap,
    smoothing=smoothing,
    chunk=chunk,
    tile=tile,
  )
  return jax.jit(jax.value_and_grad(run, argnums, has_aux=True))


@functools.cache
def _definition(cap, smoothing):
  run = functools.partial(
    loss.reference_nll, final_softcap=cap, smoothing=smoothing
  )
  return jax.jit(jax.value_and_grad(run, ALL, has_aux=True))


def _exact(hidden, embedding, tokens, weights, cap=None, smoothing=0.0):
  """The definition in float64, where an error is that of ours alone."""
  hidden, embedding, weights = map(np.float64, (hidden, embedding, weights))
  with jax.enable_x64(True):
    out = _definition(cap, smoothing)(hidden, embedding, tokens, weights)
    out = jax.device_get(out)
  assert out[0][0].dtype == np.float64
  return out


def _assert_near(got, want, tolerance=1e-6):
  """Value, nll of each position and gradients, by the norm of each."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g = np.asarray(g, np.float64)
    assert g.shape == w.shape
    assert np.linalg.norm(g - w) <= tolerance * np.linalg.norm(w) + 1e-12


def _assert_total_near(got, want, tolerance=1e-6):
  """As above; terms of a sum of both signs cancel."""
  (value, nll), (exact, exact_nll) = got[0], want[0]
  size = np.abs(exact_nll).sum()
  assert abs(float(value) - exact) <= tolerance * max(size, abs(exact))
  _assert_near((nll, got[1]), (exact_nll, want[1]), tolerance)


@pytest.mark.parametrize(
  ('cap', 'smoothing'), [(None, 0.0), (2.0, 0.0), (None, 0.1), (2.0, 0.9)]
)
def test_the_definition_is_the_one_of_optax(cap, smoothing):
  hidden, embedding, tokens = _inputs()
  weights = _weights(14)

  def naive(hidden, embedding, weights):
    logits = jnp.einsum('bld,vd->blv', hidden, embedding)[:, :-1]
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    labels = jax.nn.one_hot(tokens[:, 1:], V, dtype=jnp.float64)
    labels = optax.smooth_labels(labels, smoothing)
    losses = optax.softmax_cross_entropy(logits, labels)
    return jnp.sum(losses * weights[:, 1:]), losses

  with jax.enable_x64(True):
    args = map(np.float64, (hidden, embedding, weights))
    (value, losses), grads = jax.jit(
      jax.value_and_grad(naive, (0, 1), has_aux=True)
    )(*args)
  (got, nll), got_grads = _exact(
    hidden, embedding, tokens, weights, cap, smoothing
  )
  assert got == pytest.approx(float(value), rel=1e-12)
  here = weights[:, 1:] != 0
  np.testing.assert_allclose(nll[:, 1:][here], losses[here], rtol=1e-12)
  assert not nll[:, 0].any() and not nll[:, 1:][~here].any()
  _assert_near(got_grads[:2], grads, 1e-12)


# A cap of 2 bends logits of standard deviation 1.5 a lot.
@pytest.mark.parametrize(
  ('cap', 'smoothing', 'chunk'),
  [
    (None, 0.0, 7),
    (None, 0.1, 4),
    (2.0, 0.0, 4),
    (2.0, 0.9, 7),
    (2.0, 0.1, 20),  # One or two chunks; the one stands in the gradient.
    (None, 0.0, 64),  # More than there are places, 30, and wider than D.
  ],
)
def test_value_nll_and_gradients_are_the_definitions(cap, smoothing, chunk):
  args = _inputs()
  # No targets; a chunk that is nearly empty, half empty, full; every place.
  for count in (0, 1, 14, 20, 30):
    weights = _weights(count, seed=count)
    got = _ours(cap, smoothing, chunk)(*args, weights)
    want = _exact(*args, weights, cap, smoothing)
    (value, nll), grads = got
    assert value.dtype == nll.dtype == jnp.float32
    _assert_total_near(got, want)
    assert count or not any(np.any(x) for x in (value, nll, *grads))


@pytest.mark.parametrize(
  ('cap', 'smoothing', 'chunk'), [(None, 0.0, 8), (2.0, 0.1, 20)]
)
@pytest.mark.parametrize('tile', [1100, 1000])
def test_tiles_of_the_vocabulary(cap, smoothing, chunk, tile):
  """1,009 * 6 rows in equal tiles of 1,009, or in six of 865 and a rest.

  Sums run relative to the top so far.
  """
  hidden, embedding, tokens = _inputs(1, v=6 * V)
  embedding *= np.repeat([3, 1, 0.1, 4, 1, 2], V)[:, None]  # The top moves.
  for count in (0, 3, 14, 30):
    args = hidden, embedding, tokens, _weights(count)
    got = _ours(cap, smoothing, chunk, tile=tile)(*args)
    _assert_total_near(got, _exact(*args, cap, smoothing), 2e-6)


def test_no_vocabulary_is_cut_into_crumbs():
  """One that nothing divides took a tile for each row."""
  args = (*_inputs(), _weights(14))
  run = functools.partial(loss.target_nll, chunk=4, tile=100)
  traced = _results_traced(run, *args)
  rows = [shape[0] for name, shape, _ in traced if name == 'dot_general']
  assert rows and min(rows) > 50


@pytest.mark.parametrize(
  ('chunk', 'targets', 'taken'),
  [
    (288, 133, 144),
    (288, 144, 144),
    (288, 145, 160),
    (288, 289, 2 * 160),
    (576, 540, 576),
    (576, 380, 384),
    (576, 1080, 2 * 576),
    (576, 100, 288),
    (16, 3, 16),
  ],
)
def test_a_chunk_is_hardly_wider_than_its_targets(chunk, targets, taken):
  widths = loss_loop.chunk_widths(chunk, None)
  chunks = -(-targets // chunk)
  each = min(w for w in widths if w >= targets / chunks)
  assert chunks * each == taken
  assert widths[-1] == chunk and sorted(set(widths)) == widths


# Of 160 places. In all three there is a chunk for each width; logits of a
# single chunk stand in the gradient, where D is as large, and beside it else.
@pytest.mark.parametrize(
  ('d', 'chunk', 'widths'),
  [(128, 128, [64, 80, 96, 128]), (100, 144, [80, 96, 144])],
)
def test_chunks_of_each_width_are_the_definition(d, chunk, widths):
  assert loss_loop.chunk_widths(chunk, None) == widths
  args = _inputs(2, b=4, l=41, d=d)
  for count in (3, 64, 65, 96, 97, 129, 160):
    weights = _weights(count, count, b=4, l=41)
    got = _ours(None, 0.0, chunk)(*args, weights)
    _assert_total_near(got, _exact(*args, weights))


@given(
  bits=st.lists(st.booleans(), min_size=B * L, max_size=B * L),
  seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_targets_and_weights_at_all(bits, seed):
  weights = np.random.default_rng(seed).normal(size=(B, L))
  weights = np.where(np.array(bits).reshape(B, L), np.float32(weights), 0)
  args = (*_inputs(seed), weights)
  _assert_total_near(_ours(2.0)(*args), _exact(*args, 2.0))


def test_example_of_the_docstring():
  # All logits equal: -log p = log V for each of two targets, half of each.
  value, nll = loss.target_nll(  # Of NumPy arrays, and not compiled.
    np.zeros((1, 5, 6), np.float32),
    np.ones((100, 6), np.float32),
    np.array([[2, 10, 11, 20, 1]], np.int32),
    np.array([[0, 0, 0, 0.5, 0.5]], np.float32),
  )
  assert float(value) == pytest.approx(math.log(100), rel=1e-6)
  np.testing.assert_allclose(nll, [[0, 0, 0, *[math.log(100)] * 2]], rtol=1e-6)


def test_targets_are_predicted_from_the_place_before():
  # State l says nothing but 'the next token is l'.
  states = 50 * np.eye(8, dtype=np.float32)
  tokens = np.array([[7, 0, 1, 2, 3, 4, 5, 6]])
  value, _ = loss.target_nll(states[None], states, tokens, np.ones((1, 8)))
  assert float(value) == pytest.approx(0.0, abs=1e-6)


def test_what_is_no_target_counts_for_nothing():
  hidden, embedding, tokens = _inputs()
  weights = _weights(14)
  used = np.zeros((B, L), bool)
  used[:, :-1] = weights[:, 1:] != 0  # States that predict a target.
  before = _ours()(hidden, embedding, tokens, weights)
  d_hidden = before[1][0]
  assert not np.any(d_hidden[~used])
  assert np.any(d_hidden[used], axis=-1).all()
  rng = np.random.default_rng(1)
  hidden = np.where(used[..., None], hidden, 9.0 * rng.normal(size=(B, L, D)))
  spare = weights == 0
  spare[:, 0] = True
  tokens = np.where(spare, rng.integers(0, V, (B, L)), tokens)
  weights[:, 0] = [0, 7, np.inf]
  after = _ours()(np.float32(hidden), embedding, np.int32(tokens), weights)
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
  ('cap', 'smoothing', 'chunk'),
  [(None, 0.0, 7), (None, 0.1, 4), (2.0, 0.0, 64), (2.0, 0.9, 7)],
)
def test_a_vocabulary_in_one_piece(cap, smoothing, chunk):
  args = _inputs()
  for count in (0, 1, 14, 30):
    weights = _weights(count, seed=count)
    got = _ours(cap, smoothing, chunk, tile=None)(*args, weights)
    _assert_total_near(got, _exact(*args, weights, cap, smoothing), 2e-6)
  only_hidden = _ours(cap, smoothing, chunk, None, (0,))(*args, weights)
  np.testing.assert_array_equal(only_hidden[1][0], got[1][0])
  value, nll = _ours_value(cap, smoothing, chunk)(*args, weights)
  _assert_near((value, nll), got[0], 2e-6)


def _ours_value(cap, smoothing, chunk):
  return jax.jit(
    functools.partial(
      loss.target_nll,
      final_softcap=cap,
      smoothing=smoothing,
      chunk=chunk,
      tile=None,
    )
  )


def test_a_vocabulary_in_one_piece_says_when_a_target_is_hopeless():
  """An nll above 75 nats is finite and above 75, and so are its gradients."""
  hidden, embedding, tokens = _inputs()
  args = (1e3 * hidden, embedding, tokens, _weights(14))
  (_, nll), grads = _ours(tile=None)(*args)
  (_, want), _ = _exact(*args)
  far = want > 75
  assert far.any() and (nll[far] >= 74.9).all() and (nll[far] < 88).all()
  np.testing.assert_allclose(nll[~far], want[~far], rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(x).all() for x in grads)


def test_logits_in_bfloat16_cost_no_more_than_products_in_it():
  """Of the operands that are rounded anyway, and of the logits besides."""
  hidden, embedding, tokens = _inputs(l=200, d=64)
  weights = _weights(300, l=200)
  exact = _exact(hidden, embedding, tokens, weights)[1]
  operands = jnp.bfloat16(hidden), jnp.bfloat16(embedding)
  got = _ours(chunk=64, tile=None)(*operands, tokens, weights)[1]
  rounded = _exact(*map(np.float32, operands), tokens, weights)[1]
  for g, r, e in list(zip(got, rounded, exact, strict=True))[:2]:
    by_logits = np.linalg.norm(np.float64(g) - r)
    by_operands = np.linalg.norm(r - e)
    # JAX 0.12 has 1.7 times on a CPU, 0.10 less than 1.5.
    assert 0 < by_logits < 2 * by_operands, (by_logits, by_operands)


@pytest.mark.parametrize('cap', [None, 30.0])
def test_large_logits_stay_finite(cap):
  hidden, embedding, tokens = _inputs()
  args = (1e3 * hidden, embedding, tokens, _weights(14))
  got = _ours(cap)(*args)
  # Logits of 1500 are good to 1e-4 in float32, and their exponents as well.
  _assert_total_near(got, _exact(*args, cap), 1e-3)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_gradients_scale_with_the_cotangent():
  args = (*_inputs(), _weights(14))

  def other(*args):
    total, nll = loss.target_nll(*args, chunk=4)
    return total / 14, nll

  got = jax.jit(jax.grad(other, ALL, has_aux=True))(*args)
  _, want = _exact(*args)
  _assert_near(got[0], [w / 14 for w in want])


def test_a_loss_that_is_only_logged_adds_no_gradient():
  hidden, embedding, tokens = _inputs()
  weights = _weights(14)

  def other(hidden, embedding):
    return jnp.sum(hidden**2), loss.target_nll(
      hidden, embedding, tokens, weights, chunk=4
    )

  grads, (total, _) = jax.jit(jax.grad(other, (0, 1), has_aux=True))(
    hidden, embedding
  )
  assert abs(float(total)) > 1.0
  np.testing.assert_allclose(grads[0], 2 * hidden, rtol=1e-6)
  assert not np.any(grads[1])


def test_the_nll_of_a_position_cannot_be_differentiated():
  args = (*_inputs(), _weights(14))

  def other(*args):
    return jnp.sum(loss.target_nll(*args)[1] ** 2)

  with pytest.raises(TypeError, match='`weights`'):
    jax.eval_shape(jax.grad(other), *args)


@pytest.mark.parametrize('argnums', [(0,), (1,), (3,)])
def test_each_gradient_can_be_had_alone(argnums):
  args = (*_inputs(), _weights(14))
  _, want = _exact(*args, 2.0)
  _, got = _ours(2.0, argnums=argnums)(*args)
  _assert_near(got, [want[ALL.index(argnums[0])]])


@pytest.mark.parametrize(
  ('hidden_dtype', 'embedding_dtype'),
  [
    (jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16),
  ],
)
def test_mixed_precision_keeps_dtypes(hidden_dtype, embedding_dtype):
  hidden, embedding, tokens = _inputs()
  # Numbers that bfloat16 can hold: what differs then is the arithmetic.
  hidden = jnp.asarray(hidden, jnp.bfloat16).astype(hidden_dtype)
  embedding = jnp.asarray(embedding, jnp.bfloat16).astype(embedding_dtype)
  weights = _weights(14)
  (value, nll), grads = _ours()(hidden, embedding, tokens, weights)
  assert value.dtype == nll.dtype == grads[2].dtype == jnp.float32
  assert grads[0].dtype == hidden_dtype and grads[1].dtype == embedding_dtype
  wide = [np.asarray(x, np.float32) for x in (hidden, embedding)]
  want = _exact(*wide, tokens, weights)
  _assert_total_near(
    ((value, nll), grads[2:]), (want[0], want[1][2:])
  )  # d nll / d logits goes through the second product with 8 bits.
  _assert_near(grads[:2], want[1][:2], 1e-2)
  # Products are float32 whatever the inputs are. The trace says so; a CPU may
  # keep more digits than it is asked for, and so would not tell.
  traced = _results_traced(_ours(), hidden, embedding, tokens, weights)
  products = [dtype for name, _, dtype in traced if name == 'dot_general']
  assert len(products) == 3 * 2  # For one chunk of 4, and for several.
  assert set(products) == {jnp.dtype('float32')}


def _equations(jaxpr):
  """The equations of a traced function, those inside of loops included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for x in jax.tree.leaves(list(eqn.params.values())):
      if isinstance(x, core.ClosedJaxpr):
        yield from _equations(x.jaxpr)
      elif isinstance(x, core.Jaxpr):
        yield from _equations(x)


def _results_traced(fn, *args):
  """(primitive, shape, dtype) of every result."""
  fn = fn.__wrapped__ if hasattr(fn, 'lower') else fn  # Of jit.
  for eqn in _equations(jax.make_jaxpr(fn)(*args).jaxpr):
    for v in eqn.outvars:
      yield eqn.primitive.name, v.aval.shape, v.aval.dtype


def _sizes(fn, *args):
  """Of all results that have the vocabulary in them, in units of it."""
  found = {math.prod(s) for _, s, _ in _results_traced(fn, *args)}
  return {n // V for n in found if n % V == 0 and n}


@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_logits_of_all_places_are_never_built(cap, smoothing):
  args = (*_inputs(), _weights(14))
  assert B * (L - 1) in _sizes(_definition(cap, smoothing), *args)
  run = _ours(cap, smoothing)
  one, chunk, embedding = 1, 4, D
  assert chunk in _sizes(run, *args)
  assert _sizes(run, *args) <= {one, chunk, embedding}


@pytest.mark.parametrize(
  ('argnums', 'd_hidden', 'd_embedding'),
  [((), False, False), ((0,), True, False), ((1,), True, True)],
)
def test_what_is_not_asked_for_costs_nothing(argnums, d_hidden, d_embedding):
  """A frozen embedding, and an evaluation."""
  args = (*_inputs(), _weights(14))
  run = functools.partial(loss.target_nll, chunk=4)
  if argnums:
    run = jax.grad(run, argnums, has_aux=True)
  traced = list(_results_traced(run, *args))
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
    for eqn in _equations(jaxpr.jaxpr)
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


@pytest.mark.parametrize(
  'bad',
  [
    {'hidden': np.zeros((L, D), np.float32)},
    {'embedding': np.zeros((1, V, D), np.float32)},
    {'embedding': np.zeros((V, D + 1), np.float32)},
    {'tokens': np.zeros((B, L - 1), np.int32)},
    {'weights': np.zeros((B, L - 1), np.float32)},
    {'weights': np.zeros((B,), np.float32)},
  ],
)
def test_wrong_shapes_are_named(bad):
  names = 'hidden', 'embedding', 'tokens', 'weights'
  args = dict(zip(names, (*_inputs(), _weights(3)), strict=True))
  with pytest.raises((AssertionError, ValueError), match=r'rank|shape|Dim|dim'):
    loss.target_nll(**(args | bad))
