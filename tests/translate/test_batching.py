"""Prompts through a batch that is filled again, with a small random Gemma."""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mt.base import compiling
from mt.gemma import loss
from mt.gemma import model
from mt.gemma import sharding
from mt.gemma import sizes
from mt.translate import batching
from mt.translate import decode
from mt.translate import search as search_lib
from mt.translate.search import Search

CFG = sizes.SIZES['debug']
STOPS = [1, 7, 20, 50, 60, 70]
SEARCHES = {
  'greedy': Search(),
  'beam': Search(beam=3, n_best=2),
  'sample': Search(temperature=1.0, top_k=40, top_p=0.9, n_best=2),
}
each_search = pytest.mark.parametrize('name', SEARCHES)


pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def _stacked():
  params = model.init_params(CFG, jax.random.key(1))
  # What the layers add outweighs the embedding of the last token, which a model
  # with tied embeddings would only repeat.
  for name in ('post_attn_norm', 'post_ffw_norm'):
    params['layers'][name] += 8.0
  return params


@functools.cache
def _params():
  return decode.unstack(_stacked())


def _prompts(shapes, seed=0):
  """Prompts of these (tokens, limit)."""
  rng = np.random.default_rng(seed)
  return [
    batching.Prompt(rng.integers(80, CFG.vocab_size, n).tolist(), limit, number)
    for number, (n, limit) in enumerate(shapes)
  ]


@functools.cache
def _decoder(name):
  return batching.make_decoder(CFG, SEARCHES[name], STOPS, batch_size=8)


# All at once: two widths of prompts, two lengths of the cache.
MIXED = _prompts(
  [(20, 9), (3, 30), (33, 4), (1, 12), (40, 100), (9, 1), (64, 3), (5, 40)]
  + [(12, n) for n in range(2, 13)]
)


def _assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert [(h.tokens, h.end) for h in a] == [(h.tokens, h.end) for h in b]
    np.testing.assert_allclose(
      [h.logp for h in a], [h.logp for h in b], rtol=1e-4
    )


@each_search
def test_batched_is_alone(name):
  done = []
  out = _decoder(name)(_params(), MIXED, done.append)
  alone = [_decoder(name)(_params(), [p])[0] for p in MIXED]
  _assert_same(out, alone)
  assert done == sorted(done) and done[-1] == len(MIXED)
  assert all(len(h) == SEARCHES[name].n_best for h in out)
  # Another order is another make-up of the batch.
  order = np.random.default_rng(1).permutation(len(MIXED))
  mixed = _decoder(name)(_params(), [MIXED[i] for i in order])
  _assert_same(mixed, [out[i] for i in order])
  # Were they all the same, or all at their limits, it would prove little.
  assert len({tuple(h[0].tokens) for h in out}) > len(MIXED) * 0.8
  assert {h[0].end is None for h in out} == {True, False}


@each_search
def test_scores_are_those_of_the_training_loss(name):
  search = SEARCHES[name]
  out = _decoder(name)(_params(), MIXED)
  checked = 0
  for prompt, found in zip(MIXED, out, strict=True):
    assert found == sorted(found, key=lambda h: -h.score)
    for h in found:
      end = [] if h.end is None else [h.end]
      assert h.end in [None, *STOPS] and not set(h.tokens) & set(STOPS)
      assert len(h.tokens) + len(end) <= prompt.limit
      assert end or len(h.tokens) == prompt.limit
      n = len(h.tokens) + len(end)
      want = -_nll(prompt.tokens, h.tokens + end)
      np.testing.assert_allclose(h.logp, want, rtol=1e-3, atol=1e-3)
      np.testing.assert_allclose(h.score, h.logp / n**search.length_penalty)
      checked += 1
  assert checked == len(MIXED) * search.n_best


@jax.jit
def _row_nll(params, tokens, mask):
  at = jnp.arange(tokens.shape[1])[None]
  hidden = model.forward(CFG, params, tokens, at, jnp.ones_like(tokens))
  return loss.target_nll(hidden, params['embedding'], tokens, mask)


def _nll(prompt, target):
  """The training loss of one pair, in nats."""
  tokens = np.zeros((1, 192), np.int32)
  tokens[0, : len(prompt) + len(target)] = prompt + target
  at = np.arange(192)[None]
  mask = (at >= len(prompt)) & (at < len(prompt) + len(target))
  return float(_row_nll(_stacked(), tokens, mask))


# What finished rows cost.


@pytest.fixture
def work(monkeypatch):
  """The number of rows of each step, and the shape of each prefill."""
  seen = {'steps': [], 'prefills': []}
  step, prefill = decode.step, decode.prefill

  def counted_step(cfg, params, cache, tokens, positions):
    jax.debug.callback(lambda: seen['steps'].append(len(positions)))
    return step(cfg, params, cache, tokens, positions)

  def counted_prefill(cfg, params, tokens, dtype):
    jax.debug.callback(lambda: seen['prefills'].append(tokens.shape))
    return prefill(cfg, params, tokens, dtype)

  monkeypatch.setattr(decode, 'step', counted_step)
  monkeypatch.setattr(decode, 'prefill', counted_prefill)
  return seen


def _endless(**kwargs):
  """A decoder in which only limits end anything."""
  return batching.make_decoder(CFG, Search(), [511], **kwargs)


def test_free_rows_take_the_next_prompts(work):
  """Short and long ones in turns, which nobody can tell apart beforehand."""
  limits = [4, 36] * 12
  prompts = _prompts([(45 - n, n) for n in limits])
  _endless(batch_size=8)(_params(), prompts)
  jax.effects_barrier()
  # Batch after batch it would be 3 * 36 steps of 8 rows.
  assert sum(work['steps']) < 0.75 * 3 * 36 * 8
  # Two are read at a time, and none for nothing.
  assert work['prefills'] == [(2, 64)] * 12


def test_few_rows_move_into_a_smaller_batch(work):
  """One long sentence among short ones."""
  prompts = _prompts([(5, 4)] * 15 + [(5, 100)])
  _endless(batch_size=16)(_params(), prompts)
  jax.effects_barrier()
  assert work['steps'] == [16] * 4 + [1] * 96


def test_a_row_that_fills_up_a_batch_is_not_waited_for(work):
  """Three move into four rows, the long one first."""
  prompts = _prompts([(3, 50), (50, 10), (50, 12)] + [(60, 4)] * 13)
  _endless(batch_size=16)(_params(), prompts)
  jax.effects_barrier()
  assert work['steps'] == [16] * 4 + [4] * 8 + [1] * 38


def test_few_prompts_take_few_rows(work):
  _endless(batch_size=16)(_params(), _prompts([(5, 3)]))
  _endless(batch_size=16)(_params(), _prompts([(5, 3)] * 3))
  jax.effects_barrier()
  assert work['steps'] == [1] * 3 + [4] * 3


def test_long_prompts_are_fewer_at_once(work, monkeypatch):
  """The cache stays below batch_size * 1024 slots, those that run included."""
  monkeypatch.setattr(batching, '_SLOTS_EACH', 128)
  prompts = _prompts([(5, 90)] * 4 + [(100, 30)] * 2 + [(400, 5)])
  out = _endless(batch_size=4)(_params(), prompts)
  jax.effects_barrier()
  assert work['prefills'] == [(1, 512)] + [(1, 128)] * 2 + [(1, 32)] * 4
  assert [len(h[0].tokens) for h in out] == [90] * 4 + [30] * 2 + [5]
  # Four of 128 slots; of 256, or 512, but one.
  assert work['steps'] == [1] * 65 + [4] * 90


def test_beams_take_slots_too(monkeypatch):
  """Four sentences of 16 hypotheses would need twice 4 * 1024 slots."""
  shapes = []
  real = search_lib.run

  def run(search, step, cache, *args):
    shapes.append(jax.tree.leaves(cache)[0].shape[:2])
    return real(search, step, cache, *args)

  monkeypatch.setattr(search_lib, 'run', run)
  decoder = batching.make_decoder(CFG, Search(beam=16), STOPS, batch_size=4)
  decoder(_params(), _prompts([(5, 4)] * 4))
  assert shapes == [(16, 128)]


def test_each_shape_is_compiled_once(monkeypatch):
  traces = []
  for module, name in ((decode, 'prefill'), (search_lib, 'run')):
    real = getattr(module, name)

    def counted(*args, real=real, name=name):
      if name == 'prefill':
        traces.append((name, args[2].shape))
      else:
        traces.append((name, jax.tree.leaves(args[2])[0].shape[:2]))
      return real(*args)

    monkeypatch.setattr(module, name, counted)
  decoder = batching.make_decoder(CFG, Search(), STOPS, batch_size=8)
  for prompts in (MIXED, MIXED[:3], MIXED[::-1], MIXED[4:5], MIXED):
    decoder(_params(), prompts)
  assert len(traces) == len(set(traces))
  assert {t for t in traces if t[0] == 'run'} <= {
    ('run', (rows, slots)) for rows in (8, 2, 1) for slots in (128, 256)
  }
  assert {t for t in traces if t[0] == 'prefill'} <= {
    ('prefill', (rows, width)) for rows in (2, 1) for width in (32, 64)
  }
  # A trace that should not be is an error and no silent compilation.
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
  with pytest.raises(AssertionError, match='traced'):
    decoder(half, MIXED[:1])


def test_nothing_to_do():
  assert _decoder('greedy')(_params(), []) == []


@pytest.mark.parametrize(
  ('length', 'width'),
  [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024)],
)
def test_bucket(length, width):
  assert batching.bucket(length) == width


def test_batch_sizes():
  assert batching.batch_sizes(16) == [16, 4, 1]
  assert batching.batch_sizes(3) == [3, 1]
  assert batching.batch_sizes(1) == [1]


@pytest.mark.parametrize(
  'shape', [pytest.param((8, 1, 1), marks=pytest.mark.heavy), (2, 2, 2)]
)
def test_eight_devices_decode_as_one(shape):
  axes = dict(zip(('data', 'fsdp', 'tensor'), shape, strict=True))
  mesh = sharding.make_mesh(ml_collections.ConfigDict(axes))
  flat = {
    k: sharding.put(v, sharding.of_parameter(CFG, mesh, k, v.shape))
    for k, v in traverse_util.flatten_dict(_stacked(), sep='/').items()
  }
  params = traverse_util.unflatten_dict(flat, sep='/')
  params = jax.jit(decode.unstack)(params)
  prompts = _prompts([(5, 6), (12, 20), (3, 9), (30, 4), (7, 30), (9, 9)] * 3)
  for search in (SEARCHES['greedy'], SEARCHES['beam']):
    one = batching.make_decoder(CFG, search, STOPS, batch_size=8)
    many = batching.make_decoder(CFG, search, STOPS, batch_size=8, mesh=mesh)
    want = one(_params(), prompts)
    got = many(params, prompts)
    assert [[h.tokens for h in hs] for hs in got] == (
      [[h.tokens for h in hs] for hs in want]
    )
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a[0].logp, b[0].logp, rtol=1e-4)
    assert len({len(hs[0].tokens) for hs in want}) > 2


@each_search
def test_many_prompts_compile_before_the_first_is_done(name, monkeypatch):
  """And get the same as few at a time."""
  made = []
  real = compiling.jit_once

  def noting(fn, *args, **kwargs):
    made.append(done[-1])
    return real(fn, *args, **kwargs)

  done = [0]
  monkeypatch.setattr(batching.compiling, 'jit_once', noting)
  prompts = MIXED * 2
  prompts = [
    batching.Prompt(p.tokens, p.limit, number)
    for number, p in enumerate(prompts)
  ]
  few = batching.make_decoder(CFG, SEARCHES[name], STOPS, batch_size=2)
  got = few(_params(), prompts, done.append)
  assert len(made) > 10 and set(made) == {0}
  assert done[-1] == len(prompts)
  _assert_same(got, _decoder(name)(_params(), prompts))
