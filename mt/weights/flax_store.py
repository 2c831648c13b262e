"""The arrays of an Orbax checkpoint folder, through tensorstore.

Orbax leaves one zarr array (version 2 or 3) for each leaf of a tree, in an
OCDBT database (manifest.ocdbt) or, in the past, in plain folders. An array's
name is the path of its keys, joined by dots. Names and shapes are taken from
the arrays themselves: of Orbax's own JSON one flag is read, so that any of its
versions will do, and nothing in a checkpoint can name a path or a program.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib

import chex
import numpy as np
import tensorstore as ts

from mt.base import errors

_OCDBT = 'manifest.ocdbt'
_METADATA = '_METADATA'
_MARKS = (_OCDBT, _METADATA, 'checkpoint')  # Any of them makes a checkpoint.
_DRIVERS = {'.zarray': 'zarr', 'zarr.json': 'zarr3'}
_DTYPES = [
  ts.dtype(name).numpy_dtype for name in ('float32', 'float16', 'bfloat16')
]
_CHUNK = 1 << 26  # Bytes of an array that are written at once.
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


def is_checkpoint(folder: str | pathlib.Path) -> bool:
  """Whether Orbax might have written this folder."""
  return any(os.path.isfile(os.path.join(folder, m)) for m in _MARKS)


def open_store(folder: str | pathlib.Path) -> Store:
  """Lists the arrays of a checkpoint.

  Raises:
    errors.UserError: unreadable, damaged, or nothing that holds an array.
  """
  path = pathlib.Path(folder).absolute()
  kvstore = {'driver': 'file', 'path': f'{path}/'}
  if (path / _OCDBT).exists():
    kvstore = {'driver': 'ocdbt', 'base': kvstore}
  store = Store(path, {}, None, not _zeros_are_stored(path))
  try:
    opened = ts.KvStore.open(kvstore).result()
    if kvstore['driver'] == 'ocdbt':
      keys = [k.decode() for k in opened.list().result()]
    else:  # Links to files are followed, to folders are not.
      keys = [
        os.path.relpath(os.path.join(place, file), path)
        for place, _, files in os.walk(path)
        for file in files
      ]
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
  try:
    metadata = json.loads((path / _METADATA).read_bytes())
    return bool(metadata['store_array_data_equal_to_fill_value'])
  except (OSError, ValueError, KeyError):
    return False


def open_array(store: Store, name: str) -> ts.TensorStore:
  """One array's shape and dtype; [...].read() gives the rest.

  Raises:
    errors.UserError: no such array, a damaged header, no floating-point type.
  """
  if name not in store.names:
    raise store.damaged(f'no array {name!r}')
  key, driver = store.names[name]
  spec = {
    'driver': driver,
    'kvstore': (store.kvstore / f'{key}/').spec().to_json(),
    'fill_missing_data_reads': False,
  }
  try:
    array = ts.open(spec, open=True, read=True).result()
    if store.zeros_left_out and array.rank == 1:  # A norm may be all zero.
      spec['fill_missing_data_reads'] = True
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


def write_array(
  folder: pathlib.Path, keys: Sequence[str], x: chex.Array, dtype: np.dtype
) -> None:
  """Adds one array to the OCDBT database in `folder`, 64 MB at a time.

  Args:
    folder: where the checkpoint grows; see write_metadata.
    keys: the array's path in the tree.
    x: numpy or JAX, one axis at least.
    dtype: as which it is stored.

  Raises:
    errors.UserError: the disk is full or not writable.
  """
  chex.assert_axis_dimension_gt(x, 0, 0)
  dtype = ts.dtype(dtype)
  row = int(np.prod(x.shape[1:])) * dtype.numpy_dtype.itemsize
  rows = min(x.shape[0], max(1, _CHUNK // row))
  spec = {
    'driver': 'zarr',
    'kvstore': {
      'driver': 'ocdbt',
      'base': {'driver': 'file', 'path': f'{folder.absolute()}/'},
      'path': '.'.join(keys) + '/',
    },
    'schema': {'chunk_layout': {'chunk': {'shape': [rows, *x.shape[1:]]}}},
    'metadata': {'compressor': {'id': 'zstd', 'level': 1}},
    'store_data_equal_to_fill_value': True,
  }
  try:
    array = ts.open(spec, create=True, shape=x.shape, dtype=dtype).result()
    for at in range(0, x.shape[0], rows):
      part = np.asarray(x[at : at + rows]).astype(dtype.numpy_dtype)
      array[at : at + len(part)].write(part).result()
  except _DAMAGE as e:
    raise errors.UserError(
      f'{folder}: cannot write the checkpoint ({" ".join(str(e).split())}); '
      'give a folder with space that you may write to.'
    ) from e


def write_metadata(
  folder: pathlib.Path, names: Iterable[Sequence[str]]
) -> None:
  """The JSON in which Orbax looks up which arrays make up the tree.

  Source: orbax-checkpoint's metadata/tree.py; key type 2 is a dict's key.
  """
  tree = {
    str(tuple(keys)): {
      'key_metadata': [{'key': k, 'key_type': 2} for k in keys],
      'value_metadata': {'value_type': 'np.ndarray', 'skip_deserialize': False},
    }
    for keys in names
  }
  text = json.dumps(
    {
      'tree_metadata': tree,
      'use_ocdbt': True,
      'use_zarr3': False,
      'store_array_data_equal_to_fill_value': True,
      'custom_metadata': None,
    }
  )
  (folder / _METADATA).write_text(text, encoding='utf-8')
