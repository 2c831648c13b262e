"""Tensors of one layer each, as files have them -> the stacked pytree."""

from collections.abc import Callable
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mt import model
from mt import sizes

Shape = tuple[int, ...]

_ROWS_AT_ONCE = 8192  # Of the embedding.


def stack(
  cfg: sizes.ModelConfig,
  leaf: Callable[[str, int | None, Shape], np.ndarray],
) -> model.Params:
  """The float32 parameters, read tensor by tensor.

  Each is written into its place at once, on the device: besides the result only
  one tensor of the file exists, in the file's own type.

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

  def outer(name):
    x = one(name, None, shapes[name])
    out = jnp.zeros(x.shape, jnp.float32)
    for at in range(0, len(x), _ROWS_AT_ONCE):
      out = _write(out, x[at : at + _ROWS_AT_ONCE], at)
    return out

  layers = {}
  for name, shape in shapes['layers'].items():
    out = jnp.zeros(shape, jnp.float32)
    for i in range(cfg.num_layers):
      out = _write(out, one(name, i, shape[1:])[None], i)
    layers[name] = out
  return {
    'embedding': outer('embedding'),
    'layers': layers,
    'final_norm': outer('final_norm'),
  }


def _write(out, rows, at):
  # Waiting frees `rows` before the next tensor is read.
  return _update(out, rows, np.int32(at)).block_until_ready()


@functools.partial(jax.jit, donate_argnums=0)
def _update(out, rows, at):
  """`out` with `rows` from row `at` on, in the same memory."""
  return lax.dynamic_update_slice_in_dim(out, rows.astype(out.dtype), at, 0)
