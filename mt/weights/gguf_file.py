"""GGUF files: header, tokenizer vocabulary, tensors.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 and 3,
little-endian. The header is read here, with every length checked against the
file, because the `gguf` library's reader takes 11 s over a vocabulary of
262,144 pieces (0.3 s here); the tensors are dequantised by that library.
"""

from concurrent import futures
import dataclasses
import math
import mmap
import os
import pathlib
from typing import Any

import gguf
import numpy as np

from mt.base import errors
from mt.base import foreign

_SCALARS = gguf.GGUFReader.gguf_scalar_to_np  # Type of a value -> of numpy.
_UINT32, _UINT64 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.UINT64
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
FLOATS = [gguf.GGMLQuantizationType[x] for x in ('F32', 'F16', 'BF16')]
_AT_ONCE = 2**18  # Weights that are dequantised in one go.
_THREADS = min(8, os.cpu_count() or 1)  # That do so side by side.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies.

  Attributes:
    shape: as in numpy, slowest axis first (the file has it reversed).
    kind: its quantisation.
    offset: of its first byte in the file.
    nbytes: its size in the file.
  """

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  offset: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """An opened GGUF file.

  Attributes:
    path: of the file.
    fields: its metadata: scalars, str, numpy arrays or lists of bytes.
    tensors: by name.
  """

  path: pathlib.Path
  fields: dict[str, Any]
  tensors: dict[str, Tensor]


class _Header:
  """A cursor that refuses to leave the file."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self.path, self.data, self.pos = path, data, 4

  def fail(self, what: str) -> errors.UserError:
    return errors.UserError(
      f'{self.path}: {what}; the file is damaged or cut short '
      f'({len(self.data):,} bytes): fetch it again.'
    )

  def take(self, size: int) -> bytes:
    if self.pos + size > len(self.data):
      raise self.fail(
        f'the GGUF header asks for {size:,} bytes at {self.pos:,}'
      )
    self.pos += size
    return self.data[self.pos - size : self.pos]

  def array(self, kind: int, n: int) -> np.ndarray:
    if kind not in _SCALARS:
      raise self.fail(f'unknown GGUF value type {kind}')
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(n * dtype.itemsize), dtype)

  def scalar(self, kind: int) -> Any:
    return self.array(kind, 1)[0].item()

  def text(self) -> str:
    size = int.from_bytes(self.take(8), 'little')
    return self.take(size).decode(errors='replace')

  def strings(self, n: int) -> list[bytes]:
    """A vocabulary has 262,144: a loop without calls takes half the time."""
    out, data, end, stop = [], self.data, self.pos, len(self.data)
    for _ in range(n):
      begin = end + 8
      end = begin + int.from_bytes(data[end:begin], 'little')
      if end > stop:
        raise self.fail(f'the GGUF header asks for {end:,} bytes')
      out.append(data[begin:end])
    self.pos = end
    return out

  def value(self) -> Any:
    kind = self.scalar(_UINT32)
    if kind == _STRING:
      return self.text()
    if kind != _ARRAY:
      return self.scalar(kind)
    kind, n = self.scalar(_UINT32), self.scalar(_UINT64)
    if kind == _STRING:
      return self.strings(n)
    return self.array(kind, n)


def open_gguf(path: str | pathlib.Path) -> GGUFFile:
  """Reads the header of a GGUF file and checks it against the file's size.

  Raises:
    errors.UserError: not GGUF, truncated or inconsistent.
  """
  path = pathlib.Path(path)
  with open(path, 'rb') as f:
    magic = f.read(4)
    if magic != b'GGUF':
      foreign.refuse(path)
      raise errors.UserError(
        f'{path}: starts with {magic!r}, a GGUF file with b"GGUF"; check '
        'weights.source.'
      )
    data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  h = _Header(path, data)
  version = h.scalar(_UINT32)
  if version not in (2, 3):
    raise errors.UserError(
      f'{path}: GGUF version {version} found, 2 or 3 expected; convert it '
      'with a current llama.cpp.'
    )
  num_tensors, num_fields = h.scalar(_UINT64), h.scalar(_UINT64)
  fields = {}
  for _ in range(num_fields):
    key = h.text()
    if key in fields:
      raise h.fail(f'{key} is there twice')
    fields[key] = h.value()
  infos = []
  for _ in range(num_tensors):
    name, rank = h.text(), h.scalar(_UINT32)
    shape = tuple(h.array(_UINT64, rank).tolist())[::-1]
    infos.append((name, shape, h.scalar(_UINT32), h.scalar(_UINT64)))
  align = fields.get('general.alignment', 32)
  if not isinstance(align, int) or not 0 < align <= 2**20:
    raise h.fail(f'general.alignment is {align!r}')
  start = -(-h.pos // align) * align
  tensors = {}
  for name, shape, kind, offset in infos:
    if name in tensors:
      raise h.fail(f'tensor {name!r} is there twice')
    tensors[name] = _tensor(h, name, shape, kind, start + offset)
  if str(fields.get('split.count', 1)) != '1':  # It may be an array.
    raise errors.UserError(
      f'{path}: one of {fields["split.count"]} files that make up the model; '
      'join them with llama.cpp: `llama-gguf-split --merge FIRST OUT.gguf`.'
    )
  return GGUFFile(path, fields, tensors)


def _tensor(h, name, shape, kind, offset) -> Tensor:
  """What the header says of a tensor, once it is known to lie in the file."""
  try:
    kind = gguf.GGMLQuantizationType(kind)
    nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
  except (ValueError, IndexError) as e:  # No such type, half a block, no axis.
    raise h.fail(f'tensor {name!r} of the shape {shape}: {e}') from e
  if offset + nbytes > len(h.data):
    raise h.fail(f'tensor {name!r} ends at byte {offset + nbytes:,}')
  return Tensor(shape, kind, offset, nbytes)


def read_tensor(
  file: GGUFFile, name: str, start: int = 0, stop: int | None = None
) -> np.ndarray:
  """One tensor, dequantised to float32, in numpy axis order.

  Args:
    file: that has it.
    name: of the tensor.
    start, stop: rows of it, where it has more than one axis.

  Raises:
    errors.UserError: of a type the `gguf` library cannot read.
  """
  t = file.tensors[name]
  shape, nbytes, offset = t.shape, t.nbytes, t.offset
  if len(shape) > 1:  # A block of a quantised tensor may be more than a number.
    rows = range(shape[0])[start:stop]
    row = nbytes // max(1, shape[0])
    shape, nbytes = (len(rows), *shape[1:]), len(rows) * row
    offset += rows.start * row
  # Not out of the map: its pages would stay in this process's memory.
  raw = np.fromfile(file.path, np.uint8, nbytes, offset=offset)
  if t.kind == gguf.GGMLQuantizationType.F32:
    return raw.view('<f4').reshape(shape)
  try:
    return _dequantise(raw, t.kind).reshape(shape)
  except NotImplementedError as e:
    raise errors.UserError(
      f'{file.path}: the gguf library cannot dequantise {t.kind.name} '
      f'({name}); use a Q4_K_M, Q8_0, F16 or BF16 file.'
    ) from e


def _dequantise(raw, kind):
  """Bytes of whole blocks -> float32, with several threads."""
  block, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = raw.reshape(-1, size)
  out = np.empty((len(blocks), block), np.float32)
  step = max(1, _AT_ONCE // block)

  def some(at):
    # The library takes sixteen rows at a time, and holds everything twice: what
    # it is given is one row, not too long.
    row = blocks[at : at + step].reshape(1, -1)
    out[at : at + step] = gguf.dequantize(row, kind).reshape(-1, block)

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(some, range(0, len(blocks), step)))
  return out
