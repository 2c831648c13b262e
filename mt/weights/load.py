"""Tensors of one layer each, as files have them -> the stacked tree.

Each format says which of a file's tensors goes where (`Place`) and how to read
one; what is the same for all of them is here. Names and shapes are checked
before anything is allocated, so that a damaged header asks for no memory.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib

import chex
import jax
import numpy as np

from mt.base import errors
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import kept

Shape = tuple[int, ...]

_AT_ONCE = 2**22  # Weights that are compared in one go.


@dataclasses.dataclass(frozen=True)
class Place:
  """One tensor of the model, and where a file has it.

  Attributes:
    row: its row in the table of parameters.
    layer: which of its stack it belongs to; None where it is not stacked.
    name: of the file's tensor. In Flax checkpoints several share one.
    shape: of the file's tensor.
  """

  row: parameters.Parameter
  layer: int | None
  name: str
  shape: Shape


def places(
  cfg: sizes.ModelConfig,
  name: Callable[[parameters.Parameter, int | None], str],
) -> list[Place]:
  """All tensors of a format that has each matrix apart, as [out, in].

  Args:
    cfg: the model's shape.
    name: (row, number of the layer in the model, or None) -> name in the file.
  """
  shapes, out = parameters.shapes(cfg), []
  layers = {stack.name: stack.layers for stack in cfg.stacks()}
  for row in parameters.table(cfg):
    shape = shapes[row.path][1:] if row.stacked else shapes[row.path]
    shape = shape[::-1] if row.transposed else shape
    for i, n in enumerate(layers.get(row.stack, [None])):
      out.append(Place(row, i if row.stacked else None, name(row, n), shape))
  return out


def check(
  path: pathlib.Path, wanted: Sequence[Place], found: Mapping[str, Shape]
) -> None:
  """Refuses a file whose tensors are not those of the model.

  A row of the table with published=False may be missing as a whole.

  Args:
    path: of the file, for the message.
    wanted: the tensors of the model.
    found: name -> shape of the file's tensors, but for those of other parts
      (vision), which nobody reads, and a head, see `check_head`. A bias or a
      scale that we do not read would be another function.

  Raises:
    errors.UserError: a tensor is missing, too much, or has another shape.
  """
  there = {p.row.path for p in wanted if p.name in found}
  for p in wanted:
    if p.name not in found and (p.row.published or p.row.path in there):
      raise errors.UserError(
        f'{path}: no tensor {p.name!r}; the weights are not a complete Gemma: '
        'fetch them again.'
      )
    if found.get(p.name, p.shape) != p.shape:
      raise errors.UserError(
        f'{path}: tensor {p.name} has the shape {found[p.name]}, the model '
        f'{p.shape}; the files are damaged or do not belong together.'
      )
  if extra := sorted(found.keys() - {p.name for p in wanted}):
    raise errors.UserError(
      f'{path}: {extra[0]} (and {len(extra) - 1} more) is no part of this '
      'Gemma; merge an adapter first, take weights that are not quantised, or '
      'add it to mt/gemma/parameters.py.'
    )


def check_head(
  path: pathlib.Path,
  found: Mapping[str, Shape],
  head: str,
  embedding: str,
  rows: Callable[[str, int, int], np.ndarray],
) -> None:
  """Refuses a head that is not the embedding, with which ours is tied.

  Args:
    path: of the file, for the message.
    found: name -> shape.
    head, embedding: names.
    rows: (name, first, last + 1) -> those rows of it.

  Raises:
    errors.UserError: they differ.
  """
  shape = found[head]
  same = shape == found.get(embedding) and len(shape) == 2
  step = max(1, _AT_ONCE // max(1, shape[-1]))
  for at in range(0, shape[0], step) if same else ():
    stop = min(at + step, shape[0])
    parts = [rows(name, at, stop) for name in (head, embedding)]
    same = same and np.array_equal(*(x.astype(np.float32) for x in parts))
  if not same:
    raise errors.UserError(
      f'{path}: the head {head} is another matrix than {embedding}, and here '
      'they are one; take weights whose head is the embedding, as in every '
      'published Gemma.'
    )


def read(
  cfg: sizes.ModelConfig,
  path: pathlib.Path,
  wanted: Sequence[Place],
  found: Mapping[str, Shape],
  get: Callable[[Place], kept.Tensor],
  key: chex.PRNGKey,
  keep: kept.Keep,
) -> tuple[parameters.Params, int]:
  """The parameters, checked and then read tensor by tensor.

  Args:
    cfg: the model's shape.
    path, wanted, found: see `check`.
    get: place -> that tensor, of any float type, in our orientation; or its
      parts along the first axis, in order.
    key: of the initial values of what a fork has added and the file lacks.
    keep: their format and place.

  Returns:
    The parameters, and the CRC-32 of all of them as float32.

  Raises:
    errors.UserError: see `check`.
  """
  check(path, wanted, found)
  numbers = {row.path: i for i, row in enumerate(parameters.table(cfg))}
  flat, crc = {}, 0
  for row in kept.in_order(cfg):
    own = [p for p in wanted if p.row.path == row.path]
    tensors = ((p.layer, get(p)) for p in own)
    if own[0].name not in found:
      k = jax.random.fold_in(key, numbers[row.path])
      x = np.asarray(parameters.initial(cfg, row, k))
      tensors = enumerate(x) if row.stacked else [(None, x)]
    flat[row.path], crc = kept.one(cfg, row.path, tensors, keep, crc)
  return parameters.unflatten(flat), crc
