"""Attention of blocks of queries against attention of all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt import model
from mt import sizes


def _case(kv_heads, length, seed=0):
  """A model's config, q, k, v and the mask of packed rows with padding."""
  cfg = dataclasses.replace(
    sizes.SIZES['debug'],
    num_heads=4,
    num_kv_heads=kv_heads,
    head_dim=8,
    attn_softcap=2.0,
  )
  rng = np.random.default_rng(seed)
  q, k, v = (
    rng.normal(size=(2, length, heads, cfg.head_dim)).astype(np.float32)
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
  mask = model.attention_mask(positions, positions, segments, segments, 50)
  return cfg, (q, k, v), mask


# One block, whole and short blocks, four blocks, more than 128 queries in one.
@pytest.mark.parametrize('length', [1, 2, 128, 129, 256, 300, 512, 600])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_blocks_of_queries_are_all_queries(kv_heads, length):
  cfg, args, mask = _case(kv_heads, length)

  def run(attend):
    def total(*args):
      out = attend(cfg, *args, mask)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)

  (grads, out), (want_grads, want) = map(
    run, (model.causal_attend, model.attend)
  )
  assert out.shape == (2, length, cfg.num_heads * cfg.head_dim)
  np.testing.assert_allclose(out, want, atol=1e-6)
  for got, exact in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('length', 'share'), [(256, 3 / 4), (512, 5 / 8)])
def test_keys_ahead_of_a_block_cost_nothing(length, share):
  cfg, args, mask = _case(1, length)

  def flops(attend):
    run = jax.jit(lambda *args: attend(cfg, *args, mask))
    return run.lower(*args).compile().cost_analysis()['flops']

  assert flops(model.causal_attend) < (share + 0.05) * flops(model.attend)


def test_wrong_shapes_are_named():
  cfg, (q, k, v), mask = _case(1, 4)
  with pytest.raises(AssertionError, match='shape'):
    model.causal_attend(cfg, q, k[:, :3], v, mask)
  with pytest.raises(AssertionError, match='rank'):
    model.causal_attend(cfg, q, k, v, mask[0])
