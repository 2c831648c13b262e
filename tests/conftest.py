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
  """configs/debug.py cut down to seconds: tiny rows, few sentences."""
  from configs import debug

  config = debug.get_config()
  config.data.length = 128
  config.train.max_steps = 6
  config.train.batch_size = 2
  config.eval.every = 3
  config.eval.loss_pairs = 4
  config.eval.translate_every = config.eval.chrf_pairs = 0
  config.eval.patience = 0
  config.eval.minitrain_pairs = 0
  config.eval.translate_pairs = 3
  config.decode.max_ratio = 0.1
  config.checkpoint.every = 2
  return config
