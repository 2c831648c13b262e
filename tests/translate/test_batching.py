"""Prompts through a batch that is filled again, with a tiny random Gemma."""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mt.gemma import loss
from mt.gemma import model
from mt.gemma import sharding
from mt.translate import batching
from mt.translate import decode
from mt.translate.search import Search
from tests.translate import tiny

CFG = tiny.FAMILIES['gemma3']
STOPS = (1, 7)
SEARCHES = {
  'greedy': Search(),
  'beam': Search(beam=3, n_best=2),
  'sample': Search(temperature=1.0, top_k=40, top_p=0.9, n_best=2),
}
SETTINGS = {
  name: batching.Settings(CFG, search, STOPS, 8 if name == 'greedy' else 4)
  for name, search in SEARCHES.items()
}
# Only limits end anything.
ENDLESS = batching.Settings(CFG, Search(), (-1,), batch_size=16)


def _prompts(shapes):
  """Prompts of these (tokens, limit)."""
  rng = np.random.default_rng(0)
  return [
    batching.Prompt(rng.integers(8, CFG.vocab_size, n).tolist(), limit, number)
    for number, (n, limit) in enumerate(shapes)
  ]


# All at once: two widths of prompts, two lengths of the cache.
MIXED = _prompts(
  [(20, 9), (3, 30), (33, 4), (1, 12), (40, 100), (9, 1), (64, 3), (5, 40)]
  + [(12, n) for n in range(2, 13)]
)


def _decode(settings, prompts, *args):
  return batching.decode_all(settings, tiny.params(), prompts, *args)


def _assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert [(h.tokens, h.end) for h in a] == [(h.tokens, h.end) for h in b]
    np.testing.assert_allclose(
      [h.logp for h in a], [h.logp for h in b], rtol=1e-4
    )


@pytest.mark.parametrize('name', SETTINGS)
def test_batched_is_alone_and_scored_as_in_training(name):
  settings, done = SETTINGS[name], []
  # A longer cache is for greedy search alone: each is compiled again.
  prompts = [p for p in MIXED if name == 'greedy' or p.slots(1) <= 128]
  out = _decode(settings, prompts, done.append)
  assert done == sorted(done) and done[-1] == len(prompts)
  assert all(len(found) == settings.search.n_best for found in out)
  _assert_same(out, [_decode(settings, [p])[0] for p in prompts])
  # Another order is another make-up of the batch.
  order = np.random.default_rng(1).permutation(len(prompts))
  mixed = _decode(settings, [prompts[i] for i in order])
  _assert_same(mixed, [out[i] for i in order])
  # Were they all the same, or all at their limits, it would prove little.
  assert len({tuple(h[0].tokens) for h in out}) > len(prompts) * 0.8
  assert {h[0].end is None for h in out} == {True, False}
  for prompt, found in zip(prompts, out, strict=True):
    assert found == sorted(found, key=lambda h: -h.score)
    for h in found:
      _assert_scored(settings.search, prompt, h)


def _assert_scored(search, prompt, h):
  made = h.tokens + ([] if h.end is None else [h.end])
  assert h.end in [None, *STOPS] and not set(h.tokens) & set(STOPS)
  assert len(made) <= prompt.limit
  assert h.end is not None or len(made) == prompt.limit
  nll = _nll(prompt.tokens, made)
  np.testing.assert_allclose(h.logp, -nll, rtol=1e-3, atol=1e-3)
  score = h.logp / len(made) ** search.length_penalty
  np.testing.assert_allclose(h.score, score, rtol=1e-6)


@jax.jit
def _row_nll(params, tokens, mask):
  at = jnp.arange(tokens.shape[1])[None]
  hidden = model.forward(CFG, params, tokens, at, jnp.ones_like(tokens))
  return loss.target_nll(hidden, params['embedding'], tokens, mask)[0]


def _nll(prompt, target):
  """The training loss of one pair, in nats."""
  tokens = np.zeros((1, 192), np.int32)
  tokens[0, : len(prompt) + len(target)] = prompt + target
  at = np.arange(192)[None]
  mask = (at >= len(prompt)) & (at < len(prompt) + len(target))
  return float(_row_nll(tiny.stacked(), tokens, np.float32(mask)))


# What finished rows cost, and what is compiled.


@pytest.fixture
def work(monkeypatch):
  """The rows of each step, and the shapes of batches and of prefills."""
  seen = {'steps': [], 'batches': [], 'prefills': []}
  real, prefill = batching.decode, decode.prefill

  def counted(settings, batch, *args):
    before = np.array(batch[1].made)
    seen['batches'].append(batch[0]['k'][-1].shape[::2])  # Of no window.
    batch = real(settings, batch, *args)
    steps = np.max(np.array(batch[1].made) - before)
    seen['steps'] += [len(before)] * steps
    return batch

  def counted_prefill(cfg, params, tokens, *args):
    seen['prefills'].append(tokens.shape)
    return prefill(cfg, params, tokens, *args)

  monkeypatch.setattr(batching, 'decode', counted)
  monkeypatch.setattr(decode, 'prefill', counted_prefill)
  return seen


def test_free_rows_take_the_next_prompts(work):
  """Short and long ones in turns, which nobody can tell apart beforehand."""
  limits = [4, 36] * 24
  _decode(ENDLESS, _prompts([(45 - n, n) for n in limits]))
  # Batch after batch it would be 3 * 36 steps of 16 rows.
  assert sum(work['steps']) < 0.75 * 3 * 36 * 16
  # Four are read at a time, and none for nothing.
  assert work['prefills'] == [(4, 64)] * 12


def test_few_rows_move_into_a_smaller_batch(work):
  """One long sentence among short ones."""
  _decode(ENDLESS, _prompts([(5, 4)] * 15 + [(5, 100)]))
  assert work['steps'] == [16] * 4 + [1] * 96


def test_a_row_that_fills_up_a_batch_is_not_waited_for(work):
  """Three move into four rows, the long one first."""
  shapes = [(3, 50), (20, 10), (20, 12)] + [(30, 4)] * 13
  _decode(ENDLESS, _prompts(shapes))
  assert work['steps'] == [16] * 4 + [4] * 8 + [1] * 38


def test_few_prompts_take_few_rows(work):
  _decode(ENDLESS, _prompts([(5, 3)]))
  _decode(ENDLESS, _prompts([(5, 3)] * 3))
  assert work['steps'] == [1] * 3 + [4] * 3


def test_long_prompts_and_beams_are_fewer_at_once(work, monkeypatch):
  """The cache stays below batch_size * _SLOTS_EACH, those that run included."""
  monkeypatch.setattr(batching, '_SLOTS_EACH', 128)
  settings = dataclasses.replace(ENDLESS, batch_size=4)
  out = _decode(settings, _prompts([(5, 90)] * 4 + [(100, 30)] * 2))
  assert work['prefills'] == [(1, 128)] * 2 + [(1, 32)] * 4
  assert [len(h[0].tokens) for h in out] == [90] * 4 + [30] * 2
  # Four of 128 slots; of 256 but one.
  assert work['steps'] == [1] * 60 + [4] * 90
  # Three hypotheses of 50 tokens need 256 slots, of 4 tokens 128.
  for limit, batches in ((4, {(4, 128)}), (50, {(1, 256)})):
    work['batches'].clear()
    _decode(SETTINGS['beam'], _prompts([(5, limit)] * 4))
    assert set(work['batches']) == batches


def _compiled():
  functions = batching.init, batching.insert, batching.resize, batching.decode
  return [f._cache_size() for f in (*functions, decode.prefill)]


def test_each_shape_is_compiled_once(work, monkeypatch):
  settings = SETTINGS['greedy']
  jobs = MIXED, MIXED[:3], MIXED[::-1], MIXED[4:5]
  for prompts in jobs:
    _decode(settings, prompts)
  assert set(work['batches']) <= {
    (rows, slots) for rows in (8, 2, 1) for slots in (128, 256)
  }
  assert set(work['prefills']) <= {
    (rows, width) for rows in (2, 1) for width in (32, 64)
  }
  monkeypatch.undo()
  before = _compiled()
  for prompts in jobs:
    # Equal settings, however often they are made.
    _decode(dataclasses.replace(settings), prompts)
  assert _compiled() == before


def test_nothing_to_do():
  assert _decode(SETTINGS['greedy'], []) == []


def test_buckets_and_batch_sizes():
  widths = {1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 1000: 1024}
  assert {n: batching.bucket(n) for n in widths} == widths
  for sizes in ([16, 4, 1], [3, 1], [1]):
    settings = dataclasses.replace(ENDLESS, batch_size=sizes[0])
    assert settings.batch_sizes == sizes


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    pytest.param('greedy', (8, 1, 1), marks=pytest.mark.heavy),
    ('beam', (2, 2, 2)),
  ],
)
def test_eight_devices_decode_as_one(name, shape):
  axes = dict(zip(('data', 'fsdp', 'tensor'), shape, strict=True))
  mesh = sharding.make_mesh(ml_collections.ConfigDict(axes))
  flat = {
    k: sharding.put(v, sharding.of_parameter(CFG, mesh, k, v.shape))
    for k, v in traverse_util.flatten_dict(tiny.stacked(), sep='/').items()
  }
  params = decode.unstack(traverse_util.unflatten_dict(flat, sep='/'))
  prompts = _prompts([(5, 6), (12, 20), (3, 9), (30, 4), (7, 30), (9, 9)] * 3)
  settings = dataclasses.replace(SETTINGS[name], mesh=mesh)
  want = _decode(SETTINGS[name], prompts)
  got = batching.decode_all(settings, params, prompts)
  _assert_same(got, want)
  assert len({len(found[0].tokens) for found in want}) > 2
  before = _compiled()
  _assert_same(batching.decode_all(settings, params, prompts), got)
  assert _compiled() == before
  # The cache is split, and every process can read the state.
  cache, state = batching.init(settings, 8, 128)
  assert not cache['k'][0].is_fully_replicated
  assert all(x.is_fully_replicated for x in jax.tree.leaves(state))
