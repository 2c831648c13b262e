"""What a step needs in memory at the least, and what there is.

Arithmetic on shapes, for a refusal before anything is read or compiled. What a
step needs in truth is more: see `train.py --plan`.
"""

import pathlib

import jax
from jax.sharding import Mesh
import ml_collections
import psutil

from mt.base import errors
from mt.gemma import sizes
from mt.train import plan

_CGROUPS = (  # (limit, in use), of version 2 and 1.
  ('memory.max', 'memory.current'),
  ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
)
_WAYS = (
  ('train.micro_batches', None),  # As many as there are rows for.
  ('train.remat', 'full'),
  ('train.parts', 'lora'),
  ('optim.name', 'adafactor'),
  ('train.frozen_dtype', 'bfloat16'),
)


def available(root: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Bytes that a device of this process can still give.

  Args:
    root: where Linux tells the limits of this process's control group.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    limit = stats.get('bytes_limit', 1 << 62)
    return limit - stats.get('bytes_in_use', 0)
  free = psutil.virtual_memory().available
  for names in _CGROUPS:
    try:
      limit, used = (int((root / name).read_text()) for name in names)
    except (OSError, ValueError):  # There is none, or it is 'max'.
      continue
    free = min(free, limit - used)
  return free // len(jax.local_devices())  # They share it.


def needed(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> int:
  """Bytes on one device: state, gradients, and what the backward pass reads.

  Of the latter only what no compiler can leave out: the input of each layer
  and, without `train.remat`, what the products with weights read. With a
  pattern in `train.parts` that may be nothing.
  """
  train = config.train
  state = plan.abstract_state(cfg, config, mesh)
  total = plan.bytes_of(state) + plan.bytes_of(state.trained)
  if train.parts not in ('all', 'blocks', 'lora'):
    return total
  rows = train.batch_size // train.micro_batches // _shards(mesh)
  width = cfg.embed_dim
  if train.remat != 'full':
    width += cfg.embed_dim + cfg.num_heads * cfg.head_dim + cfg.hidden_dim
  item = 2 if train.dtype == 'bfloat16' else 4
  return total + rows * config.data.length * cfg.num_layers * width * item


def _shards(mesh):
  """Groups of devices that have rows of their own."""
  return 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']


def check(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> None:
  """Refuses a config that cannot fit.

  Raises:
    errors.UserError: with what is needed, what there is, and the three knobs
      that save most.
  """
  need, free = needed(cfg, config, mesh), available()
  if need <= free:
    return
  saved = []
  for knob, value in _WAYS:
    group, name = knob.split('.')
    other = config.copy_and_resolve_references()
    if value is None:
      value = max(1, config.train.batch_size // _shards(mesh))
    if (knob, value) == ('optim.name', 'adafactor'):
      other.optim.weight_decay = 0.0
    other[group][name] = value
    less = need - needed(cfg, other, mesh)
    if less > 0:
      saved.append((less, f'{knob}={value} (saves {_size(less)})'))
  ways = [text for _, text in sorted(saved, reverse=True)[:3]]
  raise errors.UserError(
    f'a step needs {_size(need)} of memory at the least, and {_size(free)} are '
    f'free; {" or ".join(ways) or "a smaller weights.size"} would help, and so '
    'would a smaller train.batch_size or data.length.'
  )


def _size(number):
  return f'{number / 1e9:,.1f} GB'
