"""Through all layers in their order, where not all have one shape.

Gemma 1 to 3 are one stack of layers of one shape, and this is one `lax.scan`
over it. In Gemma 4 stacks of local and of global layers take turns (a scan over
the periods of the pattern), and late layers see the keys and values of earlier
ones. What stacks and groups are, see sizes.ModelConfig.groups.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mt.gemma import attention
from mt.gemma.parameters import Params
from mt.gemma.sizes import ModelConfig

# Kind of layer, 'L' or 'G' -> keys and values [B, K, L, A] of the last one that
# has its own. {} in most models, which share none.
Shared = dict[str, tuple[jax.Array, jax.Array]]


def scan(
  cfg: ModelConfig,
  params: Params,
  x: jax.Array,
  inputs: jax.Array | None,
  make_layer: Callable[[ModelConfig, Shared], Callable],
) -> jax.Array:
  """What comes out of the last layer: [B, L, D], as `x`.

  Args:
    params: of the model.
    x: [B, L, D], what goes into the first layer.
    inputs: [N, B, L, E], each layer's own, or None.
    make_layer: (shape of a stack's layers, Shared of the group before) -> a
      step for lax.scan. The step takes (x, Shared) and, of one layer, its
      parameters, its kind (0 local, 1 global) and its own input; it returns
      (x, Shared) after that layer.
  """
  shared = {}
  for group in cfg.groups():
    kept = {}
    if cfg.sharing_layers and not shared:
      kept = {stack.cfg.attention: _no_kv(stack.cfg, x) for stack in group}
    layers = [make_layer(stack.cfg, shared) for stack in group]
    x, shared = _scan_group(group, layers, params, (x, kept), inputs)
  return x


def _no_kv(cfg, x):
  dims = cfg.dims()
  dims['BL'] = x.shape[:2]
  zeros = jnp.zeros(dims['BKLA'], x.dtype)
  return zeros, zeros


def _scan_group(group, layers, params, carry, inputs):
  """Through the layers of a group, whose stacks take turns."""

  def of_layers(stack):
    own = None if inputs is None else inputs[np.array(stack.layers)]
    xs = params[stack.name], attention.layer_kinds(stack.cfg), own
    if stack.turn == 1:
      return xs
    return jax.tree.map(lambda x: x.reshape(-1, stack.turn, *x.shape[1:]), xs)

  def period(carry, scanned):
    for stack, layer, xs in zip(group, layers, scanned, strict=True):
      if stack.turn > 1:
        carry, _ = lax.scan(layer, carry, xs)
      else:
        carry, _ = layer(carry, xs)
    return carry, None

  return lax.scan(period, carry, [of_layers(stack) for stack in group])[0]
