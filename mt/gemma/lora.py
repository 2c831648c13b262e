"""What is trained: all weights, a part of them, or low-rank factors (LoRA).

Trained and frozen parameters are two flat dicts from path to array, such as
{'layers/q_lora_a': …}; together they are the model's parameters.
LoRA: arXiv 2106.09685; y = x W + (alpha / rank) x A B, with A random and B
zero, so that training starts from the pretrained function.
"""

import re

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mt.base import errors
from mt.gemma import parameters
from mt.gemma import sizes

Flat = dict[str, jax.Array]  # Frozen matrices may be quantize.Quantized.

# Names for what is asked for most; anything else is a pattern of paths.
_PATTERNS = {'all': '.*', 'blocks': '(?!.*embedding).*'}


def targets(cfg: sizes.ModelConfig) -> list[str]:
  """The matrices that may have low-rank factors."""
  return list(dict.fromkeys(p.name for p in parameters.table(cfg) if p.lora))


def trained_paths(cfg: sizes.ModelConfig, parts: str) -> set[str]:
  """Of the pretrained parameters those that are trained; for LoRA none.

  Raises:
    errors.UserError: parts is no pattern, or fits nothing.
  """
  if parts == 'lora':
    return set()
  paths, pattern = parameters.shapes(cfg), _PATTERNS.get(parts, parts)
  return _fitting('train.parts', pattern, paths, "'all', 'blocks', 'lora'")


def partition(
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  parts: str,
  *,
  rank: int,
  key: chex.PRNGKey,
  matrices: str = '.*',
) -> tuple[Flat, Flat]:
  """Parts the parameters into (trained, frozen).

  Args:
    params: of the model, as loaded.
    parts: 'all'; 'blocks' (everything but embeddings); 'lora' (float32
      factors of `rank` on matrices of the blocks, the rest frozen); or a
      regular expression for the whole path of what is trained.
    rank: R.
    key: for the random factors A, normal with variance 1 / fan-in.
    matrices: a regular expression for the whole name of those that get
      factors, among `targets`.

  Raises:
    errors.UserError: parts or matrices is no pattern, or fits nothing.
  """
  flat = parameters.flatten(params)
  if parts != 'lora':
    chosen = trained_paths(cfg, parts)
    trained = {k: v for k, v in flat.items() if k in chosen}
    return trained, {k: v for k, v in flat.items() if k not in chosen}
  chosen = _fitting('train.lora_targets', matrices, targets(cfg))
  rows = [p for p in parameters.table(cfg) if p.lora]
  shapes, factors = parameters.shapes(cfg), {}
  for k, row in zip(jax.random.split(key, len(rows)), rows, strict=True):
    if row.name in chosen:
      n, fan_in, fan_out = shapes[row.path]
      a = jax.random.normal(k, (n, fan_in, rank), jnp.float32) * fan_in**-0.5
      factors[f'{row.path}_lora_a'] = a
      factors[f'{row.path}_lora_b'] = jnp.zeros((n, rank, fan_out))
  return factors, flat


def _fitting(knob, pattern, names, *shorthands):
  """Those of the names that the pattern fits."""
  try:
    chosen = {n for n in names if re.fullmatch(pattern, n)}
  except re.error as e:
    raise errors.UserError(
      f'{knob} is {pattern!r}, no regular expression ({e}); such as '
      f"'layers/(q|v)' expected."
    ) from e
  if not chosen:
    raise errors.UserError(
      f'{knob} is {pattern!r}, which fits none of '
      f'{", ".join([*shorthands, *sorted(names)])}.'
    )
  return chosen


def merge(
  trained: Flat, frozen: Flat, *, lora_scale: float
) -> parameters.Params:
  """The model's parameters out of the two; B is multiplied by lora_scale."""
  flat = frozen | trained
  for name in trained:
    if name.endswith('_lora_b'):
      flat[name] = trained[name] * lora_scale
  return parameters.unflatten(flat)


def fold(params: parameters.Params) -> parameters.Params:
  """Adds the low-rank products to their matrices: same function, no factors.

  Args:
    params: as `merge` returns them.
  """
  flat = parameters.flatten(params)
  out = {k: v for k, v in flat.items() if '_lora_' not in k}
  for path, w in out.items():
    if f'{path}_lora_a' in flat:
      a, b = flat[f'{path}_lora_a'], flat[f'{path}_lora_b']
      chex.assert_equal_shape_prefix([w, a, b], 1)
      out[path] = _fold_stack(w, a, b)
  return parameters.unflatten(out)


@jax.jit
def _fold_stack(w, a, b):
  """A layer at a time: in float32 whole stacks are twice a bfloat16 model."""
  return lax.map(lambda x: add_product(*x, w.dtype), (w, a, b))


def add_product(
  w: jax.Array, a: jax.Array, b: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """w + a @ b, summed in float32: [in, out], [in, R], [R, out]."""
  chex.assert_rank([w, a, b], 2)
  return (w.astype(jnp.float32) + a @ b).astype(dtype)
