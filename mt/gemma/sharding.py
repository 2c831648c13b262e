"""Where arrays are: a mesh of devices, and one table from axes to its axes.

The mesh has three axes, sized by `config.mesh`:
  data    rows of a batch are split over it, parameters are copied
  fsdp    rows too; parameters and the optimizer are split over it, and each
          layer's are gathered when it is their turn (arXiv 2304.11277)
  tensor  heads, the feed-forward width and the vocabulary are split over it
          (arXiv 1909.08053)
What does not divide stays whole: the result is the same, the share is not.
Without a mesh (None: a single device) nothing here does anything.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any

import chex
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mt.base import errors
from mt.gemma import parameters
from mt.gemma import sizes

MESH_AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. An axis that is missing here is never split.
RULES = {
  'rows': ('data', 'fsdp'),
  'vocab': ('fsdp', 'tensor'),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'ffw': ('tensor',),
}


def make_mesh(
  mesh: Mapping[str, int], devices: list[jax.Device] | None = None
) -> Mesh | None:
  """The mesh of `config.mesh`, or None for a single device.

  Args:
    mesh: size of each of MESH_AXES; one may be -1 and takes what is left.
    devices: jax.devices() where None. One process may leave some unused.

  Raises:
    errors.UserError: the sizes do not fit the devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [mesh[axis] for axis in MESH_AXES]
  given = math.prod(n for n in shape if n != -1)
  found = f'mesh.data, .fsdp, .tensor are {tuple(shape)}'
  if shape.count(-1) > 1:
    raise errors.UserError(f'{found}; at most one of them may be -1.')
  if -1 in shape:
    if len(devices) % given:
      raise errors.UserError(
        f'{found}, but {given} does not divide the {len(devices)} devices '
        'here; choose sizes whose product does.'
      )
    shape[shape.index(-1)] = len(devices) // given
  total = math.prod(shape)
  several = jax.process_count() > 1
  if total > len(devices) or (several and total != len(devices)):
    raise errors.UserError(
      f'{found}, which takes {total} devices, but {len(devices)} are here'
      f'{", and several processes use them all" if several else ""}; choose '
      'sizes whose product is that.'
    )
  if total == 1:
    return None
  return jax.make_mesh(
    tuple(shape),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=devices[:total],
  )


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
  """Of jax.jit, for a program over the mesh.

  XLA would split a TPU's products with gathered weights into one for each
  device and send between them, which takes up to twice as long as to gather
  first, by the estimate (docs/measurements.md).
  """
  if mesh is None or mesh.devices.flat[0].platform != 'tpu':
    return {}
  # From so many MiB on; these are never reached.
  return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 2**20}


def row_shards(mesh: Mesh | None) -> int:
  """Groups of devices that have rows of their own."""
  return 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']


def check_rows(mesh: Mesh | None, batch_size: int, micro_batches: int) -> None:
  """Refuses a batch that does not divide over the mesh.

  Raises:
    errors.UserError: naming the sizes that would do.
  """
  shards = row_shards(mesh)
  unit = shards * micro_batches
  if batch_size % unit:
    raise errors.UserError(
      f'train.batch_size is {batch_size}, but mesh.data * mesh.fsdp = {shards} '
      f'devices take rows in train.micro_batches={micro_batches} parts; a '
      f'multiple of {unit} expected.'
    )


def split_over(mesh: Mesh | None, axis: str, units: int) -> tuple[str, ...]:
  """Mesh axes over which `units` of a logical axis are split; () for none."""
  chosen, parts = [], 1
  for name in RULES.get(axis, ()) if mesh is not None else ():
    size = mesh.shape[name]
    if size > 1 and units % (parts * size) == 0:
      chosen.append(name)
      parts *= size
  return tuple(chosen)


def place(
  mesh: Mesh, axes: tuple[str, ...], units: tuple[int, ...]
) -> NamedSharding:
  """The sharding of an array with these logical axes, one for each dimension.

  `units` is what may be split of each: its size, or the number of heads in it.
  """
  chosen = [
    split_over(mesh, a, n) or None for a, n in zip(axes, units, strict=True)
  ]
  return NamedSharding(mesh, PartitionSpec(*chosen))


def constrain(
  x: jax.Array, mesh: Mesh | None, axes: tuple[str, ...]
) -> jax.Array:
  """Tells the compiler where an activation is; it finds out all between."""
  chex.assert_rank(x, len(axes))
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, place(mesh, axes, x.shape))


def of_rows(mesh: Mesh) -> NamedSharding:
  """The place of each array in a batch: [B, ...]."""
  return NamedSharding(mesh, PartitionSpec(RULES['rows']))


def whole(mesh: Mesh) -> NamedSharding:
  """The place of an array that every device has a copy of."""
  return NamedSharding(mesh, PartitionSpec())


def of_parameter(
  cfg: sizes.ModelConfig, mesh: Mesh, path: str, shape: tuple[int, ...]
) -> NamedSharding:
  """The place of an array with the path of a parameter or low-rank factor.

  Such as layers/q or layers/q_lora_a. The optimizer's averages, EMA, and a
  quantised matrix's numbers and scales have these paths as well. Norms, and
  what has another number of axes (Adafactor's averages), are whole on every
  device.
  """
  matrix, _, factor = path.partition('_lora_')
  rows = {p.path: p for p in parameters.table(cfg)}
  if matrix not in rows or rows[matrix].norm:
    return whole(mesh)
  axes = rows[matrix].axes
  if factor == 'a':  # [N, in, R].
    axes = (*axes[:2], 'rank')
  elif factor == 'b':  # [N, R, out].
    axes = ('layers', 'rank', axes[2])
  if len(shape) != len(axes):
    return whole(mesh)
  stack = rows[matrix].stack
  cfg = next((s.cfg for s in cfg.stacks() if s.name == stack), cfg)
  heads = {'heads': cfg.num_heads, 'kv_heads': cfg.num_kv_heads}
  units = [
    math.gcd(heads.get(a, n), n) for a, n in zip(axes, shape, strict=True)
  ]
  return place(mesh, axes, tuple(units))


def of_tree(cfg: sizes.ModelConfig, mesh: Mesh, tree: Any) -> Any:
  """NamedShardings for a tree of arrays, or of their shapes.

  Its leaves are named as the parameters are, see of_parameter.
  """

  def one(path, leaf):
    name = next((str(k.key) for k in reversed(path) if hasattr(k, 'key')), '')
    return of_parameter(cfg, mesh, name, leaf.shape)

  return jax.tree.map_with_path(one, tree)


def on_host(read: Callable[[], Any]) -> Any:
  """`read()` with its arrays in the host's memory, not on an accelerator.

  A single device may be too small for what the mesh will hold.
  """
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS excludes it.
    return read()
  with jax.default_device(host):
    return read()


def put(tree: Any, places: Any) -> Any:
  """A tree of arrays onto a mesh; every process has all of each array.

  `places` is the same tree of NamedShardings.
  """
  chex.assert_trees_all_equal_structs(tree, places)

  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

  return jax.tree.map(one, tree, places)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Numbers of the rows that devices of this process hold, in order.

  Where the tensor axis runs through several processes, they hold the same.
  """
  at = of_rows(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(
    np.concatenate([np.arange(batch_size)[i] for i in at.values()])
  )


def put_rows(
  mesh: Mesh | None, rows: dict[str, np.ndarray], batch_size: int
) -> dict[str, Any]:
  """A batch on the mesh, out of the rows that this process holds.

  Args:
    mesh: the mesh, or None for the first device.
    rows: [own rows, L] each, in the order of own_rows.
    batch_size: B, of all processes together.
  """
  if mesh is None:
    return jax.device_put(rows)
  return {
    k: jax.make_array_from_process_local_data(
      of_rows(mesh), v, (batch_size, *v.shape[1:])
    )
    for k, v in rows.items()
  }
