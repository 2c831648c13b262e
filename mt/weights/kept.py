"""Parameters as they are kept: their format, and where on a mesh.

Each tensor of a file is written into its place, on the device that shall have
it, before the next one is read. So the memory of a process is its own share
and one tensor in float32, whatever the number of devices and processes.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from concurrent import futures
import dataclasses
import functools
from typing import Any
import zlib

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mt.gemma import parameters
from mt.gemma import quantize
from mt.gemma import sharding
from mt.gemma import sizes

# A tensor, or its parts along the first axis in order; any float type.
Tensor = np.ndarray | Iterable[np.ndarray]

_AT_ONCE = 2**21  # Weights that are copied in one go.


@dataclasses.dataclass(frozen=True)
class Keep:
  """How parameters are kept.

  Attributes:
    dtypes: by path: float32 where one is missing, bfloat16, int8 or int4.
    mesh: over which each is split; on the default device where None.
    donated: they will be, so none may be a file that is mapped into memory: a
      step would copy it while it holds the most itself.
  """

  dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  mesh: Mesh | None = None
  donated: bool = False


FLOAT32 = Keep()


@dataclasses.dataclass
class _Shard:
  """What a device has of an array: the block that begins at `at`."""

  at: tuple[int, ...]
  array: jax.Array


def one(
  cfg: sizes.ModelConfig,
  path: str,
  tensors: Iterable[tuple[int | None, Tensor]],
  keep: Keep,
  crc: int,
) -> tuple[Any, int]:
  """A parameter out of its tensors.

  Args:
    cfg: the model's shape.
    path: of the parameter.
    tensors: number of the layer in its stack, in order, and its tensor; one,
      with None, of what is not stacked.
    keep: its format and place.
    crc: of what was read before.

  Returns:
    An array or a quantize.Quantized, and the CRC-32 that goes on with all of
    its numbers as float32.
  """
  dtype = keep.dtypes.get(path, 'float32')
  shape, bits = parameters.shapes(cfg)[path], quantize.BITS.get(dtype)
  kept = jax.ShapeDtypeStruct(shape, jnp.float32 if bits else dtype)
  if bits:
    make = functools.partial(quantize.quantize, bits=bits)
    kept = jax.eval_shape(make, kept)
  leaves, structure = jax.tree.flatten(kept)
  places = [None] * len(leaves)
  if keep.mesh is not None:
    places = jax.tree.leaves(sharding.of_tree(cfg, keep.mesh, {path: kept}))
  shards = [_empty(x, s) for x, s in zip(leaves, places, strict=True)]
  with futures.ThreadPoolExecutor(1) as pool:
    for layer, tensor in tensors:
      whole, done = [], 0
      for part in _parts(tensor):
        total = pool.submit(zlib.crc32, part, crc)  # While it is written.
        if bits:
          whole.append(part)
        else:
          _write(shards[0], part, done, layer)
        done += len(part)
        crc = total.result()
      chex.assert_equal(done, shape[0 if layer is None else 1])
      del tensor, part, total  # Before the next one is read.
      if bits:
        made = make(np.concatenate(whole)[None])
        for own, x in zip(shards, jax.tree.leaves(made), strict=True):
          _write(own, np.asarray(x[0]), 0, layer)
  arrays = [
    own[0].array
    if place is None
    else jax.make_array_from_single_device_arrays(
      x.shape, place, [s.array for s in own]
    )
    for x, place, own in zip(leaves, places, shards, strict=True)
  ]
  return jax.tree.unflatten(structure, arrays), crc


def _empty(x, place) -> list[_Shard]:
  """Zeros on each device of this process that has a part of an array."""
  if place is None:
    return [_Shard((0,) * len(x.shape), jnp.zeros(x.shape, x.dtype))]
  size = place.shard_shape(x.shape)
  indices = place.addressable_devices_indices_map(x.shape)
  return [
    _Shard(
      tuple(s.start or 0 for s in index),
      jnp.zeros(size, x.dtype, device=device),
    )
    for device, index in indices.items()
  ]


def _parts(tensor: Tensor):
  """Copies of its rows as float32, a few million numbers at a time."""
  for x in [tensor] if isinstance(tensor, np.ndarray) else tensor:
    rows = max(1, _AT_ONCE * len(x) // x.size)
    for at in range(0, len(x), rows):
      yield np.array(x[at : at + rows], np.float32, order='C')


def _write(shards, x, row, layer):
  """Writes rows from `row` on, of all or of one layer, where they belong."""
  start = np.zeros(x.ndim, np.int32)
  start[0] = row
  if layer is not None:
    x, start = x[None], np.array([layer, *start], np.int32)
  for shard in shards:
    low = np.maximum(start, shard.at)
    high = np.minimum(start + x.shape, np.add(shard.at, shard.array.shape))
    if (low < high).all():
      cut = zip(low - start, high - start, strict=True)
      part = x[tuple(slice(a, b) for a, b in cut)]
      at = [np.int32(i) for i in low - shard.at]
      shard.array = _update(shard.array, part, at)
      shard.array.block_until_ready()


@functools.partial(jax.jit, donate_argnums=0)
def _update(out, part, start):
  """`out` with `part` from `start` on, in the same memory."""
  return lax.dynamic_update_slice(out, part.astype(out.dtype), start)


def every(
  cfg: sizes.ModelConfig, params: parameters.Params, keep: Keep
) -> tuple[parameters.Params, int]:
  """`one` of each of the parameters, which are float32 and whole."""
  flat, crc = parameters.flatten(params), 0
  for row in in_order(cfg):
    x = np.asarray(flat[row.path])
    tensors = enumerate(x) if row.stacked else [(None, x)]
    flat[row.path], crc = one(cfg, row.path, tensors, keep, crc)
  return parameters.unflatten(flat), crc


def in_order(cfg: sizes.ModelConfig) -> list[parameters.Parameter]:
  """The rows of the table in the order of the tree's leaves, as the CRC is."""
  return sorted(parameters.table(cfg), key=lambda row: row.path.split('/'))
