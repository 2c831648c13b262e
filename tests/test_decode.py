"""Greedy decoding with a cache against the whole forward pass at every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt import decode
from mt import model
from mt import sizes

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
ALL = np.full(4, NEW, np.int32)
NO_STOP = np.array([-1, -1], np.int32)

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


@functools.cache
def _greedy(name):
  run = functools.partial(decode.greedy, FAMILIES[name], max_new=NEW)
  compiled = _jit(run)
  params = decode.unstack(_params(name))

  def call(tokens, lengths=LENGTHS, limits=ALL, stop_ids=NO_STOP):
    out, counts = compiled(params, tokens, lengths, limits, stop_ids)
    assert out.dtype == counts.dtype == jnp.int32
    return np.asarray(out), np.asarray(counts)

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
    logits = np.asarray(model.softcap(logits, cfg.final_softcap))
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
  out, counts = _greedy(name)(_prompts())
  np.testing.assert_array_equal(out, _expected(name))
  np.testing.assert_array_equal(counts, ALL)
  # A model that says one word over and over would prove little.
  assert all(len(set(row)) >= 4 for row in out.tolist())


@each_family
def test_neighbours_change_nothing(name):
  """Neither the other rows, nor how far the batch is padded."""
  out, _ = _greedy(name)(_prompts())
  others = _prompts(seed=4)
  others[2] = _prompts()[2]
  lengths = np.array([2, 9, LENGTHS[2], 8], np.int32)
  mixed, _ = _greedy(name)(others, lengths)
  np.testing.assert_array_equal(mixed[2], out[2])
  assert not np.array_equal(mixed[0], out[0])
  # What stands in the padding does not matter.
  dirty = _prompts()
  dirty[np.arange(WIDTH) >= LENGTHS[:, None]] = 55
  np.testing.assert_array_equal(_greedy(name)(dirty)[0], out)


def test_alone_and_without_padding():
  row, n = 2, LENGTHS[2]
  out, counts = _jit(functools.partial(decode.greedy, _GEMMA3, max_new=NEW))(
    decode.unstack(_params('gemma3')),
    _prompts()[row : row + 1, :n],
    LENGTHS[row : row + 1],
    ALL[:1],
    NO_STOP,
  )
  np.testing.assert_array_equal(out[0], _expected('gemma3')[row])
  assert counts.tolist() == [NEW]


@each_family
def test_a_stop_token_ends_its_row_and_is_left_out(name):
  full = _expected(name)
  stops = np.array([full[0, 5], full[1, 0]], np.int32)  # The second at once.
  out, counts = _greedy(name)(_prompts(), stop_ids=stops)
  for row in range(4):
    stopped = np.isin(full[row], stops)
    n = stopped.argmax() if stopped.any() else NEW
    assert counts[row] == n
    np.testing.assert_array_equal(out[row, :n], full[row, :n])
    assert not out[row, n:].any()
  assert counts[0] <= 5 and counts[1] == 0


@each_family
def test_each_row_has_its_own_limit(name):
  limits = np.array([0, NEW, 1, 5], np.int32)
  out, counts = _greedy(name)(_prompts(), limits=limits)
  np.testing.assert_array_equal(counts, limits)
  want = np.where(np.arange(NEW) < limits[:, None], _expected(name), 0)
  np.testing.assert_array_equal(out, want)


def test_rows_that_only_fill_up_the_batch():
  out, counts = _greedy('gemma3')(_prompts(), limits=np.zeros(4, np.int32))
  assert not out.any() and not counts.any()
  # A stop token does not bring a row back to life after its limit.
  full = _expected('gemma3')
  stops = np.array([full[3, 4], -1], np.int32)
  limits = np.array([0, 0, 0, 2], np.int32)
  out, counts = _greedy('gemma3')(_prompts(), limits=limits, stop_ids=stops)
  assert counts.tolist() == [0, 0, 0, min(2, full[3].tolist().index(stops[0]))]


def test_the_loop_ends_with_the_last_row(monkeypatch):
  steps = []
  real = decode.step

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return real(*args)

  monkeypatch.setattr(decode, 'step', counted)
  run = _jit(functools.partial(decode.greedy, _GEMMA1, max_new=NEW))
  run = functools.partial(run, decode.unstack(_params('gemma1')))

  def steps_of(limits):
    steps.clear()
    jax.block_until_ready(
      run(_prompts(), LENGTHS, np.array(limits, np.int32), NO_STOP)
    )
    jax.effects_barrier()
    return len(steps)

  assert steps_of([0, 0, 0, 0]) == 0
  # The prefill makes the first token; a limit is noticed one step later.
  assert steps_of([2, 4, 0, 1]) in (3, 4)
  assert steps_of([NEW] * 4) == NEW - 1


@each_family
def test_hidden_states_are_those_of_the_forward_pass(name):
  """With given tokens, so that one wrong step cannot hide behind argmax."""
  cfg = FAMILIES[name]
  tokens = np.random.default_rng(8).integers(0, VOCAB, (4, WIDTH + NEW))
  tokens = tokens.astype(np.int32)
  want = np.asarray(_forward(name)(tokens, LENGTHS + NEW))
  params = decode.unstack(_params(name))
  slots, rows = WIDTH + NEW, np.arange(4)

  @_jit
  def run(params):
    hidden, cache = decode.prefill(
      cfg, params, tokens[:, :WIDTH], LENGTHS, slots, jnp.float32
    )

    def step(cache, t):
      at = LENGTHS + t
      hidden, cache = decode.step(
        cfg,
        params,
        cache,
        jnp.array(tokens)[rows, at],
        at,
        WIDTH + t,
        jnp.float32,
      )
      return cache, hidden

    cache, steps = jax.lax.scan(step, cache, jnp.arange(NEW))
    return hidden, steps, cache

  hidden, steps, cache = run(params)
  got = [np.asarray(hidden), *np.asarray(steps)]
  for t, x in enumerate(got):
    exact = want[rows, LENGTHS + t - 1]
    error = np.linalg.norm(x - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.max(error) < 1e-5, t
  # What the cache says of its slots: prompt, gap, new tokens.
  for row, n in enumerate(LENGTHS):
    valid = [1] * n + [0] * (WIDTH - n) + [1] * NEW
    assert cache['valid'][row].tolist() == valid
    positions = np.asarray(cache['positions'][row])[np.array(valid) == 1]
    assert positions.tolist() == list(range(n + NEW))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cache_and_activations_have_the_asked_dtype(dtype):
  params = decode.unstack(_params('gemma3'))
  args = (_prompts(), LENGTHS, WIDTH + NEW, dtype)
  hidden, cache = jax.eval_shape(
    lambda p: decode.prefill(_GEMMA3, p, *args), params
  )
  assert hidden.dtype == dtype and hidden.shape == (4, 24)
  assert len(cache['k']) == len(cache['v']) == _GEMMA3.num_layers
  for x in (*cache['k'], *cache['v']):
    assert x.dtype == dtype and x.shape == (4, WIDTH + NEW, 2, 8)


def test_final_softcap_comes_before_the_maximum():
  """A cap so low that many logits reach it: the first of them is chosen.

  Softcap keeps the order of all others, so that only float32's saturation shows
  whether it is there.
  """
  cfg = dataclasses.replace(_GEMMA1, final_softcap=1e-3)
  logits = np.asarray(_forward('gemma1')(_prompts(), LENGTHS))
  logits = logits[np.arange(4), LENGTHS - 1] @ _params('gemma1')['embedding'].T
  capped = np.asarray(model.softcap(jnp.asarray(logits), cfg.final_softcap))
  want = capped.argmax(-1)
  assert np.all(want != logits.argmax(-1)), 'the cap should matter'
  out, _ = _jit(functools.partial(decode.greedy, cfg, max_new=1))(
    decode.unstack(_params('gemma1')),
    _prompts(),
    LENGTHS,
    np.ones(4, np.int32),
    NO_STOP,
  )
  np.testing.assert_array_equal(out[:, 0], want)


def test_unstack_parts_the_layers():
  params = _params('gemma3')
  parts = decode.unstack(params)
  assert parts['embedding'] is params['embedding']
  assert len(parts['layers']) == _GEMMA3.num_layers
  for n, layer in enumerate(parts['layers']):
    assert layer.keys() == params['layers'].keys()
    for key, x in layer.items():
      np.testing.assert_array_equal(x, params['layers'][key][n])
