"""Tensors of one layer each, as files have them -> the stacked pytree."""

from collections.abc import Callable
from collections.abc import Iterable
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mt.gemma import model
from mt.gemma import sizes

Shape = tuple[int, ...]

_AT_ONCE = 2**22  # Weights that are copied in one go.


def stack(
  cfg: sizes.ModelConfig,
  leaf: Callable[[str, int | None, Shape], np.ndarray | Iterable[np.ndarray]],
) -> model.Params:
  """The float32 parameters, read tensor by tensor.

  Each is written into its place, on the device, before the next is read:
  besides the result only one tensor exists, in the file's own type, or a part.

  Args:
    cfg: the model's shape.
    leaf: (our name, layer or None, shape) -> that tensor, of any float type,
      turned as ours is; or its parts along the first axis, in order.
  """
  shapes = model.param_shapes(cfg)

  def place(out, name, layer=None):
    """Reads one tensor into `out`, or into out[layer]."""
    shape = out.shape if layer is None else out.shape[1:]
    lead = () if layer is None else (layer,)
    parts, done = leaf(name, layer, shape), 0
    for x in [parts] if isinstance(parts, np.ndarray) else parts:
      chex.assert_shape(x, (None, *shape[1:]))
      rows = max(1, _AT_ONCE * len(x) // x.size)
      for at in range(0, len(x), rows):
        # A copy, as JAX holds on to what it is given for a while.
        part = np.array(x[at : at + rows])
        part = part.reshape((1,) * len(lead) + part.shape)
        start = [*lead, done + at] + [0] * (x.ndim - 1)
        out = _update(out, part, [np.int32(i) for i in start])
        out.block_until_ready()
      done += len(x)
    chex.assert_equal(done, shape[0])
    return out

  layers = {}
  for name, shape in shapes['layers'].items():
    out = jnp.zeros(shape, jnp.float32)
    for i in range(cfg.num_layers):
      out = place(out, name, i)
    layers[name] = out
  rest = {
    name: place(jnp.zeros(shapes[name], jnp.float32), name)
    for name in ('embedding', 'final_norm')
  }
  return rest | {'layers': layers}


@functools.partial(jax.jit, donate_argnums=0)
def _update(out, part, start):
  """`out` with `part` from `start` on, in the same memory."""
  return lax.dynamic_update_slice(out, part.astype(out.dtype), start)
