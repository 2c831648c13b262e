"""Tensors of one layer each, as files have them -> the stacked pytree."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import numpy as np

from mt import model
from mt import sizes

Shape = tuple[int, ...]


def stack(
  cfg: sizes.ModelConfig,
  leaf: Callable[[str, int | None, Shape], np.ndarray],
) -> model.Params:
  """The float32 parameters, read tensor by tensor.

  At most one leaf and one tensor of a file exist besides the result: a file's
  own type becomes float32 on its way into the leaf.

  Args:
    cfg: the model's shape.
    leaf: (our name, layer or None, shape) -> that tensor, of any float type,
      turned as ours is.
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
    layers[name] = jnp.asarray(stacked)

  def outer(name):
    return jnp.asarray(np.asarray(one(name, None, shapes[name]), np.float32))

  return {
    'embedding': outer('embedding'),
    'layers': layers,
    'final_norm': outer('final_norm'),
  }
