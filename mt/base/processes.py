"""Several processes of one run: how they find each other, and who speaks.

Every process runs the same program on its part of each batch. Process 0 alone
prints and writes; checkpoints are written by all, into one folder that all of
them see.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
from typing import TypeVar
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mt.base import errors

T = TypeVar('T')

# Seconds of silence after which a process counts as dead: during a run, and at
# its end, where all of them meet.
_HEARTBEAT, _SHUTDOWN = 20, 15


def start(coordinator: str, processes: int, process: int) -> None:
  """Joins the other processes; to be called before anything asks for devices.

  Args:
    coordinator: HOST:PORT of process 0; `auto` leaves all three to the cluster
      (Cloud TPU, Slurm, Open MPI, Kubernetes); '' for a single process.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    errors.UserError: something is not given, or the others are not there.
  """
  auto = coordinator == 'auto'
  if not coordinator and processes <= 0 and process < 0:
    return
  if not auto and not (coordinator and 0 <= process < processes):
    raise errors.UserError(
      f'--coordinator={coordinator} --processes={processes} --process='
      f'{process}: HOST:PORT of process 0, the number of processes, and from 0 '
      'to below it which one this is expected, or --coordinator=auto.'
    )
  try:
    jax.distributed.initialize(
      *(() if auto else (coordinator, processes, process)),
      heartbeat_timeout_seconds=_HEARTBEAT,
      shutdown_timeout_seconds=_SHUTDOWN,
    )
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(
      f'--coordinator={coordinator}: cannot join the other processes '
      f'({_short(e)}); start all of them with the same coordinator.'
    ) from e


def _short(e):
  return ' '.join(str(e).split())[:200]


def is_first() -> bool:
  """Whether this process prints and writes."""
  return jax.process_index() == 0


def sync(name: str) -> None:
  """Waits for all processes to get here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(x: np.ndarray) -> np.ndarray:
  """What each process has, in all of them, to the last bit.

  Args:
    x: [...], of the same shape and dtype in all.

  Returns:
    [processes, ...], in their order.
  """
  count, devices = jax.process_count(), jax.local_device_count()
  if count == 1:
    return x[None]
  # As bytes, a part from each device: none sends what another one sends. Sizes
  # are powers of two, as each is compiled.
  part = -(-x.nbytes // devices)
  flat = np.zeros(devices << (part - 1).bit_length(), np.uint8)
  flat[: x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  order = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  place = NamedSharding(Mesh(order, 'bytes'), PartitionSpec('bytes'))
  every = jax.make_array_from_process_local_data(place, flat)
  found = multihost_utils.process_allgather(every, tiled=True)
  found = found.reshape(count, -1)[:, : x.nbytes]
  return found.view(x.dtype).reshape(count, *x.shape)


def broadcast_from_first(value: float) -> float:
  """The number that process 0 has, in all of them, to the last bit."""
  return float(gather(np.array([value], np.float64))[0, 0])


def largest(value: int) -> jax.Array:
  """The largest number of all processes: scalar int32, not waited for."""
  one_each, maximum = _over_processes()
  own = np.array([value], np.int32)
  return maximum(jax.make_array_from_process_local_data(one_each, own))


@functools.cache
def _over_processes():
  """Where an array with one number of each process lives; its maximum."""
  first = {d.process_index: d for d in reversed(jax.devices())}
  mesh = Mesh([first[i] for i in sorted(first)], 'process')
  everywhere = NamedSharding(mesh, PartitionSpec())
  maximum = jax.jit(jnp.max, out_shardings=everywhere)
  return NamedSharding(mesh, PartitionSpec('process')), maximum


def agree(value: bool) -> bool:
  """What process 0 says, in all of them."""
  return bool(broadcast_from_first(float(value)))


def check_same(what: Mapping[str, object]) -> None:
  """Refuses a process whose inputs are not those of process 0.

  Args:
    what: their names, for the message, and what identifies each.

  Raises:
    errors.UserError: naming the first that differs.
  """
  own = {k: zlib.crc32(repr(v).encode()) for k, v in what.items()}
  first = {k: broadcast_from_first(v) for k, v in own.items()}
  for name in what:
    if own[name] != first[name]:
      raise errors.UserError(
        f'process {jax.process_index()} has another {name} than process 0; '
        'the same files and flags expected for all of them.'
      )


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
  """An errors.UserError of one process is one in all, which wait for it here.

  So no one waits elsewhere until the one that has left counts as dead.
  """
  failure = None
  try:
    yield
  except errors.UserError as e:
    failure = e
  failed = gather(np.array([failure is not None]))[:, 0]
  if failure is not None:
    raise failure
  if failed.any():
    raise errors.UserError(
      f'process {np.argmax(failed)} cannot go on; mend what it says itself.'
    )


def first_then_others(make: Callable[[], T]) -> T:
  """`make()` in every process, in process 0 before all others.

  What it downloads or writes down is there when they come.
  """
  if not is_first():
    sync('first')
  made = make()
  if is_first():
    sync('first')
  return made


@contextlib.contextmanager
def exit_if_peer_lost():
  """Raises errors.ExitNow if another process is lost, or a device is full."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1:
      raise
    what = 'lost another one'
    remedy = 'the run goes on from its last checkpoint'
    if 'RESOURCE_EXHAUSTED' in str(e):
      what = 'has a device that is full'
      remedy = 'with more train.micro_batches or train.remat=full'
    raise errors.ExitNow(
      f'process {jax.process_index()} {what} ({_short(e)}); start all of them '
      f'again, {remedy}.'
    ) from e
