"""What the tests of this room compile, they share."""

import jax
import pytest


@pytest.fixture(scope='package', autouse=True)
def quick_compilation():
  """Most of their time is compiling: without optimising, it takes less."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, True)
  # What other tests have compiled rounds differently, random weights too.
  jax.clear_caches()
  yield
  jax.config.update(name, before)
  jax.clear_caches()
