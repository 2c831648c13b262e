"""Accelerators are found, and missed where JAX does not see them."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from mt.base import accelerator

NVIDIA = ('dev/nvidiactl',)
GOOGLE = 'sys/bus/pci/devices/0000:00:05.0/vendor'


def _root(folder: pathlib.Path, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('0x1ae0\n' if name == GOOGLE else '')
  return folder


@pytest.mark.parametrize(
  'names, found',
  [
    ((), 'cpu'),
    (NVIDIA, 'cuda'),
    ((*NVIDIA, 'dev/vfio/0', GOOGLE), 'cuda'),
    (('usr/lib/wsl/lib/nvidia-smi',), 'cuda'),
    (('dev/accel0', GOOGLE), 'tpu'),
    (('dev/vfio/0', GOOGLE), 'tpu'),
    ((GOOGLE,), 'cpu'),  # A network card.
    (('dev/vfio/vfio', GOOGLE), 'cpu'),
    (('dev/accel/accel0',), 'cpu'),  # Of a laptop.
  ],
)
def test_what_is_plugged_in(tmp_path, names, found):
  assert accelerator.find(_root(tmp_path, *names)) == found


@pytest.fixture
def any_platform():
  asked = jax.config.jax_platforms
  yield lambda: jax.config.update('jax_platforms', None)
  jax.config.update('jax_platforms', asked)


def test_a_card_that_jax_does_not_see_is_told(tmp_path, any_platform):
  cpu = f'machine: CPU, {os.cpu_count()} cores'
  root = _root(tmp_path, *NVIDIA)
  assert accelerator.describe(root) == cpu  # As the tests ask for the CPU.
  any_platform()
  line = accelerator.describe(root)
  assert line.startswith(cpu + '; there is an NVIDIA card')
  assert 'make train ACCELERATOR=cuda' in line and '580' in line
  assert accelerator.describe(tmp_path / 'nothing') == cpu


def test_devices_are_described(monkeypatch):
  stats = {'bytes_limit': 78_147_540_000, 'bytes_in_use': 0}
  device = types.SimpleNamespace(
    platform='gpu',
    device_kind='NVIDIA H100 80GB HBM3',
    memory_stats=lambda: stats,
  )
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  monkeypatch.setattr(jax, 'devices', lambda: [device] * 8)
  line = 'machine: 8 x NVIDIA H100 80GB HBM3, 78 GB usable'
  assert accelerator.describe() == line


@pytest.mark.parametrize('name', ['cpu', 'cuda', 'tpu'])
def test_make_installs_its_plugin(name):
  """And nothing else; the CPU is asked for where it was."""
  done = subprocess.run(
    ['make', '--dry-run', '--always-make', 'train', f'ACCELERATOR={name}'],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    check=True,
  )
  locks = [w for w in done.stdout.split() if w.endswith('.lock')]
  plugin = [f'requirements-{name}.lock'] if name != 'cpu' else []
  assert locks == ['requirements.lock', *plugin]
  assert f'touch .venv/installed-{name}' in done.stdout


_TRAIN = """
import os, runpy, sys
from mt.base import processes
def start(*_):
  sys.exit(os.environ['XLA_FLAGS'])
processes.start = start
sys.argv = ['train.py', '--config=tests/runs/small.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.parametrize('flags', [(), ('--config.train.deterministic',)])
def test_determinism_is_asked_for_before_jax_starts(flags):
  done = subprocess.run(
    [sys.executable, '-c', _TRAIN, *flags],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {'XLA_FLAGS': '--xla_gpu_autotune_level=0'},
    capture_output=True,
    text=True,
  )
  asked = accelerator.DETERMINISTIC in done.stderr
  assert asked == bool(flags), done.stderr
  assert '--xla_gpu_autotune_level=0' in done.stderr
