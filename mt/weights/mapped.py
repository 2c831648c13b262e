"""The weights of a quantised file in float32, kept in the cache.

To dequantise them takes most of a start: 3 s of 8 for the 270M. At the next one
this file is mapped into memory instead, and a CPU computes from the map itself.

It is a key of 32 bytes, see `_key`; the CRC-32 of all numbers, uint32; then the
arrays of the table in the order of the tree's leaves, float32. Each begins at a
multiple of 64 bytes, as JAX would copy it otherwise.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import hashlib
from importlib import metadata
import math
import mmap
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.weights import kept

# Bytes: less is dequantised in no time; more may have to come from a disk that
# is slower than that.
_WORTH = range(2**26, 2**31)
_SPARE = 4  # Times its size must be free on the disk.
_ALIGN = 64


def read(
  source: pathlib.Path,
  cfg: sizes.ModelConfig,
  dequantise: Callable[[kept.Keep], tuple[parameters.Params, int]],
  keep: kept.Keep,
) -> tuple[parameters.Params, int]:
  """What `dequantise(keep)` returns, out of the cache from the second time on.

  Args:
    source: the file that is dequantised; nothing else decides the result.
    cfg: the model's shape.
    dequantise: how they are kept -> the parameters, and the CRC-32 of all of
      them as float32.
    keep: format and place of the parameters.
  """
  places, size = _places(cfg)
  if size not in _WORTH or jax.process_count() > 1:
    return dequantise(keep)
  name = hashlib.sha256(os.path.realpath(source).encode()).hexdigest()[:32]
  path, key = cache.cache_dir() / 'float32' / name, _key(source, cfg)
  data = _map(path, key, size)
  plain = keep.mesh is None and set(keep.dtypes.values()) <= {'float32'}
  if data is None:
    params, crc = sharding.on_host(lambda: dequantise(kept.FLOAT32))
    # A full disk, or one that is read-only, ends no run.
    with contextlib.suppress(errors.UserError):
      _write(path, key, places, params, crc)
  else:
    (crc,) = np.frombuffer(data, np.uint32, 1, len(key)).tolist()
    flat = {
      name: np.ndarray(shape, np.float32, data, at)
      for name, (at, shape) in places.items()
    }
    params = parameters.unflatten(flat)
    if plain and keep.donated:
      params = jax.tree.map(jnp.array, params)  # It copies.
  if plain:
    return jax.device_put(params), crc
  return kept.every(cfg, params, keep)


def _places(cfg):
  """By path: the first byte and the shape of an array; bytes of the file."""
  places, at = {}, _ALIGN
  shapes = parameters.shapes(cfg)
  for row in kept.in_order(cfg):
    places[row.path] = at, shapes[row.path]
    at += -(-4 * math.prod(shapes[row.path]) // _ALIGN) * _ALIGN
  return places, at


def _key(source, cfg):
  """Of all that decides the numbers: file, shape, this code, the library's."""
  s = os.stat(source)
  known = [
    s.st_dev,
    s.st_ino,
    s.st_size,
    s.st_mtime_ns,
    metadata.version('gguf'),
  ]
  digest = hashlib.sha256(repr([known, dataclasses.astuple(cfg)]).encode())
  here = pathlib.Path(__file__).parent
  for path in (*sorted(here.glob('*.py')), pathlib.Path(parameters.__file__)):
    digest.update(path.read_bytes())
  return digest.digest()


def _map(path, key, size):
  """The file, mapped; None where there is none of this key."""
  try:
    with open(path, 'rb') as f:
      data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError):  # An empty file is a ValueError.
    return None
  return data if data[:32] == key and len(data) == size else None


def _write(path, key, places, params, crc):
  flat = parameters.flatten(params)
  with files.new_file(path) as f:
    need = _SPARE * sum(x.nbytes for x in flat.values())
    if shutil.disk_usage(path.parent).free < need:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    f.write(key + np.uint32(crc).tobytes())
    for name, (at, _) in places.items():
      f.seek(at)
      f.write(np.asarray(flat[name]))
    f.truncate(-(-f.tell() // _ALIGN) * _ALIGN)
