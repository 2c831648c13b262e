"""Compile once, ahead of the first call."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from mt.base import compiling


def test_jit_once():
  def double(x):
    return 2 * x

  one, other = compiling.jit_once(double), compiling.jit_once(double)
  assert one(np.ones(3)).tolist() == one(np.zeros(3) + 1).tolist() == [2] * 3
  # Another wrapper of the same function has a trace of its own.
  assert other(np.ones(2)).tolist() == [2, 2]
  for changed in (np.ones(2), np.ones(3, np.int32)):
    with pytest.raises(AssertionError, match='traced'):
      one(changed)
  assert one(np.ones(3)).tolist() == [2] * 3  # It can still be used.


@pytest.fixture
def compilations():
  """Grows by one with each program that is compiled."""
  seen = []

  def note(name, *_, **__):
    if name == '/jax/core/compile/backend_compile_duration':
      seen.append(name)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield seen
  jax.monitoring.unregister_event_duration_listener(note)


def test_what_is_compiled_ahead_is_not_compiled_again(compilations):
  def add(total, x):
    return total + x

  fn = compiling.jit_once(add, donate_argnums=0)
  args = jnp.arange(3.0), jnp.ones(3)
  del compilations[:]
  compiling.ahead(fn, *args)
  assert len(compilations) == 1
  assert not args[0].is_deleted()
  assert fn(*args).tolist() == [1, 2, 3]  # Nor traced: fn would refuse it.
  assert args[0].is_deleted()
  assert len(compilations) == 1


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'malloc_trim'),
  reason='not the C library glibc',
)
def test_freed_memory_goes_back_to_the_system():
  fn = compiling.jit_once(lambda x: x + 1)
  compiling.ahead(fn, jnp.ones(2))
  used = psutil.Process().memory_info
  # Beyond what Python has pools for, short of what malloc maps; the last one
  # stays, and malloc cannot shorten the heap.
  blocks = [bytearray(2000) for _ in range(100_000)]
  full = used().rss
  del blocks[:-1]
  kept = full - used().rss
  compiling.ahead(fn, jnp.ones(2))
  assert kept < 50e6, 'malloc gave it back by itself'
  assert full - used().rss > 100e6
