"""The model against the `gemma` package; see gemma_oracle.py."""

import collections
import functools
import math

from gemma import layers as gemma_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import embedding
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import products
from tests.fixtures import gemma_oracle

FAMILIES = gemma_oracle.FAMILIES
LENGTH = 15
EXAMPLES = (6, 5, 3, 9, 6, 15)  # Their lengths.
# Which examples stand in each row of [B, L]; what is left of a row is padding.
ALONE = ((0,), (1,), (2,), (3,), (4,), (5,))
PACKED = ((0, 1, 2), (), (3, 4), (5,), (), ())


@functools.cache
def _params(name: str) -> parameters.Params:
  return gemma_oracle.random_params(FAMILIES[name])


def _example_tokens(i):
  tokens = np.random.default_rng(i).integers(0, 61, EXAMPLES[i], np.int32)
  tokens[1] = 0  # Gemma's pad id, which is an ordinary token as well.
  return tokens


def _batch(layout):
  """Tokens, positions, segment_ids [B, L], as data/batches.py has them."""
  shape = (len(layout), LENGTH)
  tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
  for row, start, end, i, segment in _places(layout):
    tokens[row, start:end] = _example_tokens(i)
    positions[row, start:end] = np.arange(end - start)
    segment_ids[row, start:end] = segment
  return tokens, positions, segment_ids


def _places(layout):
  """(row, start, end, example, segment) of each example."""
  for row, examples in enumerate(layout):
    end = 0
    for segment, i in enumerate(examples, 1):
      start, end = end, end + EXAMPLES[i]
      yield row, start, end, i, segment


def _examples_in(array, layout):
  """Cuts [B, L, …] into [length, …] of example 0, 1, …."""
  places = sorted(_places(layout), key=lambda place: place[3])
  return [array[row, start:end] for row, start, end, _, _ in places]


def _our_logits(cfg, params, tokens, positions, segment_ids, **kwargs):
  x = model.forward(cfg, params, tokens, positions, segment_ids, **kwargs)
  logits = x @ params['embedding'].T.astype(x.dtype)
  return attention.softcap(logits, cfg.final_softcap)


def _normal(*shape):
  return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def _weights(cfg, layout):
  """A random cotangent of the logits for each example, zero at padding."""
  weights = np.zeros((len(layout), LENGTH, cfg.vocab_size), np.float32)
  for row, start, end, i, _ in _places(layout):
    rng = np.random.default_rng(100 + i)
    weights[row, start:end] = rng.normal(size=(end - start, cfg.vocab_size))
  return weights


@functools.cache
def _program(logits_fn, cfg, **static):
  """(params, inputs, weights) -> logits, gradients of sum(logits * weights)."""

  def weighted(params, inputs, weights):
    logits = logits_fn(cfg, params, *inputs, **static)
    return jnp.sum(logits.astype(jnp.float32) * weights), logits

  def run(params, inputs, weights):
    grads, logits = jax.grad(weighted, has_aux=True)(params, inputs, weights)
    return logits, grads

  return jax.jit(run)


def _run(name, layout, inputs=None, **static):
  """Our logits, a [length, V] for each example, and gradients."""
  cfg = FAMILIES[name]
  logits, grads = _program(_our_logits, cfg, **static)(
    _params(name), inputs or _batch(layout), _weights(cfg, layout)
  )
  return _examples_in(np.asarray(logits), layout), grads


@functools.cache
def _oracle_run(name):
  """The same of the oracle, which sees each example in a row of its own."""
  cfg = FAMILIES[name]
  tokens, positions, segment_ids = _batch(ALONE)
  mask = np.tril(np.ones((LENGTH, LENGTH), bool)) & (segment_ids != 0)[:, None]
  logits, grads = _program(gemma_oracle.logits, cfg)(
    _params(name), (tokens, positions, mask), _weights(cfg, ALONE)
  )
  return _examples_in(np.asarray(logits), ALONE), grads


def _relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  assert np.linalg.norm(want) > 0, 'nothing to compare'
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def _assert_near(got, want, tolerance):
  """Compares whole arrays, leaf by leaf, by the norm of the difference."""
  errors = jax.tree.map(_relative_error, got, want)
  for path, error in jax.tree.leaves_with_path(errors):
    assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize('layout', [ALONE, PACKED], ids=['alone', 'packed'])
@pytest.mark.parametrize('name', FAMILIES)
def test_values_and_gradients_are_the_oracles(name, layout):
  logits, grads = _run(name, layout)
  want, want_grads = _oracle_run(name)
  _assert_near(logits, want, 1e-5)
  # The gradient of every parameter, summed over all examples.
  assert jax.tree.structure(grads) == jax.tree.structure(_params(name))
  _assert_near(grads, want_grads, 1e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_packed_row_equals_each_example_alone(name):
  """Ours against ours, which leaves less room than two implementations."""
  alone, packed = _run(name, ALONE), _run(name, PACKED)
  _assert_near(packed[0], alone[0], 1e-6)
  _assert_near(packed[1], alone[1], 2e-6)


@pytest.mark.parametrize('name', FAMILIES)
def test_padding_changes_nothing(name):
  before = _run(name, PACKED)
  tokens, positions, segment_ids = _batch(PACKED)
  padding = segment_ids == 0
  tokens[padding] = 17
  positions[padding] = 5
  after = _run(name, PACKED, (tokens, positions, segment_ids))
  jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
  _assert_near(after[1], before[1], 1e-6)
  # An empty softmax in a padded query would be NaN, and so would 0 * NaN be in
  # every gradient.
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(before))


def test_the_future_changes_nothing():
  tokens, positions, segment_ids = _batch(PACKED)
  before = _run('gemma3', PACKED)[0][5]
  tokens[3, 9] = (tokens[3, 9] + 1) % 61  # Row 3 holds example 5.
  after = _run('gemma3', PACKED, (tokens, positions, segment_ids))[0][5]
  np.testing.assert_array_equal(after[:9], before[:9])
  assert (after[9:] != before[9:]).any(axis=-1).all()


def test_rms_norm_by_hand_and_against_the_oracle():
  # rms([3, 4]) = sqrt(12.5); the second factor is 1 + 1.
  got = model.rms_norm(jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0]), 1.0)
  want = np.array([3.0, 8.0]) / math.sqrt(12.5)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # A vector as small as this one shows the 1e-6 under the root.
  x = 1e-3 * _normal(2, 3, 5)
  scale = np.arange(5.0, dtype=np.float32)
  oracle = gemma_layers.RMSNorm().apply({'params': {'scale': scale}}, x)
  np.testing.assert_allclose(model.rms_norm(x, scale, 1.0), oracle, rtol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(100 * _normal(4, 640), jnp.bfloat16)
  scale = 0.1 * _normal(640)
  got = model.rms_norm(x, scale, 1.0)
  want = model.rms_norm(x.astype(jnp.float32), scale, 1.0).astype(jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want)


def test_remat_gives_the_same_gradients():
  want = _run('gemma3', PACKED)
  _assert_near(_run('gemma3', PACKED, remat='full'), want, 1e-5)


def test_remat_keeps_only_the_input_of_each_layer():
  cfg, params = FAMILIES['gemma3'], _params('gemma3')
  batch = _batch(PACKED)
  rows = len(PACKED)

  def kept(remat):
    # The leaves of a vjp function are what waits for the backward pass.
    def run(params):
      return model.forward(cfg, params, *batch, remat=remat)

    backward = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
    shapes = [x.shape for x in jax.tree.leaves(backward)]
    return [s for s in shapes if s[:2] == (cfg.num_layers, rows)]

  assert kept('full') == [(cfg.num_layers, rows, LENGTH, cfg.embed_dim)]
  # Else the line above would show nothing.
  assert len(kept('none')) > len(kept('dots')) > 5
  # What goes into the four norms, and into the products after two of them.
  widths = [s[-1] for s in kept('none')]
  assert widths.count(cfg.embed_dim) == 6


def test_bfloat16_activations_keep_float32_parameters():
  want, _ = _run('gemma3', PACKED)
  got, grads = _run('gemma3', PACKED, dtype=jnp.bfloat16)
  for x, y in zip(got, want, strict=True):
    assert x.dtype == jnp.bfloat16 and y.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % for each of some fifty roundings.
    assert 1e-4 < _relative_error(x, y) < 0.05
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('argnums', [(0,), (1,), (0, 1)])
def test_gradients_of_a_product_are_autodiffs(argnums):
  """And what is frozen costs no product."""
  x, w = _normal(2, 3, 7), _normal(7, 5)

  def run(product):
    def total(x, w):
      return jnp.sum(jnp.sin(product(x, w)))

    return jax.value_and_grad(total, argnums)

  got, want = run(products.matmul), run(jnp.matmul)
  for a, b in zip(*map(jax.tree.leaves, (got(x, w), want(x, w))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  text = str(jax.make_jaxpr(got)(x, w))
  assert text.count('dot_general[') == 1 + len(argnums)


@pytest.mark.parametrize('rank', (0, 2))
@pytest.mark.parametrize('name', ('q', 'o', 'gate'))
def test_heads_may_be_axes_of_the_product(name, rank):
  """And it has the same gradients, of x and of the weights."""
  width = {'q': (7, 20), 'o': (20, 7), 'gate': (7, 11)}[name]
  layer, heads = {name: _normal(*width)}, (4, 5) if name == 'q' else None
  if rank:
    layer |= {f'{name}_lora_a': _normal(width[0], rank)}
    layer |= {f'{name}_lora_b': _normal(rank, width[1])}
  x = _normal(2, 4, 3, 5) if name == 'o' else _normal(2, 3, 7)

  def run(dense):
    def total(x, layer):
      y = dense(layer, name, x, heads)
      return jnp.sum(jnp.sin(y)), y

    return jax.grad(total, (0, 1), has_aux=True)(x, layer)

  got, want = run(model.dense_of_heads), run(model.dense)
  assert got[1].shape == ((2, 4, 3, 5) if heads else (2, 3, width[1]))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


def test_gradient_of_the_embedding_is_autodiffs():
  """Added to what is there; a token that stands twice counts twice."""
  table, d_x, before = _normal(11, 6), _normal(2, 4, 6), _normal(11, 6) + 1
  tokens = np.array([[3, 0, 3, 10], [9, 3, 1, 0]])

  def total(table):
    return jnp.sum(embedding.embed(table, tokens, jnp.float32) * d_x)

  got = embedding.add_grad(jnp.asarray(before), tokens, d_x, None)
  np.testing.assert_allclose(got, before + jax.grad(total)(table), rtol=1e-5)
  np.testing.assert_allclose(
    embedding.embed(table, tokens, jnp.float32),
    table[tokens] * 6**0.5,
    rtol=1e-6,
  )


_INT = np.zeros((2, 3), np.int32)
_HEADS = np.zeros((2, 4, 3, 8), np.float32)
_ONE_KEY = np.zeros((2, 1, 3, 8), np.float32)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda f: f(_INT, _INT, _INT[:1]), 'shape'),
    (lambda f: f(_INT, _INT[0], _INT), 'shape'),
    (lambda f: f(_INT, _INT, _INT[:, :2]), 'shape'),
    (lambda f: f(_INT * 1.0, _INT, _INT), 'type'),
    (lambda _: embedding.embed(_HEADS[0, 0], _INT[0], jnp.float32), 'rank'),
    (lambda _: model.rms_norm(jnp.ones((2, 8)), jnp.ones(7), 1.0), 'suffix'),
    (lambda _: attention.apply_rope(_HEADS, _HEADS, _HEADS[..., 0]), 'shape'),
    (lambda _: attention.rope_tables(FAMILIES['gemma3'], _INT[0]), 'rank'),
    (
      lambda _: attention.attend(
        FAMILIES['gemma1_multi_query'], _HEADS, _ONE_KEY, _ONE_KEY, _INT
      ),
      'shape',
    ),
  ],
)
def test_wrong_shapes_are_named(call, message):
  forward = functools.partial(
    model.forward, FAMILIES['gemma1_multi_query'], _params('gemma1_multi_query')
  )
  with pytest.raises(AssertionError, match=message):
    call(forward)


def test_no_two_dimensions_of_the_small_models_agree():
  """Guards the other tests: equal dimensions would hide swapped axes."""
  for cfg in FAMILIES.values():
    dims = [
      cfg.vocab_size,
      cfg.embed_dim,
      cfg.hidden_dim,
      cfg.num_heads * cfg.head_dim,
      cfg.head_dim,
      LENGTH,
    ]
    assert max(collections.Counter(dims).values()) == 1
