"""Changes of a config with which a run that does not fit would: tried."""

import bisect
from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

import ml_collections

Change = dict[str, Any]  # Knob -> value.

# From what costs little to what changes the training.
_FOR_TRAINING: tuple[Change, ...] = (
  {'train.remat': 'full'},
  {'train.frozen_dtype': 'bfloat16'},
  {'optim.ema_decay': 0.0},
  {'optim.name': 'adafactor'},
  {'train.parts': 'lora', 'train.frozen_dtype': 'bfloat16'},
)
_FOR_DECODING = _FOR_TRAINING[1:]


def changed(
  config: ml_collections.ConfigDict, change: Change
) -> ml_collections.ConfigDict:
  """A copy with these knobs."""
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict(change)
  return other


def find(
  config: ml_collections.ConfigDict,
  shards: int,
  training: bool,
  fits: Callable[[ml_collections.ConfigDict], bool],
) -> list[Change]:
  """The largest batches that fit, and each knob that is enough by itself.

  Where nothing is, all of it together, if that fits.

  Args:
    config: does not fit.
    shards: groups of devices that have rows of their own.
    training: whether it is the training that does not fit, or the decoding.
    fits: says it of another config, by compiling.
  """
  batches = [b for b in _batches(config, shards, training) if b]
  knobs = [[k] for k in _knobs(config, training)]

  @functools.cache
  def enough(knobs):
    return fits(changed(config, dict(knobs)))

  def key(change):
    return enough(tuple(change.items()))

  if batches and not key(batches[0][-1]):
    del batches[1:]  # The sum of the gradients of parts would come on top.
  found: list[Change] = []
  for changes in batches + knobs:  # Each from the mildest to the strongest.
    if key(changes[-1]):
      last = len(changes) - 1
      found.append(changes[bisect.bisect_left(changes, True, 0, last, key=key)])
  if not found:
    strongest = [changes[-1] for changes in batches[:1] + knobs]
    together = functools.reduce(dict.__or__, strongest, {})
    found = [together] if together and key(together) else []
  return found


def _batches(config, shards, training) -> Iterator[list[Change]]:
  """Smaller batches, and the same batch in more parts."""
  if not training:
    size = config.decode.batch_size
    yield [{'decode.batch_size': n} for n in _halved(size)]
    return
  size, parts = config.train.batch_size, config.train.micro_batches
  rows = size // parts // shards  # Of a device, at once.
  yield [{'train.batch_size': n * parts * shards} for n in _halved(rows)]
  yield [
    {'train.micro_batches': size // n // shards}
    for n in range(rows - 1, 0, -1)
    if rows % n == 0
  ]


def _halved(n):
  return [n >> k for k in range(1, n.bit_length())]


def _knobs(config, training) -> Iterator[Change]:
  """Changes that change something."""
  for change in _FOR_TRAINING if training else _FOR_DECODING:
    if 'train.parts' not in change and config.train.parts == 'all':
      change = {k: v for k, v in change.items() if k != 'train.frozen_dtype'}
    if changed(config, change) != changed(config, {}):
      yield change
