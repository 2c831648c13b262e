"""Compile once, and keep what was compiled."""

from collections.abc import Callable
import ctypes
import functools
from typing import Any

import jax

from mt.base import cache
from mt.base import files


def jit_once(fn: Callable, **kwargs) -> Callable:
  """`jax.jit` of a function that may be traced once; kwargs are those of jit.

  A second trace means that a shape or a dtype changed between two calls, which
  would cost a compilation each time; it raises AssertionError.
  (chex.assert_max_traces counts by the function's source, which two models in
  one process share.)
  """
  traces = 0

  @functools.wraps(fn)
  def counted(*args):
    nonlocal traces
    traces += 1
    if traces > 1:
      raise AssertionError(f'{fn.__name__} is traced a second time')
    return fn(*args)

  return jax.jit(counted, **kwargs)


def ahead(fn: Callable, *args: Any) -> None:
  """Compiles a jitted function for these arguments, which are not consumed.

  What the compiler leaves in malloc's hands goes back to the system first: 430
  MB for a step of the 270M, which would stand beside the step's own memory.
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
      raise files.unwritable(folder, e) from e
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
