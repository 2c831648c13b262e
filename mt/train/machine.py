"""The knobs that follow the machine: `auto`, or 0, in a config.

A GPU or TPU multiplies bfloat16 many times as fast as float32, computes most of
a layer again in less time than it reads back what was saved of it, and wants
the whole vocabulary in one product. A CPU's cache wants everything small.
"""

import importlib.util
import os
import re

import jax
import ml_collections

from mt.base import accelerator
from mt.base import errors
from mt.base import journal
from mt.gemma import fused
from mt.gemma import sizes

_CPU = {
  'dtype': 'float32',
  'frozen_dtype': 'float32',
  'remat': 'none',
  'loss_chunk': 576,
  'loss_tile': 2048,
}
_ACCELERATOR = {
  'dtype': 'bfloat16',
  'frozen_dtype': 'bfloat16',
  'loss_tile': -1,
}
# A GPU reads back what it saved of a layer's last product sooner than it makes
# it again (5 % of a step of the 1B); a TPU does not.
_REMAT = {'gpu': 'narrow', 'tpu': 'full'}
_KERNEL = {'gpu': 'tokamax', 'tpu': 'splash'}  # Of attention.
# Twice as many save 2 % of a step of the 270M on a TPU, 0.5 % on a GPU.
_LOSS_CHUNK = {'gpu': 2048, 'tpu': 4096}
# NVIDIA's cards before Ampere have no bfloat16 products; CUDA 13 knows these:
# T4, T1000, RTX 2080, … An RTX 2050 is of Ampere, an RTX 2000 of Ada.
_TURING = re.compile(r'\bT\d+|RTX 20[678]0|GTX 16|TITAN RTX|Quadro RTX')


def resolve(
  config: ml_collections.ConfigDict, platform: str, kind: str, memory: float
) -> ml_collections.ConfigDict:
  """A copy of a config in which each knob of `train` has a value.

  Args:
    config: of a run.
    platform: cpu, gpu or tpu, as JAX calls it.
    kind: of the devices, as JAX calls it, such as `NVIDIA H100 80GB HBM3`.
    memory: bytes that a device has for arrays; without effect for a CPU.
  """
  best = _CPU
  if platform != 'cpu':
    chunk = _loss_chunk(_LOSS_CHUNK[platform], memory)
    best = _ACCELERATOR | {'loss_chunk': chunk, 'remat': _REMAT[platform]}
  if platform == 'gpu' and _TURING.search(kind):
    best = best | {'dtype': 'float32'}
  config = config.copy_and_resolve_references()
  for knob, value in best.items():
    if config.train[knob] in ('auto', 0):
      config.train[knob] = value
  if config.train.attention == 'auto':
    name = _KERNEL.get(platform, 'xla')
    fits = not _against(name, config, platform)
    fused = fits and config.train.dtype == 'bfloat16'
    config.train.attention = name if fused else 'xla'
  return config


def _against(name, config, platform):
  """Why attention cannot be this one here; '' if it can."""
  if name not in ('xla', _KERNEL.get(platform)):
    other = 'GPU' if name == 'tokamax' else 'TPU'
    return f'is for a {other}, and this is a {platform.upper()}'
  if name == 'tokamax' and not importlib.util.find_spec('tokamax'):
    return 'is not installed (`make train ACCELERATOR=cuda` does it)'
  if name == 'tokamax' and config.train.dtype != 'bfloat16':
    return 'takes train.dtype=bfloat16'
  if name == 'splash' and config.data.length % 128:
    return f'takes rows of a multiple of 128, data.length={config.data.length}'
  return ''


def check_attention(config: ml_collections.ConfigDict, platform: str) -> None:
  """Refuses a fused kernel that is not for this machine, or not for these rows.

  Args:
    config: as `resolve` returns it.
    platform: cpu, gpu or tpu.

  Raises:
    errors.UserError: naming the knob and what would do.
  """
  name = config.train.attention
  if reason := _against(name, config, platform):
    raise errors.UserError(
      f'train.attention={name} {reason}; auto or xla expected.'
    )


def say_attention(
  config: ml_collections.ConfigDict, cfg: sizes.ModelConfig
) -> None:
  """Says which layers have plain products in place of the fused kernel."""
  name = config.train.attention
  reasons = {fused.against(stack.cfg, name) for stack in cfg.stacks()}
  for reason in sorted(reasons - {''}):
    journal.say(f'note: attention is xla in {reason}')


def check_deterministic(
  config: ml_collections.ConfigDict, platform: str
) -> None:
  """Refuses train.deterministic where JAX has started without it.

  Raises:
    errors.UserError: naming the flag.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  wanted = config.train.deterministic and platform == 'gpu'
  if wanted and accelerator.DETERMINISTIC not in flags:
    raise errors.UserError(
      'train.deterministic is True, but JAX has started without it; start by '
      f'train.py, or with {accelerator.DETERMINISTIC} in XLA_FLAGS.'
    )


def set_precision(config: ml_collections.ConfigDict) -> None:
  """Has JAX trace what follows with train.matmul_precision."""
  precision = config.train.matmul_precision
  jax.config.update('jax_default_matmul_precision', precision)


def _loss_chunk(most, memory):
  """Targets whose logits, in bfloat16, take an eighth of the memory at most."""
  while most > 256 and most * 262_144 * 2 > memory / 8:
    most //= 2
  return most


def here(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`resolve` for the devices of this process."""
  device = jax.local_devices()[0]
  memory = accelerator.memory()
  return resolve(config, device.platform, device.device_kind, memory)


def say_chosen(
  asked: ml_collections.ConfigDict, made: ml_collections.ConfigDict
) -> None:
  """A line with what `resolve` has made of what was asked for."""
  chosen = [f'{k}={v}' for k, v in made.train.items() if asked.train[k] != v]
  if chosen:
    journal.say(f'auto: {" ".join(chosen)}')
