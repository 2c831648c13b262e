"""Tensors of one layer each, as files have them -> the stacked pytree."""

from collections.abc import Callable

import chex
import jax
import numpy as np

from mt import model
from mt import sizes

Shape = tuple[int, ...]


def stack(
  cfg: sizes.ModelConfig,
  leaf: Callable[[str, int | None, Shape], np.ndarray],
) -> model.Params:
  """The float32 parameters, read tensor by tensor.

  Args:
    cfg: the model's shape.
    leaf: (our name, layer or None, shape) -> that tensor, turned as ours is.
  """
  shapes = model.param_shapes(cfg)

  def one(name, layer, shape):
    x = leaf(name, layer, shape)
    chex.assert_shape(x, shape)
    return x

  layers = {}
  for name, shape in shapes['layers'].items():
    stacked = np.empty(shape, np.float32)
    for i in range(cfg.num_layers):
      stacked[i] = one(name, i, shape[1:])
    layers[name] = _to_device(stacked)
    del stacked
  outer = {
    name: _to_device(np.asarray(one(name, None, shapes[name]), np.float32))
    for name in ('embedding', 'final_norm')
  }
  return {'layers': layers} | outer


def _to_device(x: np.ndarray) -> jax.Array:
  """A copy that is finished when this returns, so that `x` can go.

  jnp.asarray needs three times the memory for a moment, and lets go of its
  argument only later. A buffer shared with numpy could not be donated.
  """
  return jax.block_until_ready(jax.device_put(x, may_alias=False))
