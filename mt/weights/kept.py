"""Parameters as they are kept: their format, and where on a mesh.

Each tensor of a file is written into its place, on the device that shall have
it, before the next one is read. So the memory of a process is its own share
and one tensor in float32, whatever the number of devices and processes.

Of several processes each reads other tensors: as many as there are processes
are read side by side; then all go through theirs in step, a few million numbers
at a time, give these to all the others, and write what they got.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import math
import zlib

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mt.base import processes
from mt.gemma import parameters
from mt.gemma import quantize
from mt.gemma import sharding
from mt.gemma import sizes

_AT_ONCE = 2**21  # Weights that are copied in one go, of all processes.


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


@dataclasses.dataclass(frozen=True)
class Block:
  """What is read in one go: a parameter's tensor of one layer, or rows of it.

  Attributes:
    layer: number in its stack; None of what is not stacked.
    row: the first one.
    rows: how many; as many as all of the parameter, but for its last block.
    read: -> them, of any float type. Only one process calls it.
  """

  layer: int | None
  row: int
  rows: int
  read: Callable[[], np.ndarray]


@dataclasses.dataclass
class _Shard:
  """What a device has of an array: the block that begins at `at`."""

  at: tuple[int, ...]
  array: jax.Array


def read(
  cfg: sizes.ModelConfig,
  blocks: Callable[[parameters.Parameter], Sequence[Block]],
  keep: Keep,
) -> tuple[parameters.Params, int]:
  """All parameters.

  Args:
    cfg: the model's shape.
    blocks: row of the table -> what is to be read for it, in order.
    keep: their format and place.

  Returns:
    Each is an array or a quantize.Quantized; and the CRC-32 of all numbers as
    float32, which is the same whatever the number of processes.
  """
  flat, crc, loads = {}, 0, [0] * jax.process_count()
  for row in in_order(cfg):
    flat[row.path], crc = _one(cfg, row.path, blocks(row), keep, loads, crc)
  return parameters.unflatten(flat), crc


def _one(cfg, path, blocks, keep, loads, crc):
  """A parameter, and the CRC-32 that goes on with all of its numbers.

  `loads` has the bytes that each process has read, and is brought up to date.
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
  width = shape[1 if blocks[0].layer is None else 2 :]
  with futures.ThreadPoolExecutor(1) as pool:
    for at in range(0, len(blocks), len(loads)):
      # By process, whoever has read least first; the last ones may have none.
      order = sorted(range(len(loads)), key=loads.__getitem__)
      group = dict(zip(order, blocks[at : at + len(loads)], strict=False))
      own, whole, done, of_own = group.get(jax.process_index()), [], 0, 0
      for part, rows in _parts(own, blocks[at].rows, width):
        # While it is written.
        total = pool.submit(zlib.crc32, part[:rows], of_own)
        if bits:
          whole.append(part)
        else:
          _write_all(shards[0], part, done, group)
        done += len(part)
        of_own = total.result()
      del part, total  # Before the next one is read.
      found = processes.gather(np.array(of_own, np.uint32)).tolist()
      for process, block in group.items():
        size = 4 * block.rows * math.prod(width)
        crc = _crc_of_both(crc, found[process], size)
        loads[process] += size
      if bits:
        made = make(np.concatenate(whole)[None])
        for parts, x in zip(shards, jax.tree.leaves(made), strict=True):
          _write_all(parts, np.asarray(x[0]), 0, group)
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


def _at_once():
  return _AT_ONCE // jax.process_count()


def _parts(block, rows, width):
  """What a process reads as float32, a few million numbers at a time.

  Yields parts of as many `rows` as the longest block of any process has, and
  how many of a part are this block's; zeros follow. `block` may be None.
  """
  with processes.told_to_all():
    tensor = block.read() if block else np.zeros((0, *width))
  chex.assert_shape(tensor, (block.rows if block else 0, *width))
  step = max(1, _at_once() // math.prod(width))
  for at in range(0, rows, step):
    own = tensor[at : at + step]
    part = np.zeros((min(step, rows - at), *width), np.float32)
    part[: len(own)] = own
    yield part, len(own)


def _write_all(shards, x, row, group):
  """Writes rows from `row` on of this process's block, and of the others'."""
  step = max(1, _at_once() * len(x) // x.size)
  for at in range(0, len(x), step):
    parts = processes.gather(x[at : at + step])
    for i, block in group.items():
      # Zeros after a shorter last block lie past the end: not written.
      _write(shards, parts[i], block.row + row + at, block.layer)


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
  """`read` of parameters that are float32 and whole."""
  flat = parameters.flatten(params)
  return read(cfg, lambda row: in_memory(row, np.asarray(flat[row.path])), keep)


def in_memory(row: parameters.Parameter, x: np.ndarray) -> list[Block]:
  """Of a parameter that is in memory."""
  tensors = enumerate(x) if row.stacked else [(None, x)]
  return [Block(i, 0, len(y), lambda y=y: y) for i, y in tensors]


def in_order(cfg: sizes.ModelConfig) -> list[parameters.Parameter]:
  """The rows of the table in the order of the tree's leaves, as the CRC is."""
  return sorted(parameters.table(cfg), key=lambda row: row.path.split('/'))


def _crc_of_both(first: int, second: int, size: int) -> int:
  """The CRC-32 of bytes with `first` and then `size` bytes with `second`.

  A CRC is what a polynomial over GF(2) leaves when another one divides it, and
  bytes that follow multiply what was there by a power of x.
  """
  return _times(first, _shift(size)) ^ second


@functools.cache
def _shift(size):
  """x to the power of 8 * size; the highest bit is the coefficient of 1."""
  power, square = 1 << 31, 1 << 23
  while size:
    if size & 1:
      power = _times(power, square)
    square, size = _times(square, square), size >> 1
  return power


def _times(a, b):
  product = 0
  for bit in reversed(range(32)):
    product ^= b * (a >> bit & 1)
    b = b >> 1 ^ 0xEDB88320 * (b & 1)
  return product
