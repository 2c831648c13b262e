"""Tests keep to themselves: nothing is read from or left in the home folder."""

import os
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix='mt-tests-')
os.environ['XDG_CACHE_HOME'] = _CACHE.name
os.environ['MPLCONFIGDIR'] = _CACHE.name  # Of matplotlib.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Meshes need devices. What asks for no mesh takes the first.
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# What one test compiles, the others load: those of this process, of pytest's
# other workers, which inherit the folder from the first, and of commands that
# tests start. Compiler flags are part of a program's key.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix='mt-tests-compiled-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


@pytest.fixture(scope='module')
def quick_compilation():
  """For tests that mostly compile: without optimising, it takes less."""
  import jax

  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, True)
  # What other tests have compiled rounds differently, random weights too: a
  # process of its own, started by a test, would not get the same ones.
  jax.clear_caches()
  yield
  jax.config.update(name, before)
  jax.clear_caches()


@pytest.fixture
def debug_config():
  """A run of seconds, see tests/runs/small.py."""
  from mt.train import machine
  from tests.runs import small

  return machine.here(small.get_config())
