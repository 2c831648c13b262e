"""Compile once, and keep what was compiled."""

from collections.abc import Callable
import ctypes
import functools
from typing import Any

import jax

from mt.base import cache
from mt.base import errors


def jit_once(fn: Callable, shapes: int = 1, **kwargs) -> Callable:
  """`jax.jit` that refuses to trace its function once more than need be.

  One more trace means that a shape or a dtype changed between two calls, which
  would cost a compilation at every such change; it raises AssertionError.
  (chex.assert_max_traces counts by the function's source, which two models in
  one process share.)

  Args:
    fn: with a `__name__`, which the compiled program bears.
    shapes: how many shapes of its arguments there are.
    **kwargs: of jax.jit.
  """
  traces = 0

  @functools.wraps(fn)
  def counted(*args):
    nonlocal traces
    traces += 1
    if traces > shapes:
      raise AssertionError(f'{fn.__name__} is traced more than {shapes} times')
    return fn(*args)

  return jax.jit(counted, **kwargs)


def ahead(fn: Callable, *args: Any) -> None:
  """Compiles for these arguments before the first call, which then is quick.

  What the compiler leaves in malloc's hands goes back to the system first: 430
  MB for a step of the 270M, which would stand beside the step's own memory.

  Args:
    fn: of jit_once.
    *args: what it will be called with; they are not consumed.
  """
  fn.lower(*args).compile()
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # Of glibc alone.
  if trim is not None:
    trim(0)


def keep_compiled_programs() -> None:
  """Turns on JAX's persistent compilation cache, for a fast second start.

  JAX_COMPILATION_CACHE_DIR, if set, names the folder.
  """
  if not jax.config.jax_compilation_cache_dir:
    folder = cache.cache_dir() / 'compiled'
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise errors.UserError(
        f'{folder}: cannot keep compiled programs ({e.strerror}); set '
        'JAX_COMPILATION_CACHE_DIR or XDG_CACHE_HOME to a writable folder.'
      ) from e
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
