"""The chunked loss against the naive one, and what it must never build."""

import collections
import functools
import math
import re

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

# 1009 is a prime: no product of the other dimensions makes it, so that a shape
# with it in a compiled program is one with the vocabulary in it.
B, L, D, V = 3, 11, 24, 1009


def _inputs(seed=0):
  """hidden [B, L, D], embedding [V, D], tokens [B, L], all in NumPy."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, L, D)).astype(np.float32)
  embedding = rng.normal(scale=0.3, size=(V, D)).astype(np.float32)
  return hidden, embedding, rng.integers(0, V, (B, L), np.int32)


def _mask(count):
  """A target mask with `count` targets, in every row if there are enough."""
  mask = np.zeros((B, L), bool)
  places = [(row, at) for at in range(L - 1, 0, -1) for row in range(B)]
  for place in places[:count]:
    mask[place] = True
  # Never a target, whatever the mask says: nothing comes before it.
  mask[:, 0] = True
  return mask


def _naive_nll(hidden, embedding, tokens, mask, cap):
  """The definition, with all logits at once."""
  logits = jnp.einsum('bld,vd->blv', hidden, embedding)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  log_p = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
  return -jnp.sum(picked * mask[:, 1:])


_naive = jax.jit(
  jax.value_and_grad(_naive_nll, argnums=(0, 1)), static_argnames='cap'
)


def _naive_in_float64(hidden, embedding, tokens, mask, cap=None):
  """Against float64, an error is that of ours alone."""
  hidden, embedding = np.float64(hidden), np.float64(embedding)
  with jax.enable_x64(True):
    out = jax.device_get(_naive(hidden, embedding, tokens, mask, cap=cap))
  assert out[0].dtype == np.float64
  return out


@functools.cache
def _ours(cap=None, chunk=4, argnums=(0, 1)):
  run = functools.partial(loss.target_nll, final_softcap=cap, chunk=chunk)
  return jax.jit(jax.value_and_grad(run, argnums=argnums))


def _relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.linalg.norm(got - want) / np.linalg.norm(want)


# A cap of 2 bends logits of standard deviation 1.5 a lot.
@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize(
  ('targets', 'chunk'),
  [
    (14, 7),  # Chunks come out even,
    (14, 4),  # or the last is half empty,
    (1, 4),  # or the only one is nearly empty.
    (14, 64),  # More than there are places, 30.
    (30, 64),
  ],
)
def test_value_and_gradients_are_the_naive_ones(targets, chunk, cap):
  args = (*_inputs(), _mask(targets))
  value, grads = _ours(cap, chunk)(*args)
  want, want_grads = _naive_in_float64(*args, cap=cap)
  assert value.dtype == jnp.float32
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  assert _relative_error(grads[0], want_grads[0]) < 1e-6
  assert _relative_error(grads[1], want_grads[1]) < 1e-6


@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('targets', [0, 3, 14, 30])
def test_tiles_of_the_vocabulary(targets, cap):
  """1,009 * 6 rows in tiles of 1,009: sums run relative to the top so far."""
  rng = np.random.default_rng(1)
  hidden, _, _ = _inputs()
  embedding = rng.normal(scale=0.3, size=(6 * V, D)).astype(np.float32)
  embedding *= np.repeat([3, 1, 0.1, 4, 1, 2], V)[:, None]  # The top moves.
  tokens = rng.integers(0, 6 * V, (B, L), np.int32)
  mask = _mask(targets)
  ours = functools.partial(
    loss.target_nll, weight=0.25, final_softcap=cap, chunk=8, tile=1100
  )
  run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))
  value, grads = run(hidden, embedding, tokens, mask)
  want, want_grads = _naive_in_float64(hidden, embedding, tokens, mask, cap=cap)
  assert float(value) == pytest.approx(0.25 * float(want), rel=1e-6)
  for got, exact in zip(grads, want_grads, strict=True):
    if targets:
      assert _relative_error(got, 0.25 * exact) < 2e-6
    assert np.isfinite(got).all() and (targets or not got.any())
  # With a frozen embedding nothing of a target is as wide as the vocabulary.
  shapes = _shapes_compiled(
    jax.jit(jax.grad(ours)), hidden, embedding, tokens, mask
  )
  large = {s for s in shapes if math.prod(s) > 2 * 6 * V}
  assert {math.prod(s) for s in large} == {V * D}  # A tile of the embedding.


@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('smoothing', [0.1, 0.9])
def test_label_smoothing_is_the_one_of_optax(smoothing, cap):
  """Against optax.smooth_labels, in float64, with several tiles and chunks."""
  hidden, embedding, tokens = _inputs()
  embedding = np.concatenate([embedding, 2 * embedding])
  mask = _mask(14)

  def naive(hidden, embedding):
    logits = jnp.einsum('bld,vd->blv', hidden, embedding)[:, :-1]
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    labels = jax.nn.one_hot(tokens[:, 1:], 2 * V, dtype=jnp.float64)
    labels = optax.smooth_labels(labels, smoothing)
    losses = optax.softmax_cross_entropy(logits, labels)
    return jnp.sum(losses * mask[:, 1:])

  run = functools.partial(
    loss.target_nll, final_softcap=cap, smoothing=smoothing, chunk=4, tile=V
  )
  value, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(
    hidden, embedding, tokens, mask
  )
  with jax.enable_x64(True):
    want, want_grads = jax.device_get(
      jax.value_and_grad(naive, argnums=(0, 1))(
        np.float64(hidden), np.float64(embedding)
      )
    )
  assert want.dtype == np.float64
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  for got, exact in zip(grads, want_grads, strict=True):
    assert _relative_error(got, exact) < 1e-6


@pytest.mark.parametrize(
  ('chunk', 'targets', 'taken'),
  [
    (288, 133, 144),
    (288, 144, 144),
    (288, 145, 160),
    (288, 289, 2 * 192),
    (576, 540, 544),
    (576, 1080, 2 * 576),
    (576, 100, 192),
  ],
)
def test_a_chunk_is_hardly_wider_than_its_targets(chunk, targets, taken):
  chunks = -(-targets // chunk)
  widths = loss.chunk_widths(chunk, None, several=chunks > 1)
  each = min(w for w in widths if w >= targets / chunks)
  assert chunks * each == taken and widths[-1] == chunk


# Of 160 places. Logits of up to 96 or 128 targets stand inside the gradient,
# where D is as large; those of a wider chunk or of two stand beside it.
@pytest.mark.parametrize('targets', [3, 96, 97, 128, 129, 160])
@pytest.mark.parametrize(('d', 'chunk'), [(128, 128), (100, 144)])
def test_chunks_of_each_width_are_the_naive_ones(d, chunk, targets):
  assert loss.chunk_widths(128, None) == [96, 128]
  assert loss.chunk_widths(144, None) == [96, 128, 144]
  rng = np.random.default_rng(targets)
  hidden = rng.normal(size=(4, 41, d)).astype(np.float32)
  embedding = rng.normal(scale=0.3, size=(V, d)).astype(np.float32)
  tokens = rng.integers(0, V, (4, 41), np.int32)
  mask = np.zeros((4, 41), bool)
  mask[:, 1:].flat[rng.permutation(160)[:targets]] = True
  args = hidden, embedding, tokens, mask
  value, grads = _ours(None, chunk)(*args)
  want, want_grads = _naive_in_float64(*args)
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  for got, exact in zip(grads, want_grads, strict=True):
    assert _relative_error(got, exact) < 1e-6


def test_logits_of_a_single_chunk_take_no_memory():
  """They stand in the gradient, which is an output."""
  d, v = 64, 6 * V
  rows = jax.ShapeDtypeStruct((3, 21), jnp.int32)  # 60 places.
  args = (
    jax.ShapeDtypeStruct((3, 21, d), jnp.float32),
    jax.ShapeDtypeStruct((v, d), jnp.float32),
    rows,
    rows,
  )

  def temporary(chunk):
    run = functools.partial(loss.target_nll, chunk=chunk, tile=V)
    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
    memory = run.lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary(60) < 0.5 * v * 60 * 4
  assert temporary(40) > v * 40 * 4  # Up to two chunks.


@given(
  bits=st.lists(st.booleans(), min_size=B * L, max_size=B * L),
  seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_mask_at_all(bits, seed):
  mask = np.array(bits).reshape(B, L)
  hidden, embedding, tokens = _inputs(seed)
  value, grads = _ours()(hidden, embedding, tokens, mask)
  want, want_grads = _naive_in_float64(hidden, embedding, tokens, mask)
  assert float(value) == pytest.approx(float(want), rel=1e-6, abs=1e-9)
  for got, exact in zip(grads, want_grads, strict=True):
    scale = np.linalg.norm(exact) + 1e-9
    assert np.linalg.norm(np.float64(got) - exact) < 1e-6 * scale


def test_example_of_the_docstring():
  # All logits equal: -log p = log V for each of two targets.
  value, _ = _ours()(
    np.zeros((1, 5, D), np.float32),
    np.ones((V, D), np.float32),
    np.array([[2, 10, 11, 20, 1]], np.int32),
    np.array([[0, 0, 0, 1, 1]], bool),
  )
  assert float(value) == pytest.approx(2 * math.log(1009), rel=1e-6)


def test_targets_are_predicted_from_the_place_before():
  # State l says nothing but 'the next token is l'.
  states = 50 * np.eye(8, dtype=np.float32)
  tokens = np.array([[7, 0, 1, 2, 3, 4, 5, 6]])
  value, _ = _ours()(states[None], states, tokens, tokens >= 0)
  assert float(value) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize('cap', [None, 2.0])
def test_no_targets_no_loss(cap):
  value, grads = _ours(cap)(*_inputs(), _mask(0))
  assert float(value) == 0.0
  for grad in grads:
    assert np.isfinite(grad).all()
    assert not np.any(grad)


def test_every_row_counts():
  """The tutorial read row 0 only."""
  hidden, embedding, tokens = _inputs()
  mask = _mask(14)
  value, (d_hidden, _) = _ours()(hidden, embedding, tokens, mask)
  alone = []
  for row in range(B):
    only = mask & (np.arange(B) == row)[:, None]
    alone.append(float(_ours()(hidden, embedding, tokens, only)[0]))
    assert np.any(d_hidden[row])
  assert min(alone) > 1.0
  assert float(value) == pytest.approx(sum(alone), rel=1e-6)
  for row in range(B):
    other = tokens.copy()
    other[row, -1] = (other[row, -1] + 1) % V
    changed, _ = _ours()(hidden, embedding, other, mask)
    assert abs(float(changed) - float(value)) > 1e-2, row


def test_masked_places_count_for_nothing():
  hidden, embedding, tokens = _inputs()
  mask = _mask(14)
  used = np.zeros((B, L), bool)
  used[:, :-1] = mask[:, 1:]  # States that predict a target.
  before = _ours()(hidden, embedding, tokens, mask)
  assert not np.any(before[1][0][~used])
  assert np.any(before[1][0][used], axis=-1).all()
  rng = np.random.default_rng(1)
  hidden = np.where(used[..., None], hidden, 9.0 * rng.normal(size=(B, L, D)))
  spare = ~mask
  spare[:, 0] = True  # Set in the mask, and yet no target.
  tokens = np.where(spare, rng.integers(0, V, (B, L)), tokens)
  after = _ours()(np.float32(hidden), embedding, np.int32(tokens), mask)
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize('cap', [None, 30.0])
def test_large_logits_stay_finite(cap):
  hidden, embedding, tokens = _inputs()
  args = (1e3 * hidden, embedding, tokens, _mask(14))
  value, grads = _ours(cap)(*args)
  want, want_grads = _naive_in_float64(*args, cap=cap)
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  for got, exact in zip(grads, want_grads, strict=True):
    assert np.isfinite(got).all()
    # Logits of 1500 are good to 1e-4 in float32, and their exponents as well.
    assert _relative_error(got, exact) < 1e-3


def test_gradients_scale_with_the_cotangent():
  hidden, embedding, tokens = map(jnp.asarray, _inputs())
  mask = jnp.asarray(_mask(14))

  def mean(hidden, embedding):
    total = loss.target_nll(hidden, embedding, tokens, mask, chunk=4)
    return total / 14

  got = jax.jit(jax.grad(mean, argnums=(0, 1)))(hidden, embedding)
  _, want = _naive_in_float64(hidden, embedding, tokens, mask)
  for g, w in zip(got, want, strict=True):
    assert _relative_error(g, w / 14) < 1e-6


def test_a_loss_that_is_only_logged_adds_no_gradient():
  hidden, embedding, tokens = map(jnp.asarray, _inputs())
  mask = jnp.asarray(_mask(14))

  def other(hidden, embedding):
    nll = loss.target_nll(hidden, embedding, tokens, mask)
    return jnp.sum(hidden**2), nll

  run = jax.jit(jax.grad(other, argnums=(0, 1), has_aux=True))
  grads, nll = run(hidden, embedding)
  assert float(nll) > 1.0
  np.testing.assert_allclose(grads[0], 2 * hidden, rtol=1e-6)
  assert not np.any(grads[1])


@pytest.mark.parametrize('argnums', [(0,), (1,), (0, 1)])
def test_each_gradient_can_be_had_alone(argnums):
  args = (*_inputs(), _mask(14))
  _, want = _naive_in_float64(*args, cap=2.0)
  _, got = _ours(2.0, 4, argnums)(*args)
  for grad, arg in zip(got, argnums, strict=True):
    assert _relative_error(grad, want[arg]) < 1e-6


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
  mask = _mask(14)
  value, grads = _ours()(hidden, embedding, tokens, mask)
  assert value.dtype == jnp.float32
  assert grads[0].dtype == hidden_dtype and grads[1].dtype == embedding_dtype
  want, want_grads = _naive_in_float64(
    np.asarray(hidden, np.float32),
    np.asarray(embedding, np.float32),
    tokens,
    mask,
  )
  # Products are float32 whatever the inputs are. The trace says so; a CPU may
  # keep more digits than it is asked for, and so would not tell.
  args = (hidden, embedding, tokens, mask)
  products = [r for r in _results_traced(_ours(), *args) if 'dot' in r[0]]
  assert len(products) == 3 * 2  # For one chunk of 4, and for several.
  assert all(dtype == jnp.float32 for _, _, dtype in products)
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  # d nll / d logits goes through the second product with 8 bits.
  for got, exact in zip(grads, want_grads, strict=True):
    assert _relative_error(np.asarray(got, np.float32), exact) < 1e-2


def _equations(jaxpr):
  """The equations of a traced function, those inside of loops included."""
  for eqn in jaxpr.eqns:
    inner = [
      x.jaxpr if isinstance(x, core.ClosedJaxpr) else x
      for x in jax.tree.leaves(list(eqn.params.values()))
      if isinstance(x, core.Jaxpr | core.ClosedJaxpr)
    ]
    if not inner:
      yield eqn
    for x in inner:
      yield from _equations(x)


def _results_traced(fn, *args):
  """(primitive, shape, dtype) of every result; sorted dimensions in a shape."""
  for eqn in _equations(jax.make_jaxpr(fn)(*args).jaxpr):
    for v in eqn.outvars:
      yield eqn.primitive.name, tuple(sorted(v.aval.shape)), v.aval.dtype


def _shapes_traced(fn, *args):
  """How often each shape, transposed or not, is a result in a function.

  But for what reads a tile of something that is there.
  """
  results = _results_traced(fn, *args)
  return collections.Counter(s for p, s, _ in results if p != 'dynamic_slice')


def _shapes_compiled(fn, *args):
  """How often each shape is a result in the program that XLA makes of it."""
  text = jax.jit(fn).lower(*args).compile().as_text()
  found = collections.Counter()
  # Such as  %dot.3 = f32[4,1009]{1,0} dot(%a, %b), …  or  = (f32[], s32[4]) …
  for line in re.findall(r'^\s*(?:ROOT )?%\S+ = .*', text, re.M):
    result, op = re.search(r'= (\(.*?\)|\S+) ([\w-]+)\(', line).groups()
    if op in ('parameter', 'tuple', 'get-tuple-element', 'while', 'bitcast'):
      continue  # Names for what is there already.
    for dims in re.findall(r'\w+\[([\d,]*)\]', result):
      found[tuple(sorted(int(n) for n in dims.split(',') if n))] += 1
  return found


both_ways = pytest.mark.parametrize(
  'shapes_of', [_shapes_traced, _shapes_compiled]
)


@both_ways
@pytest.mark.parametrize('cap', [None, 2.0])
def test_logits_of_all_places_are_never_built(shapes_of, cap):
  args = (*_inputs(), _mask(14))
  full = {B * L * V, B * (L - 1) * V}
  naive = shapes_of(functools.partial(_naive, cap=cap), *args)
  assert full & {math.prod(s) for s in naive}  # The search does find them.
  for argnums in ((0,), (0, 1)):
    shapes = shapes_of(_ours(cap, 4, argnums), *args)
    assert shapes[4, V]  # One chunk of logits.
    vocabulary_wide = {
      s for s in shapes if 0 not in s and math.prod(s) % V == 0
    }
    widths = loss.chunk_widths(4, None)
    of_chunks = {s for w in widths for s in ((w, V), (1, w, V))}
    assert vocabulary_wide <= of_chunks | {
      (V,),
      (1, V),
      (D, V),
      (V, D),
      (1, D, V),
    }


@both_ways
def test_a_frozen_embedding_costs_no_gradient(shapes_of):
  args = (*_inputs(), _mask(14))
  trained = shapes_of(_ours(2.0, 4, (0, 1)), *args)
  assert trained[D, V]
  frozen = shapes_of(_ours(2.0, 4, (0,)), *args)
  assert not frozen[D, V]


def test_what_is_not_asked_for_costs_nothing():
  args = (*_inputs(), _mask(14))
  value = functools.partial(loss.target_nll, chunk=4)
  for fn, d_hidden, d_embedding in (
    (value, False, False),
    (_ours(None, 4, (0,)), True, False),
    (_ours(None, 4, (1,)), False, True),
  ):
    shapes = _shapes_traced(fn, *args)
    assert shapes[4, V]
    assert bool(shapes[D, V]) == d_embedding
    # The states themselves, reshaped, and more only for their gradient.
    assert (shapes[D, B * (L - 1)] > 1) == d_hidden


@pytest.mark.parametrize(
  'bad',
  [
    {'hidden': np.zeros((L, D), np.float32)},
    {'embedding': np.zeros((1, V, D), np.float32)},
    {'tokens': np.zeros((B, L - 1), np.int32)},
    {'target_mask': np.zeros((B, L - 1), bool)},
    {'target_mask': np.zeros((B,), bool)},
  ],
)
def test_wrong_shapes_are_named(bad):
  hidden, embedding, tokens = _inputs()
  args = {
    'hidden': hidden,
    'embedding': embedding,
    'tokens': tokens,
    'target_mask': _mask(3),
  }
  with pytest.raises(AssertionError, match=r'rank|shape'):
    loss.target_nll(**(args | bad))
