"""The cache against the whole forward pass at every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import model
from mt.gemma import sizes
from mt.translate import decode
from mt.translate import search as search_lib

VOCAB = 97
_GEMMA1 = sizes.ModelConfig(
  vocab_size=VOCAB,
  num_layers=2,
  embed_dim=24,
  hidden_dim=40,
  num_heads=4,
  num_kv_heads=1,
  head_dim=8,
  query_scale=8**-0.5,
)
_GEMMA2 = dataclasses.replace(
  _GEMMA1,
  num_layers=2,
  num_kv_heads=2,
  attention='LG',
  window=4,
  attn_softcap=2.0,
  final_softcap=3.0,
  post_norms=True,
)
_GEMMA3 = dataclasses.replace(
  _GEMMA1,
  num_layers=3,
  num_kv_heads=2,
  attention='LLG',
  window=3,
  rope_base_global=1_000_000.0,
  rope_scale_global=8.0,
  qk_norm=True,
  post_norms=True,
)
FAMILIES = {'gemma1': _GEMMA1, 'gemma2': _GEMMA2, 'gemma3': _GEMMA3}
each_family = pytest.mark.parametrize('name', FAMILIES)

# Prompts of all kinds: full, one token, shorter and longer than the windows.
LENGTHS = np.array([9, 1, 3, 6], np.int32)
WIDTH = 9  # P.
NEW = 12
NO_STOP = np.array([-1], np.int32)

# Compiling is most of what these tests take: without optimising, half of it.
_jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


@functools.cache
def _params(name):
  """Random; what the layers add outweighs the embedding of the last token.

  Otherwise a model with tied embeddings only repeats that token, and a decoder
  that reads nothing else would pass.
  """
  rng = np.random.default_rng(2)

  def draw(path, shape):
    key = path[-1].key
    if 'norm' in key:
      mean = 8.0 if key.startswith('post_') else 0.0
      return rng.normal(mean, 0.3, shape).astype(np.float32)
    std = shape[-1 if key == 'embedding' else -2] ** -0.5
    std *= 10.0 if key in ('o', 'down') else 1.0
    return rng.normal(scale=std, size=shape).astype(np.float32)

  return jax.tree.map_with_path(
    draw,
    model.param_shapes(FAMILIES[name]),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _prompts(seed=3):
  """[B, P] with 0 where a prompt has ended, and 0 inside as well."""
  tokens = np.random.default_rng(seed).integers(1, VOCAB, (4, WIDTH), np.int32)
  tokens[:, 2] = 0  # Gemma's pad id is an ordinary token.
  tokens[np.arange(WIDTH) >= LENGTHS[:, None]] = 0
  return tokens


def _continue(cfg, params, tokens, lengths, slots=WIDTH + NEW):
  """Greedy search after a prefill: the final State."""
  tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
  search, b = search_lib.Search(), len(lengths)
  cache = decode.prefill(cfg, params, tokens, jnp.float32)
  more = ((0, 0), (0, slots - tokens.shape[1]), (0, 0), (0, 0))
  # What has not been written yet is not seen, whatever it is.
  cache = jax.tree.map(lambda x: jnp.pad(x, more, constant_values=99.0), cache)
  last = tokens[jnp.arange(b), lengths - 1]
  numbers, limits = jnp.zeros(b, jnp.int32), jnp.full(b, NEW, jnp.int32)
  state = search_lib.start(search, numbers, last, lengths, limits, NEW)
  step = functools.partial(decode.step, cfg, params)
  return search_lib.run(search, step, cache, state, NO_STOP)[1]


@functools.cache
def _greedy(name):
  compiled = _jit(functools.partial(_continue, FAMILIES[name]))
  params = decode.unstack(_params(name))

  def call(tokens, lengths=LENGTHS):
    state = compiled(params, tokens, lengths)
    assert state.counts.ravel().tolist() == [NEW] * 4
    return np.asarray(state.tokens[:, 0])

  return call


@functools.cache
def _forward(name):
  """Hidden states [B, L, D] of padded rows."""

  @_jit
  def run(params, tokens, lengths):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (at < lengths[:, None]).astype(jnp.int32)
    return model.forward(FAMILIES[name], params, tokens, at, segments)

  return functools.partial(run, _params(name))


def _without_cache(name, tokens, lengths, steps):
  """[B, steps], from a whole forward pass for each of them."""
  cfg, table = FAMILIES[name], _params(name)['embedding']
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


def test_alone_and_without_padding():
  row, n = 2, LENGTHS[2]
  state = _jit(functools.partial(_continue, _GEMMA3, slots=n + NEW))(
    decode.unstack(_params('gemma3')),
    _prompts()[row : row + 1, :n],
    LENGTHS[row : row + 1],
  )
  np.testing.assert_array_equal(state.tokens[0, 0], _expected('gemma3')[row])


@each_family
def test_hidden_states_are_those_of_the_forward_pass(name):
  """With given tokens, so that one wrong step cannot hide behind argmax."""
  cfg = FAMILIES[name]
  tokens = np.random.default_rng(8).integers(0, VOCAB, (4, WIDTH + NEW))
  tokens = tokens.astype(np.int32)
  want = np.asarray(_forward(name)(tokens, LENGTHS + NEW))
  params = decode.unstack(_params(name))
  rows = np.arange(4)

  @_jit
  def run(params):
    """Reads each row's prompt, then a token at a time, then two."""
    cache = decode.empty_cache(cfg, 4, WIDTH + NEW, jnp.float32)
    zeros = jnp.zeros(4, jnp.int32)
    prompt, cache = decode.extend(
      cfg, params, cache, jnp.array(tokens)[:, :WIDTH], zeros
    )

    def step(cache, t):
      at = LENGTHS + t
      token = jnp.array(tokens)[rows, at]
      hidden, cache = decode.extend(cfg, params, cache, token[:, None], at)
      return cache, hidden[:, 0]

    cache, steps = jax.lax.scan(step, cache, jnp.arange(NEW - 2))
    at = LENGTHS + NEW - 2
    two = jnp.array(tokens)[rows[:, None], at[:, None] + jnp.arange(2)]
    last, _ = decode.extend(cfg, params, cache, two, at)
    return prompt, steps, last

  prompt, steps, last = map(np.asarray, run(params))
  for row, n in enumerate(LENGTHS):
    got = [*prompt[row, :n], *steps[:, row], *last[row]]
    exact = want[row, : n + NEW]
    error = np.linalg.norm(got - exact, axis=-1)
    assert np.max(error / np.linalg.norm(exact, axis=-1)) < 1e-5


def test_a_long_prompt_is_read_in_parts(monkeypatch):
  tokens = np.random.default_rng(9).integers(0, VOCAB, (2, 12), np.int32)
  params = decode.unstack(_params('gemma3'))

  def caches(chunk):
    monkeypatch.setattr(decode, '_CHUNK', chunk)
    return _jit(lambda p: decode.prefill(_GEMMA3, p, tokens, jnp.float32))(
      params
    )

  whole = caches(12)
  assert len(jax.tree.leaves(whole)) == 2 * _GEMMA3.num_layers
  for a, b in zip(
    jax.tree.leaves(whole), jax.tree.leaves(caches(4)), strict=True
  ):
    assert a.shape == (2, 12, 2, 8)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  with pytest.raises(AssertionError):
    caches(5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cache_and_activations_have_the_asked_dtype(dtype):
  params = decode.unstack(_params('gemma3'))

  def run(params):
    cache = decode.prefill(_GEMMA3, params, _prompts(), dtype)
    hidden, cache = decode.extend(
      _GEMMA3, params, cache, _prompts()[:, :1], jnp.asarray(LENGTHS - 1)
    )
    logits, _ = decode.step(
      _GEMMA3, params, cache, jnp.asarray(_prompts()[:, 0]), LENGTHS - 1
    )
    return hidden, logits, cache

  hidden, logits, cache = jax.eval_shape(run, params)
  assert hidden.dtype == dtype and hidden.shape == (4, 1, 24)
  assert logits.dtype == jnp.float32 and logits.shape == (VOCAB, 4)
  assert len(cache['k']) == len(cache['v']) == _GEMMA3.num_layers
  for x in (*cache['k'], *cache['v']):
    assert x.dtype == dtype and x.shape == (4, WIDTH, 2, 8)


def test_logits_are_those_of_the_vocabulary():
  """Softcap keeps the order, so that only the values show it."""
  name, cfg = 'gemma2', _GEMMA2
  hidden = np.asarray(_forward(name)(_prompts(), LENGTHS))
  want = hidden[np.arange(4), LENGTHS - 1] @ _params(name)['embedding'].T
  assert np.abs(want).max() > 1.1 * cfg.final_softcap, 'the cap should matter'
  want = np.asarray(attention.softcap(want, cfg.final_softcap))

  @_jit
  def run(params):
    cache = decode.prefill(cfg, params, _prompts(), jnp.float32)
    last = jnp.asarray(_prompts())[np.arange(4), LENGTHS - 1]
    return decode.step(cfg, params, cache, last, jnp.asarray(LENGTHS - 1))[0]

  got = run(decode.unstack(_params(name)))
  np.testing.assert_allclose(got.T, want, rtol=1e-3, atol=1e-4)


def test_factors_that_are_not_folded_in_are_refused():
  """Decoding would go on without them."""
  params = _params('gemma3')
  layers = params['layers'] | {'q_lora_a': jnp.zeros((2, 3, 1))}
  with pytest.raises(ValueError, match='fold'):
    decode.unstack(params | {'layers': layers})


def test_unstack_parts_the_layers():
  params = _params('gemma3')
  parts = decode.unstack(params)
  assert parts['embedding'] is params['embedding']
  assert len(parts['layers']) == _GEMMA3.num_layers
  for n, layer in enumerate(parts['layers']):
    assert layer.keys() == params['layers'].keys()
    for key, x in layer.items():
      # Norms are vectors.
      np.testing.assert_array_equal(x, params['layers'][key][n].T)
