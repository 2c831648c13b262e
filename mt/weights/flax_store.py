"""The arrays of an Orbax checkpoint folder, through tensorstore.

Orbax leaves one zarr array (version 2 or 3) for each leaf of a tree, in an
OCDBT database (manifest.ocdbt) or, in the past, in plain folders. An array's
name is the path of its keys, joined by dots. Names and shapes are taken from
the arrays themselves: of Orbax's own JSON one flag is read, so that any of its
versions will do, and nothing in a checkpoint can name a path or a program.
"""

import dataclasses
import pathlib
import re

import numpy as np
import tensorstore as ts

from mt.base import errors

_OCDBT = 'manifest.ocdbt'
_METADATA = '_METADATA'
_MARKS = (_OCDBT, _METADATA, 'checkpoint')  # Any of them makes a checkpoint.
_ZEROS = re.compile(rb'"store_array_data_equal_to_fill_value":\s*true')
_DRIVERS = {'.zarray': 'zarr', 'zarr.json': 'zarr3'}
_DTYPES = [
  ts.dtype(name).numpy_dtype for name in ('float32', 'float16', 'bfloat16')
]
# What tensorstore and the file system raise out of damaged files.
_DAMAGE = (ValueError, NotImplementedError, OSError)


@dataclasses.dataclass(frozen=True)
class Store:
  """An opened checkpoint folder; nothing of an array is read yet.

  Attributes:
    path: the folder.
    names: name of each array -> its key in `kvstore` and its zarr driver.
    kvstore: tensorstore's view of the folder.
    zeros_left_out: older versions of Orbax wrote nothing for a chunk of zeros.
  """

  path: pathlib.Path
  names: dict[str, tuple[str, str]]
  kvstore: ts.KvStore
  zeros_left_out: bool

  def damaged(self, what: str, why: object = '') -> errors.UserError:
    why = f' ({" ".join(str(why).split())[:200]})' if str(why) else ''
    return errors.UserError(
      f'{self.path}: {what}{why}; the checkpoint is damaged or incomplete: '
      'fetch it again.'
    )


def is_checkpoint(folder: pathlib.Path) -> bool:
  """Whether Orbax might have written this folder."""
  return any((folder / mark).is_file() for mark in _MARKS)


def open_store(folder: pathlib.Path) -> Store:
  """Lists the arrays of a checkpoint.

  Raises:
    errors.UserError: unreadable, damaged, or nothing that holds an array.
  """
  path = folder.absolute()
  kvstore = {'driver': 'file', 'path': f'{path}/'}
  if (path / _OCDBT).exists():
    kvstore = {'driver': 'ocdbt', 'base': kvstore}
  store = Store(path, {}, None, not _zeros_are_stored(path))
  try:
    opened = ts.KvStore.open(kvstore).result()
    if kvstore['driver'] == 'ocdbt':
      keys = [k.decode() for k in opened.list().result()]
    else:  # Links to files are followed, to folders are not.
      keys = [p.relative_to(path).as_posix() for p in path.rglob('*')]
  except _DAMAGE as e:
    raise store.damaged('cannot read it', e) from e
  names = {}
  for key in keys:
    head, _, tail = key.rpartition('/')
    if head and tail in _DRIVERS:
      names[head.replace('/', '.')] = (head, _DRIVERS[tail])
  if not names:
    raise store.damaged('no array in it')
  return dataclasses.replace(store, names=names, kvstore=opened)


def _zeros_are_stored(path) -> bool:
  file = path / _METADATA
  return file.is_file() and bool(_ZEROS.search(file.read_bytes()))


def open_array(store: Store, name: str) -> ts.TensorStore:
  """One array's shape and dtype; [...].read() gives the rest.

  Raises:
    errors.UserError: no such array, a damaged header, no floating-point type.
  """
  if name not in store.names:
    raise store.damaged(f'no array {name}')
  key, driver = store.names[name]
  spec = {
    'driver': driver,
    'kvstore': (store.kvstore / f'{key}/').spec().to_json(),
    # A norm may be all zero.
    'fill_missing_data_reads': store.zeros_left_out and key.endswith('scale'),
  }
  try:
    array = ts.open(spec, open=True, read=True).result()
    dtype, shape = array.dtype.numpy_dtype, array.shape
    chunk = array.chunk_layout.read_chunk.shape
  except _DAMAGE as e:
    raise store.damaged(f'array {name!r} cannot be opened', e) from e
  if dtype not in _DTYPES:
    raise errors.UserError(
      f'{store.path}: array {name!r} is of type {dtype}, float32, bfloat16 or '
      'float16 expected; quantised checkpoints cannot be trained.'
    )
  # A chunk is made in memory whole, however little of it is the array.
  if any(c > max(1, s) for c, s in zip(chunk, shape, strict=True)):
    raise store.damaged(f'array {name!r} {shape} has chunks of {chunk}')
  return array


def read_array(store: Store, name: str, array: ts.TensorStore) -> np.ndarray:
  """The values of (a part of) an opened array, in its own dtype.

  Raises:
    errors.UserError: damaged or missing data.
  """
  try:
    return array.read().result()
  except _DAMAGE as e:
    raise store.damaged(f'array {name!r} cannot be read', e) from e
