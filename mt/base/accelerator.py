"""Which accelerator is there, and whether JAX sees it.

  python -m mt.base.accelerator     prints cuda, tpu or cpu: the Makefile asks

JAX is imported late, as it is not installed yet when the Makefile asks.
"""

import os
import pathlib

_NAMES = {'cuda': 'an NVIDIA card', 'tpu': 'a TPU'}
_NVIDIA = ('dev/nvidiactl', 'usr/lib/wsl/lib/nvidia-smi')  # WSL has no device.
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'  # Of XLA_FLAGS.
_GOOGLE = '0x1ae0'  # PCI vendor of TPUs, and of network cards in its cloud.


def find(root: pathlib.Path = pathlib.Path('/')) -> str:
  """`cuda`, `tpu` or `cpu`: what is plugged in, whatever JAX sees of it."""
  if any((root / name).exists() for name in _NVIDIA):
    return 'cuda'
  devices = [*root.glob('dev/accel*'), *root.glob('dev/vfio/[0-9]*')]
  vendors = root.glob('sys/bus/pci/devices/*/vendor')
  if devices and any(v.read_text('utf-8').strip() == _GOOGLE for v in vendors):
    return 'tpu'
  return 'cpu'


def describe(root: pathlib.Path = pathlib.Path('/')) -> str:
  """What JAX computes on, in a line; and what is there that it does not see."""
  import jax

  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    number, kind = len(jax.devices()), device.device_kind
    return f'machine: {number} x {kind}, {memory() / 1e9:.0f} GB usable'
  line = f'machine: CPU, {os.cpu_count()} cores'
  there = find(root)
  if there == 'cpu' or jax.config.jax_platforms == 'cpu':
    return line
  driver = ' and its driver must be 580 or newer' if there == 'cuda' else ''
  return (
    f'{line}; there is {_NAMES[there]} that JAX does not see: `make train '
    f'ACCELERATOR={there}` installs its plugin{driver}'
  )


def problem() -> str:
  """What keeps JAX from starting here, as a sentence; '' where it starts."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:  # Both are JAX's own.
    asked = os.environ.get('JAX_PLATFORMS', '')
    why = ' '.join(str(e).split('(set JAX')[0].split())
    return (
      f"JAX cannot start with JAX_PLATFORMS='{asked}' "
      f'({why or "no such device"}); unset it, or set it to cpu; `make train '
      'ACCELERATOR=cuda` or tpu installs its plugin (CUDA 13 wants driver 580 '
      'or newer).'
    )
  return ''


def set_deterministic() -> None:
  """Has a GPU sum in the same order each time; before JAX asks for devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC}'.strip()


def memory() -> int:
  """Bytes that JAX may take of a device; 0 where it does not say (a CPU)."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit', 0)


if __name__ == '__main__':
  print(find())
