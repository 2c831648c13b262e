"""How well a machine is used: useful FLOPs, the peak of devices, their memory.

MFU, model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), is the useful
FLOPs of a second over the peak of the devices.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import targets


def useful_flops(
  cfg: sizes.ModelConfig, trained: lora.Flat, batch: dict[str, jax.Array]
) -> jax.Array:
  """FLOPs without which a step cannot be: float32 scalar.

  A product with a weight is 2 for each position, forward; 2 for the gradient of
  its input; and 2 for its own, if it is trained: 6, or 4 of a frozen one, for
  LoRA in all layers. Attention has 4 for each number of a head and each pair of
  a query and a key that it may see, and 8 backward. Where only the norm after
  the layers is trained, nothing of theirs is computed backward: 2 and 4. The
  output layer counts at targets alone; neither padding nor what is computed
  twice counts.

  Args:
    cfg: the model's shape.
    trained: parameters by path, see mt/gemma/lora.py.
    batch: positions, segment_ids, target_mask [B, L].
  """
  inside = batch['segment_ids'] > 0
  chex.assert_rank(inside, 2)
  backward = trained.keys() != {'final_norm'}
  of_token = sum(6 * x.size for path, x in trained.items() if '_lora_' in path)
  shapes = parameters.shapes(cfg)
  for row in parameters.table(cfg):
    if row.stacked or row.path == 'layer_input_proj':
      factor = 6 if row.path in trained else 4 if backward else 2
      of_token += factor * math.prod(shapes[row.path])
  of_target = 6 if 'embedding' in trained else 4
  of_target *= cfg.vocab_size * cfg.embed_dim
  keys = jnp.where(inside, batch['positions'] + 1, 0).astype(jnp.float32)
  pairs = {'G': jnp.sum(keys)}
  pairs['L'] = jnp.sum(jnp.minimum(keys, cfg.window or math.inf))
  of_pairs = (12.0 if backward else 4.0) * sum(
    stack.cfg.num_heads * stack.cfg.head_dim * pairs[cfg.kind(n)]
    for stack in cfg.stacks()
    for n in stack.layers
  )
  return (
    float(of_token) * jnp.sum(inside)
    + float(of_target) * jnp.sum(batch['target_mask'])
    + of_pairs
  )


def peak_flops(dtype: str, mesh: Mesh | None) -> float | None:
  """Of all devices of a run, a second; None where it is not known (a CPU)."""
  chip = targets.chip_of(jax.local_devices()[0].device_kind)
  devices = 1 if mesh is None else mesh.size
  return chip.peak(dtype) * devices if chip else None


def of_step(
  metrics: dict[str, float], seconds: float, peak: float | None
) -> dict[str, float]:
  """targets_per_s and tokens_per_s; `mfu`, 0 to 1, and memory where known.

  Args:
    metrics: of the step: targets, tokens (padding excluded), useful_flops.
    seconds: that it took.
    peak: see peak_flops.
  """
  found = {
    f'{name}_per_s': round(metrics[name] / seconds, 1)
    for name in ('targets', 'tokens')
  }
  if peak:
    found['mfu'] = round(metrics['useful_flops'] / seconds / peak, 4)
  return found | device_memory()


def device_memory() -> dict[str, float]:
  """GB in use and at the peak on the first device; {} where it does not say."""
  stats = jax.local_devices()[0].memory_stats() or {}
  known = {'memory_gb': 'bytes_in_use', 'peak_memory_gb': 'peak_bytes_in_use'}
  return {
    name: round(stats[key] / 1e9, 3)
    for name, key in known.items()
    if key in stats
  }
