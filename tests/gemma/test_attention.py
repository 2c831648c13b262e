"""Attention against the `gemma` package and all queries at once."""

import dataclasses
import functools
import math

from gemma import positional_embeddings as gemma_positions
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.gemma import attention
from mt.gemma import fused
from mt.gemma import sizes

_GEMMA3 = sizes.SIZES['gemma3_4b']


def _mask(q_positions, k_positions, q_segments, k_segments, window):
  """What each query may see: its own segment, not the future, in the window."""
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  same = q_segments[:, :, None] == k_segments[:, None, :]
  return same & (distance >= 0) & (distance < window)


def _case(kv_heads, length, seed=0, head_dim=8):
  """A model's config, q, k, v, the mask and the segments of packed rows."""
  cfg = dataclasses.replace(
    sizes.SIZES['debug'],
    num_heads=4,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    attn_softcap=2.0,
    window=50,
  )
  rng = np.random.default_rng(seed)
  q, k, v = (
    rng.normal(size=(2, heads, length, cfg.head_dim)).astype(np.float32)
    for heads in (cfg.num_heads, kv_heads, kv_heads)
  )
  # Segments of up to 90 places, then padding.
  ends = np.cumsum(rng.integers(1, 91, (2, length)), axis=1)
  segments = np.stack([np.searchsorted(e, np.arange(length)) for e in ends]) + 1
  segments[:, length - length // 10 :] = 0
  positions = np.zeros_like(segments)
  for at in range(1, length):
    same = segments[:, at] == segments[:, at - 1]
    positions[:, at] = np.where(same, positions[:, at - 1] + 1, 0)
  mask = _mask(positions, positions, segments, segments, 50)
  return cfg, (q, k, v), mask, segments


# One block, whole and short blocks, four blocks, more than 128 queries in one.
@pytest.mark.parametrize(
  ('length', 'kv_heads'), [(1, 2), (128, 1), (129, 4), (300, 1), (600, 2)]
)
def test_blocks_of_queries_are_all_queries(length, kv_heads):
  cfg, args, mask, segments = _case(kv_heads, length)
  first = attention.first_keys(cfg, segments)[0]
  got = _with_gradients(
    lambda *args: attention.causal_attend(cfg, *args, first), args
  )
  want = _with_gradients(lambda *args: attention.attend(cfg, *args, mask), args)
  assert got[1].shape == (2, cfg.num_heads, length, cfg.head_dim)
  _assert_same(got, want)


def _with_gradients(attend, args):
  def total(*args):
    out = attend(*args)
    return jnp.sum(jnp.sin(out)), out

  grad = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
  return jax.jit(grad)(*args)


def _assert_same(got, want):
  np.testing.assert_allclose(got[1], want[1], atol=1e-6)
  for a, b in zip(got[0], want[0], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('window', [None, 3, 500])
def test_first_keys_say_what_the_mask_says(window):
  cfg, _, _, segments = _case(1, 300)
  cfg = dataclasses.replace(cfg, window=window)
  place = np.arange(300)
  begins = np.diff(segments, axis=1, prepend=-1) != 0
  positions = place - np.maximum.accumulate(begins * place, axis=1)
  for n, w in enumerate((window or 2**30, 2**30)):
    want = _mask(positions, positions, segments, segments, w)
    first = attention.first_keys(cfg, segments)[n]
    got = (place >= first[..., None]) & (place <= place[:, None])
    np.testing.assert_array_equal(got, want)


# The kernel runs as a program for the CPU. Windows inside a row and beyond it.
@pytest.mark.parametrize(('kv_heads', 'window'), [(1, 50), (2, 500)])
def test_splash_is_xla(kv_heads, window, monkeypatch):
  from jax.experimental.pallas.ops.tpu import splash_attention

  make = splash_attention.make_splash_mqa_single_device
  monkeypatch.setattr(
    splash_attention,
    'make_splash_mqa_single_device',
    functools.partial(make, interpret=True),
  )
  cfg, args, _, segments = _case(kv_heads, 256, head_dim=128)
  cfg = dataclasses.replace(cfg, window=window)
  for kind in (0, 1):
    splash, xla = (
      _with_gradients(functools.partial(attend, kind=kind), args)
      for attend in (
        fused.make_attend(cfg, name, segments) for name in ('splash', 'xla')
      )
    )
    np.testing.assert_allclose(splash[1], xla[1], atol=2e-5)
    for a, b in zip(splash[0], xla[0], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('length', 'share'), [(256, 3 / 4), (512, 5 / 8)])
def test_keys_ahead_of_a_block_cost_nothing(length, share):
  cfg, args, mask, segments = _case(1, length, head_dim=32)
  first = attention.first_keys(cfg, segments)[0]

  def flops(attend, seen):
    run = jax.jit(lambda *args: attend(cfg, *args, seen))
    return run.lower(*args).compile().cost_analysis()['flops']

  assert flops(attention.causal_attend, first) < (share + 0.05) * flops(
    attention.attend, mask
  )


def test_layer_kinds_by_hand():
  kinds = attention.layer_kinds(_GEMMA3)
  windows = attention.windows(_GEMMA3)
  assert windows['L'] == 1024 and windows['G'] >= 2**30
  assert list(kinds[:7]) == [0, 0, 0, 0, 0, 1, 0]


def test_first_keys_of_a_packed_row():
  segments = np.array([[1, 1, 1, 2, 2, 0]])
  cfg = dataclasses.replace(_GEMMA3, window=2)
  first, place = attention.first_keys(cfg, segments)[0], np.arange(6)
  got = (place >= first[..., None]) & (place <= place[:, None])
  want = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0],  # Window 2: itself and the one before.
    [0, 0, 0, 1, 0, 0],
    [0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 1],  # Padding sees padding, lest its softmax be empty.
  ]
  np.testing.assert_array_equal(got[0], np.array(want, bool))


def test_rope_by_hand_and_against_the_oracle():
  # A quarter turn takes (1, 0) to (0, 1). The partner of entry i is i + A / 2,
  # not its neighbour: here 1 with 3 and 2 with 4.
  x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  angles = jnp.array([math.pi / 2, 0.0]).reshape(1, 1, 2)
  got = attention.apply_rope(x, jnp.sin(angles), jnp.cos(angles))[0, 0, 0]
  np.testing.assert_allclose(got, [-3.0, 2.0, 1.0, 4.0], atol=1e-6)
  # Far out, as positions of a long context are, and with the 4B's scale.
  cfg = dataclasses.replace(_GEMMA3, head_dim=16)
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
  positions = np.array([[0, 1, 700], [3, 2000, 1]])
  sin, cos = jax.jit(functools.partial(attention.rope_tables, cfg))(positions)
  for kind, base, scale in ((0, 10_000, 1), (1, 1_000_000, 8)):
    got = jax.jit(attention.apply_rope)(x.swapaxes(1, 2), sin[kind], cos[kind])
    want = jax.jit(gemma_positions.apply_rope, static_argnums=(2, 3))(
      x, positions, base, scale
    )
    # Float32 angles of 2000 radians are good to 1e-4.
    np.testing.assert_allclose(got.swapaxes(1, 2), want, atol=1e-3)


def test_rope_tables_by_hand():
  cfg = dataclasses.replace(_GEMMA3, head_dim=4)
  tables = jax.jit(functools.partial(attention.rope_tables, cfg))(
    np.array([[0, 1, 5]])
  )
  # base ** (-2 i / A) for i = 0 and 1; global ones divided by the scale, 8.
  angles = np.array([0, 1, 5])[None, None, :, None] * np.array(
    [[[[1.0, 0.01]]], [[[0.125, 0.000125]]]]
  )
  for got, want in zip(tables, (np.sin(angles), np.cos(angles)), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_wrong_shapes_are_named():
  cfg, (q, k, v), _, segments = _case(1, 4)
  first = attention.first_keys(cfg, segments)[0]
  with pytest.raises(AssertionError, match='shape'):
    attention.causal_attend(cfg, q, k[:, :, :3], v, first)
  with pytest.raises(AssertionError, match='shape'):
    attention.causal_attend(cfg, q, k, v, first[0])
