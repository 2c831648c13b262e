"""The cache against the whole forward pass at every step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import lora
from mt.gemma import model
from mt.translate import decode
from mt.translate import kv_cache
from mt.translate import search as search_lib
from tests.translate import tiny

FAMILIES = tiny.FAMILIES
each_family = pytest.mark.parametrize('name', FAMILIES)

# Prompts of all kinds: full, one token, shorter and longer than the windows.
LENGTHS = np.array([9, 1, 3, 6], np.int32)
WIDTH = 9  # P.
NEW = 12
NO_STOP = np.array([-1], np.int32)


def _prompts(seed=3):
  """[B, P] with 0 where a prompt has ended, and 0 inside as well."""
  tokens = np.random.default_rng(seed).integers(
    1, tiny.VOCAB, (4, WIDTH), np.int32
  )
  tokens[:, 2] = 0  # Gemma's pad id is an ordinary token.
  tokens[np.arange(WIDTH) >= LENGTHS[:, None]] = 0
  return tokens


def _read(tokens, lengths):
  """All but the last token of each prompt, right-aligned: [B, P].

  What fills up a row is what stands at its end in `tokens`.
  """
  at = np.arange(WIDTH) - WIDTH + lengths[:, None] - 1
  return jnp.asarray(tokens)[np.arange(len(tokens))[:, None], at]


def _continue(cfg, params, tokens, lengths, time):
  """Greedy search after a prefill: the final State."""
  search, b = search_lib.Search(), len(lengths)
  last = jnp.asarray(tokens)[jnp.arange(b), lengths - 1]
  new = decode.prefill(
    cfg, params, _read(tokens, lengths), lengths - 1, jnp.float32
  )
  cache = kv_cache.empty(cfg, b, WIDTH + NEW, jnp.float32, 1)
  # What has not been written yet is not seen, whatever it is.
  cache = jax.tree.map(lambda x: jnp.full_like(x, 99.0), cache)
  cache |= {'time': jnp.int32(time)}
  cache = kv_cache.insert(cache, new, jnp.arange(b), 1)
  numbers, limits = jnp.zeros(b, jnp.int32), jnp.full(b, NEW, jnp.int32)
  state = search_lib.start(search, numbers, last, lengths, limits, NEW)
  step = functools.partial(decode.step, cfg, params)
  return search_lib.run(search, step, cache, state, NO_STOP)[1]


def _extend(cfg, params, cache, tokens, lengths):
  """Tokens [B, L] of rows whose prompts, of these lengths, end together."""
  slots, place = jnp.arange(cache['k'][0].shape[2]), cache['time']
  at = place + jnp.arange(tokens.shape[1])
  distance, first = at[:, None] - slots, WIDTH - lengths[:, None]
  seen = (distance >= 0) & (slots >= first[..., None])
  windows = {'L': cfg.window or 2**30, 'G': 2**30}
  seen = {kind: seen & (distance < n) for kind, n in windows.items()}
  return decode.extend(cfg, params, cache, tokens, at - first, seen)


def _step(cfg, params, cache, tokens, positions):
  """A token [B] of a single hypothesis of each row, at its position [B]."""
  made = jnp.zeros_like(positions)
  ancestors = jnp.zeros((len(tokens), 1, NEW), jnp.int32)
  tokens = tokens[:, None]
  return decode.step(cfg, params, cache, tokens, positions, made, ancestors)


@functools.cache
def _greedy(name):
  compiled = jax.jit(functools.partial(_continue, FAMILIES[name]))
  params = tiny.params(name)

  def call(tokens, lengths=LENGTHS, time=0):
    state = compiled(params, tokens, lengths, time)
    assert state.counts.ravel().tolist() == [NEW] * 4
    return np.asarray(state.tokens[:, 0])

  return call


@functools.cache
def _forward(name):
  """Hidden states [B, L, D] of padded rows."""

  @jax.jit
  def run(params, tokens, lengths):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (at < lengths[:, None]).astype(jnp.int32)
    return model.forward(FAMILIES[name], params, tokens, at, segments)

  return functools.partial(run, tiny.stacked(name))


def _without_cache(name, tokens, lengths, steps):
  """[B, steps], from a whole forward pass for each of them."""
  cfg, table = FAMILIES[name], tiny.stacked(name)['embedding']
  rows = np.arange(len(tokens))
  buffer = np.zeros((len(tokens), WIDTH + NEW), np.int32)
  buffer[:, :WIDTH] = tokens
  out = []
  for t in range(steps):
    hidden = _forward(name)(buffer, lengths + t)
    logits = np.asarray(hidden)[rows, lengths + t - 1] @ table.T
    logits = np.asarray(attention.softcap(logits, cfg.final_softcap))
    best = np.sort(logits, axis=-1)
    assert np.min(best[:, -1] - best[:, -2]) > 1e-4, (
      'a near tie: change the seed'
    )
    out.append(logits.argmax(-1))
    buffer[rows, lengths + t] = out[-1]
  return np.stack(out, axis=1)


@functools.cache
def _expected(name):
  return _without_cache(name, _prompts(), LENGTHS, NEW)


@each_family
def test_the_cache_changes_nothing(name):
  out = _greedy(name)(_prompts())
  np.testing.assert_array_equal(out, _expected(name))
  # A model that says one word over and over would prove little.
  assert all(len(set(row)) >= 4 for row in out.tolist())


@each_family
@pytest.mark.parametrize('time', [1, 5, WIDTH + NEW - 3, 1000])
def test_a_text_may_begin_at_any_slot(name, time):
  out = _greedy(name)(_prompts(), time=time)
  np.testing.assert_array_equal(out, _expected(name))


@each_family
def test_neighbours_change_nothing(name):
  """Neither the other rows, nor how far the batch is padded."""
  out = _greedy(name)(_prompts())
  others = _prompts(seed=4)
  others[2] = _prompts()[2]
  lengths = np.array([2, 9, LENGTHS[2], 8], np.int32)
  mixed = _greedy(name)(others, lengths)
  np.testing.assert_array_equal(mixed[2], out[2])
  assert not np.array_equal(mixed[0], out[0])
  # What stands in the padding does not matter.
  dirty = _prompts()
  dirty[np.arange(WIDTH) >= LENGTHS[:, None]] = 55
  np.testing.assert_array_equal(_greedy(name)(dirty), out)


@each_family
def test_hidden_states_are_those_of_the_forward_pass(name):
  """With given tokens, so that one wrong step cannot hide behind argmax."""
  cfg = FAMILIES[name]
  tokens = np.random.default_rng(8).integers(0, tiny.VOCAB, (4, WIDTH + NEW))
  tokens = tokens.astype(np.int32)
  want = np.asarray(_forward(name)(tokens, LENGTHS + NEW))
  params = tiny.params(name)
  rows = np.arange(4)

  @jax.jit
  def run(params):
    """Reads each row's prompt, then a token at a time, then two."""
    extend = functools.partial(_extend, cfg, params, lengths=LENGTHS)
    cache = kv_cache.empty(cfg, 4, WIDTH + NEW + 1, jnp.float32)
    at = LENGTHS[:, None] - WIDTH + np.arange(WIDTH)
    first = jnp.array(tokens)[rows[:, None], np.maximum(at, 0)]
    prompt, cache = extend(cache, first)

    def step(cache, t):
      token = jnp.array(tokens)[rows, LENGTHS + t]
      hidden, cache = extend(cache, token[:, None])
      return cache, hidden[:, 0]

    cache, steps = jax.lax.scan(step, cache, jnp.arange(NEW - 2))
    at = LENGTHS + NEW - 2
    two = jnp.array(tokens)[rows[:, None], at[:, None] + jnp.arange(2)]
    last, _ = extend(cache, two)
    return prompt, steps, last

  prompt, steps, last = map(np.asarray, run(params))
  for row, n in enumerate(LENGTHS):
    got = [*prompt[row, -n:], *steps[:, row], *last[row]]
    exact = want[row, : n + NEW]
    error = np.linalg.norm(got - exact, axis=-1)
    assert np.max(error / np.linalg.norm(exact, axis=-1)) < 2e-5


def test_a_long_prompt_is_read_in_parts():
  cfg, lengths = FAMILIES['gemma3'], np.array([12, 7], np.int32)
  tokens = np.random.default_rng(9).integers(0, tiny.VOCAB, (2, 12), np.int32)
  params = tiny.params()

  def caches(chunk):
    return decode.prefill(cfg, params, tokens, lengths, 'float32', chunk)

  whole, parts = caches(12), caches(4)
  assert whole['time'] == parts['time'] == 12
  for x in 'kv':
    assert len(whole[x]) == cfg.num_layers
    for a, b in zip(whole[x], parts[x], strict=True):
      assert a.shape == (2, 2, 12, 8)
      for row, n in enumerate(lengths):  # What fills up a row is not seen.
        got, want = b[row, :, -n:], a[row, :, -n:]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  with pytest.raises(AssertionError):
    caches(5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cache_and_activations_have_the_asked_dtype(dtype):
  params = tiny.params()

  def run(params):
    cfg, tokens = FAMILIES['gemma3'], jnp.asarray(_prompts())
    cache = decode.prefill(cfg, params, tokens, LENGTHS, dtype)
    hidden, cache = _extend(cfg, params, cache, tokens[:, :1], LENGTHS)
    at = jnp.asarray(LENGTHS - 1)
    logits, _ = _step(cfg, params, cache, tokens[:, 0], at)
    return hidden, logits, cache

  hidden, logits, cache = jax.eval_shape(run, params)
  assert hidden.dtype == dtype and hidden.shape == (4, 1, 24)
  assert logits.dtype == jnp.float32 and logits.shape == (tiny.VOCAB, 4)
  assert len(cache['k']) == len(cache['v']) == FAMILIES['gemma3'].num_layers
  for x in (*cache['k'], *cache['v']):
    assert x.dtype == dtype and x.shape == (4, 2, WIDTH, 8)


def test_logits_are_those_of_the_vocabulary():
  """Softcap keeps the order, so that only the values show it."""
  name, cfg = 'gemma2', FAMILIES['gemma2']
  hidden = np.asarray(_forward(name)(_prompts(), LENGTHS))
  want = hidden[np.arange(4), LENGTHS - 1] @ tiny.stacked(name)['embedding'].T
  assert np.abs(want).max() > 1.1 * cfg.final_softcap, 'the cap should matter'
  want = np.asarray(attention.softcap(want, cfg.final_softcap))

  @jax.jit
  def run(params):
    tokens = _read(_prompts(), LENGTHS)
    cache = decode.prefill(cfg, params, tokens, LENGTHS - 1, jnp.float32)
    last = jnp.asarray(_prompts())[np.arange(4), LENGTHS - 1]
    return _step(cfg, params, cache, last, jnp.asarray(LENGTHS - 1))[0]

  got = run(tiny.params(name))
  np.testing.assert_allclose(got.T, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_unstack_adds_the_low_rank_products(dtype):
  """In float32, and before it converts to the dtype."""
  cfg, key = FAMILIES['gemma3'], jax.random.key(0)
  parts = lora.partition(cfg, tiny.stacked(), 'lora', rank=4, key=key)
  factors = {
    k: 0.3 * jax.random.normal(key, x.shape) for k, x in parts[0].items()
  }
  params = lora.merge(factors, parts[1], lora_scale=0.5)
  got = decode.unstack(params, dtype)
  want = decode.unstack(lora.fold(params), dtype)
  assert got['layers'][0].keys() == tiny.stacked()['layers'].keys()
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-2 if dtype else 1e-5)
  plain = decode.unstack(tiny.stacked(), dtype)
  assert not np.allclose(got['layers'][1]['q'], plain['layers'][1]['q'], 0.1)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_unstack_parts_the_layers(dtype):
  params = tiny.stacked()
  parts = decode.unstack(params, dtype)
  assert parts['embedding'].dtype == (dtype or 'float32')
  assert parts['final_norm'].dtype == 'float32'
  assert len(parts['layers']) == FAMILIES['gemma3'].num_layers
  for n, layer in enumerate(parts['layers']):
    assert layer.keys() == params['layers'].keys()
    for key, x in layer.items():
      # Norms are vectors.
      want = params['layers'][key][n].T
      assert x.dtype == ('float32' if 'norm' in key else dtype or 'float32')
      np.testing.assert_array_equal(x, want.astype(x.dtype))


def test_matrices_converted_before_give_the_same():
  tokens, cfg = _prompts(), FAMILIES['gemma3']
  params = tiny.stacked()

  def read(dtype):
    parts = decode.unstack(params, dtype)
    return decode.prefill(cfg, parts, tokens, LENGTHS, 'bfloat16')

  one, other = map(read, (None, 'bfloat16'))
  jax.tree.map(np.testing.assert_array_equal, one, other)
