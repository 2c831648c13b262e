"""What is trained: all weights, a part of them, or low-rank factors (LoRA).

Trained and frozen parameters are two flat dicts from path to array, such as
{'layers/q_lora_a': …}; together they are the model's parameters.
LoRA: arXiv 2106.09685; y = x W + (alpha / rank) x A B, with A random and B
zero, so that training starts from the pretrained function.
"""

import re

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp

from mt.base import errors
from mt.gemma import model

Flat = dict[str, jax.Array]

# Names for what is asked for most; anything else is a pattern of paths.
_PATTERNS = {'all': '.*', 'blocks': '(?!embedding).*'}
LORA_TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def partition(
  params: model.Params,
  parts: str,
  *,
  rank: int,
  key: chex.PRNGKey,
  targets: str = '.*',
) -> tuple[Flat, Flat]:
  """Parts the parameters into (trained, frozen).

  Args:
    params: of the model, as loaded.
    parts: 'all'; 'blocks' (everything but the embedding); 'lora' (float32
      factors of `rank` on matrices of the blocks, the rest frozen); or a
      regular expression for the whole path of what is trained.
    rank: R.
    key: for the random factors A, normal with variance 1 / fan-in.
    targets: a regular expression for the whole name of the matrices that get
      factors, among LORA_TARGETS.

  Raises:
    errors.UserError: parts or targets is no pattern, or fits nothing.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  if parts != 'lora':
    pattern = _PATTERNS.get(parts, parts)
    chosen = _fitting('train.parts', pattern, flat, "'all', 'blocks', 'lora'")
    trained = {k: v for k, v in flat.items() if k in chosen}
    return trained, {k: v for k, v in flat.items() if k not in chosen}
  chosen = _fitting('train.lora_targets', targets, LORA_TARGETS)
  factors = {}
  for k, name in zip(
    jax.random.split(key, len(LORA_TARGETS)), LORA_TARGETS, strict=True
  ):
    if name not in chosen:
      continue
    n, fan_in, fan_out = flat[f'layers/{name}'].shape
    a = jax.random.normal(k, (n, fan_in, rank), jnp.float32) * fan_in**-0.5
    factors[f'layers/{name}_lora_a'] = a
    factors[f'layers/{name}_lora_b'] = jnp.zeros(
      (n, rank, fan_out), jnp.float32
    )
  return factors, flat


def _fitting(knob, pattern, names, *shorthands):
  try:
    chosen = {n for n in names if re.fullmatch(pattern, n)}
  except re.error as e:
    raise errors.UserError(
      f'{knob} is {pattern!r}, no regular expression ({e}); such as '
      f"'layers/(q|v)' expected."
    ) from None
  if not chosen:
    raise errors.UserError(
      f'{knob} is {pattern!r}, which fits none of '
      f'{", ".join([*shorthands, *sorted(names)])}.'
    )
  return chosen


def merge(trained: Flat, frozen: Flat, *, lora_scale: float) -> model.Params:
  """The model's parameters again; LoRA's alpha / rank goes into B."""
  chex.assert_scalar_positive(lora_scale)
  flat = frozen | trained
  for name in trained:
    if name.endswith('_lora_b'):
      flat[name] = trained[name] * lora_scale
  return traverse_util.unflatten_dict(flat, sep='/')


def fold(params: model.Params) -> model.Params:
  """Adds the low-rank products to their matrices: same function, no factors.

  Args:
    params: as `merge` returns them.
  """
  layers = {k: v for k, v in params['layers'].items() if '_lora_' not in k}
  for name in LORA_TARGETS:
    if f'{name}_lora_a' in params['layers']:
      w = layers[name]
      a = params['layers'][f'{name}_lora_a']
      b = params['layers'][f'{name}_lora_b']
      product = jnp.einsum('nir,nro->nio', a, b)
      layers[name] = (w.astype(jnp.float32) + product).astype(w.dtype)
  return params | {'layers': layers}
