"""Tests keep to themselves: nothing is read from or left in the home folder."""

import functools
import gc
from importlib import metadata
import os
import signal
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix='mt-tests-')
os.environ['XDG_CACHE_HOME'] = _CACHE.name
os.environ['MPLCONFIGDIR'] = _CACHE.name  # Of matplotlib.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Where the tests are started in the background; tests interrupt runs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# Meshes need devices. What asks for no mesh takes the first.
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# Compiling is most of the time of these tests, and models are tiny: a sixth.
_QUICK = (
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_parallel_codegen_split_count=1',
)
if metadata.version('jaxlib').startswith('0.10.'):  # Later ones have no other.
  _QUICK += ('--xla_cpu_use_fusion_emitters=false',)
# What one test compiles, the others load: those of this process, of pytest's
# other workers, which inherit the folder from the first, and of commands that
# tests start. Compiler flags are part of a program's key.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix='mt-tests-compiled-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


def pytest_configure(config):
  """Runs of minutes (-m real) have the programs that users have."""
  if config.option.markexpr != 'real':
    os.environ['XLA_FLAGS'] = ' '.join((os.environ['XLA_FLAGS'], *_QUICK))


def pytest_collection_finish(session):
  """Tracing makes many objects: Python looks for circles less often, and not
  through what is imported. A twelfth of the processor time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def debug_config(monkeypatch):
  """A run of seconds, see tests/runs/small.py.

  Its report's charts, a quarter of its processor time, are drawn once for each
  title and numbers of points; tests/evaluate has those of charts.
  """
  from mt.evaluate import chart
  from mt.train import machine
  from tests.runs import small

  real = chart.lines

  def lines(title, series):
    sizes = tuple((name, len(points)) for name, points in series)
    return _drawn(real, title, sizes)

  monkeypatch.setattr(chart, 'lines', lines)
  return machine.here(small.get_config())


@functools.cache
def _drawn(draw, title, sizes):
  return draw(title, [(name, [(x, x) for x in range(n)]) for name, n in sizes])
