"""Safetensors files, written one tensor at a time.

Format: github.com/huggingface/safetensors#format. The library writes too, but
wants all tensors of a file in memory at once, turned and converted.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import struct

import chex
import ml_dtypes
import numpy as np

_DTYPES = {
  np.dtype(np.float32): 'F32',
  np.dtype(ml_dtypes.bfloat16): 'BF16',
}
_SHARD_BYTES = 5 * 10**9  # A file's size at most, as on the Hub.


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor to be written.

  Attributes:
    name: in the file.
    shape: of what `get` returns.
    get: () -> the tensor, made when its turn comes.
  """

  name: str
  shape: tuple[int, ...]
  get: Callable[[], np.ndarray]


def write(
  folder: pathlib.Path,
  entries: Sequence[Entry],
  dtype: np.dtype,
  *,
  shard_bytes: int = _SHARD_BYTES,
  stem: str = 'model',
) -> None:
  """Writes STEM.safetensors, or several files and their index.

  Args:
    folder: an existing one.
    entries: in the order in which they are written.
    dtype: of all of them, float32 or bfloat16.
    shard_bytes: of one file at most, unless one tensor is larger.
    stem: of the files' names.

  Raises:
    OSError: the disk is full or not writable.
  """
  dtype = np.dtype(dtype)
  shards, room = [[]], shard_bytes
  for e in entries:
    nbytes = _nbytes(e, dtype)
    if shards[-1] and nbytes > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(e)
    room -= nbytes
  if len(shards) == 1:
    write_file(folder / f'{stem}.safetensors', entries, dtype)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f'{stem}-{i:05}-of-{len(shards):05}.safetensors'
    write_file(folder / file, shard, dtype)
    weight_map |= {e.name: file for e in shard}
  total = sum(_nbytes(e, dtype) for e in entries)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (folder / f'{stem}.safetensors.index.json').write_text(
    json.dumps(index, indent=2) + '\n'
  )


def _nbytes(entry, dtype):
  return math.prod(entry.shape) * dtype.itemsize


def write_file(
  path: pathlib.Path, entries: Sequence[Entry], dtype: np.dtype
) -> None:
  """Writes one file; see `write`."""
  # transformers looks for "format" before it opens the file.
  header, at = {'__metadata__': {'format': 'pt'}}, 0
  for e in entries:
    end = at + _nbytes(e, dtype)
    header[e.name] = {
      'dtype': _DTYPES[dtype],
      'shape': list(e.shape),
      'data_offsets': [at, end],
    }
    at = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # So that the tensors are aligned.
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for e in entries:
      x = e.get()
      chex.assert_shape(x, e.shape)
      assert x.dtype == dtype, (e.name, x.dtype)
      f.write(np.ascontiguousarray(x).view(np.uint8).data)
      del x  # Before the next one is made.
