"""Accelerators that are not here, for their own compilers to compile for.

  targets.prepare()
  target = targets.compile_only('h100:8')  # 'v5e:2x4' is a TPU slice.

What is lowered for arrays on `target.devices` (jax.ShapeDtypeStruct with a
sharding) is compiled by the accelerator's compiler: memory and kernels are its
own words. Nothing can be run. `make plan` installs the compilers.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
from typing import Any

from mt.base import errors


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device. Rates are the peaks of its data sheet, without sparsity."""

  kind: str  # A pattern for jax.Device.device_kind.
  memory: float  # Bytes.
  flops: float  # Of bfloat16 products a second; float32 (TF32) takes twice.
  bandwidth: float  # Bytes a second, of the memory.
  link: float  # Bytes a second that it receives from other devices.
  clock: float = 0.0  # Of a TPU, Hz: its compiler tells cycles.
  # Of a GPU, for its compiler: cores, compute capability, bytes of the L2
  # cache, GHz, shared memory of a core and what a block may use of it, threads
  # of a core, float32 units of a core.
  gpu: tuple = ()

  def peak(self, dtype: str) -> float:
    """FLOPs a second of products in `dtype`, at JAX's default precision.

    A TPU makes those of float32 in one pass of bfloat16.
    """
    slow = dtype == 'float32' and not self.clock
    return self.flops / 2 if slow else self.flops


# Memory, bandwidth and what the compiler is told: XLA's target specs of h100,
# h200, a100 and rtx6000pro; NVIDIA's data sheets for the others. Products and
# links (NVLink, PCIe) are the data sheets', TPUs those of Cloud TPU's
# documentation; clocks follow from its peaks.
# fmt: off
CHIPS = {
  'h100': Chip('H100', 84942979072, 989e12, 3.352e12, 450e9,
    gpu=(132, (9, 0), 52428800, 1.98, 233472, 232448, 2048, 128)),
  'h200': Chip('H200', 151397597184, 989e12, 4.8e12, 450e9,
    gpu=(132, (9, 0), 52428800, 1.98, 233472, 232448, 2048, 128)),
  'a100': Chip('A100', 85100068864, 312e12, 2.039e12, 300e9,
    gpu=(108, (8, 0), 41943040, 1.41, 167936, 166912, 2048, 64)),
  'rtx6000pro': Chip('RTX PRO 6000', 103079215104, 504e12, 1.792e12, 64e9,
    gpu=(188, (12, 0), 134217728, 2.6, 131072, 101376, 1536, 128)),
  'rtx4090': Chip('RTX 4090', 25757220864, 165e12, 1.008e12, 32e9,
    gpu=(128, (8, 9), 75497472, 2.52, 102400, 101376, 1536, 128)),
  'l4': Chip('L4', 24152899584, 121e12, 0.3e12, 32e9,
    gpu=(58, (8, 9), 50331648, 2.04, 102400, 101376, 1536, 128)),
  'v5e': Chip('TPU v5 lite', 16 * 2**30, 197e12, 0.819e12, 200e9, 1.5e9),
  'v5p': Chip('TPU v5p?', 95 * 2**30, 459e12, 2.765e12, 600e9, 1.75e9),
  'v6e': Chip('TPU v6 lite', 32 * 2**30, 918e12, 1.64e12, 448e9, 1.75e9),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Target:
  """What a plan is made for."""

  name: str
  devices: Sequence[Any]  # jax.Device.
  usable: float  # Bytes of each device that a run may take.
  chip: Chip | None  # None where nothing is known of its speed.

  @property
  def platform(self) -> str:  # As jax.default_backend() would say there.
    platform = self.devices[0].platform
    return 'gpu' if platform == 'cuda' else platform


def chip_of(kind: str) -> Chip | None:
  """The chip of a jax.Device.device_kind, such as 'NVIDIA L4'.

  None for one that has its name and other rates, such as an H100 PCIe.
  """
  if re.search(r'H\d+ (PCIe|NVL)|Laptop', kind):
    return None
  found = (c for c in CHIPS.values() if re.search(rf'\b{c.kind}\b', kind))
  return next(found, None)


def prepare() -> None:
  """What JAX and XLA read when they start: to be called before they do."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # Of compilers there may be.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # What they say besides.
  # All else is as users run it. Autotuning would have to run kernels.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'


def compile_only(on: str) -> Target:
  """Devices of a GPU (NAME or NAME:NUMBER) or of a TPU slice (NAME:2x4).

  Raises:
    errors.UserError: there is no such target, or its compiler is missing.
  """
  name, _, number = on.partition(':')
  chip = CHIPS.get(name)
  shape = r'\d+(x\d+){1,2}' if chip and chip.clock else r'([1-9]\d*)?'
  if chip is None or not re.fullmatch(shape, number):
    raise errors.UserError(
      f'--on={on}: no such target; one of {_names(gpus=True)}, with :8 for '
      f'eight of them, or a TPU slice of {_names(gpus=False)}, such as '
      'v5e:2x4 or v5p:2x2x2, expected.'
    )
  if not importlib.util.find_spec(
    'libtpu' if chip.clock else 'jax_cuda13_plugin'
  ):
    raise errors.UserError(
      f'--on={on}: the compilers of accelerators are not installed; `make '
      f'plan ON={on} CONFIG=…` installs them and plans; without --on the plan '
      'is a guess.'
    )
  if not chip.clock:
    _let_tokamax_compile(chip)
  devices = _tpus(on) if chip.clock else _gpus(name, chip, int(number or 1))
  return Target(on, devices, 0.9 * chip.memory, chip)


def _names(gpus):
  return ', '.join(k for k, chip in CHIPS.items() if bool(chip.gpu) == gpus)


def _let_tokamax_compile(chip):
  """Its kernels ask the default device, here a CPU, whether they may."""
  from absl import flags
  from absl import logging
  import tokamax  # noqa: F401
  from tokamax._src import gpu_utils
  from tokamax._src.ops import op

  def below(kind):
    for child in kind.__subclasses__():
      yield child
      yield from below(child)

  for kind in below(op.Op):
    kind.supported_on = lambda self, device: True
  for major in (8, 9, 10):
    here = chip.gpu[1][0] == major
    setattr(gpu_utils, f'is_sm{major}0', lambda device=None, here=here: here)
  with contextlib.suppress(ImportError):  # Of JAX 0.12, whose Triton asks too.
    from jax._src.pallas.triton import gpu_info

    major, minor = chip.gpu[1]
    card = gpu_info.GpuInfo(
      gpu_version=None,
      arch_name=f'{major}.{minor}',
      compute_capability=10 * major + minor,
    )
    gpu_info.registry['cpu'] = lambda: card
  flags.FLAGS['tokamax_cross_compile'].value = True
  logging.set_verbosity(
    logging.ERROR
  )  # It misses its tuned configs, at length.


def _gpus(name, chip, number):
  import jax
  from jax._src.lib import xla_client
  from jax.experimental import topologies
  import jax_plugins.xla_cuda13

  jax.devices()  # Makes JAX look for its plugins.
  library = pathlib.Path(jax_plugins.xla_cuda13.__file__).parent
  if not xla_client.pjrt_plugin_loaded('cuda'):
    xla_client.load_pjrt_plugin_dynamically(
      'cuda', str(library / 'xla_cuda_plugin.so')
    )
  shape = f'1x1x{number}'
  return topologies.get_topology_desc(
    shape,
    platform='cuda',
    topology=shape,
    target_config=_target_config(name, chip),
  ).devices


def _target_config(name, chip):
  """The GpuTargetConfig of XLA, as text."""
  cores, (major, minor), l2, ghz, shared, optin, threads, units = chip.gpu
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {l2} clock_rate_ghz: {ghz}
  device_memory_size: {chip.memory:.0f} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def _tpus(on):
  import jax
  from jax.experimental import topologies

  jax.devices()
  os.environ.pop('TPU_LIBRARY_PATH', None)
  one = set(on.partition(':')[2].split('x')) == {'1'}
  bounds = {'chips_per_host_bounds': (1, 1, 1)} if one else {}
  try:
    return topologies.get_topology_desc(on, platform='tpu', **bounds).devices
  except jax.errors.JaxRuntimeError as e:
    if 'INVALID_ARGUMENT' not in str(e):
      raise
    raise errors.UserError(f'--on={on}: no such slice of TPUs ({e}).') from e
