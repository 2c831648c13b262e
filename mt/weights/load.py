"""Tensors of one layer each, as files have them -> the stacked tree.

Each format says which of a file's tensors goes where (`Place`) and how to read
one (`Weights`); what is the same for all of them is here. Names and shapes are
checked before anything is allocated: a damaged header asks for no memory.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any
import zlib

import chex
import jax
import numpy as np

from mt.base import errors
from mt.base import processes
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import kept

Shape = tuple[int, ...]

_AT_ONCE = 2**23  # Weights of an embedding that are read in one go.


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


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's opened files; no tensor is read yet.

  Attributes:
    path: of them, for messages.
    config: the model's shape.
    places: shape -> the tensors of such a model in this format.
    found: name -> shape of the tensors in the files, but for those of other
      parts (vision), which nobody reads.
    get: place -> that tensor, of any float type, in our orientation; of a
      matrix (place, start, stop) -> what those rows of the file's tensor are in
      it, and no other is read.
    tokenizer: reads the one that belongs to them.
    heads: names of output layers, which must be the embedding: ours is.
    quantised: whether `get` dequantises, which takes most of the reading.
    multimodal: whether transformers makes a multimodal model of the files.
    chat_template: theirs, in Jinja; '' where they have none.
    together: place -> how many of its rows the file has in one piece, which is
      read whole.

  Raises:
    errors.UserError: a tensor is missing, too much, or has another shape. A
      bias or a scale that we do not read would be another function. A row of
      the table with published=False may be missing as a whole.
  """

  path: pathlib.Path
  config: sizes.ModelConfig
  places: Callable[[sizes.ModelConfig], list[Place]]
  found: Mapping[str, Shape]
  get: Callable[..., np.ndarray]
  tokenizer: Callable[[], tokenizer.Tokenizer]
  heads: Sequence[str] = ()
  quantised: bool = False
  multimodal: bool = False
  chat_template: str = ''
  together: Callable[[Place], int] = lambda place: 1

  def __post_init__(self):
    wanted, found = self.places(self.config), self.found
    there = {p.row.path for p in wanted if p.name in found}
    for p in wanted:
      if p.name not in found and (p.row.published or p.row.path in there):
        raise errors.UserError(
          f'{self.path}: no tensor {p.name!r}; the weights are not a complete '
          'Gemma: fetch them again.'
        )
      if found.get(p.name, p.shape) != p.shape:
        raise errors.UserError(
          f'{self.path}: tensor {p.name} has the shape {found[p.name]}, the '
          f'model {p.shape}; the files are damaged or do not belong together.'
        )
    # Files have keys and values of layers that see those of others, too.
    each_its_own = dataclasses.replace(self.config, sharing_layers=0)
    unread = {p.name for p in self.places(each_its_own)}
    known = unread.union((p.name for p in wanted), self.heads)
    if extra := sorted(found.keys() - known):
      raise errors.UserError(
        f'{self.path}: {extra[0]} (and {len(extra) - 1} more) is no part of '
        'this Gemma; merge an adapter first, take weights that are not '
        'quantised, or add it to mt/gemma/parameters.py.'
      )


def places(
  name: Callable[[parameters.Parameter, int | None], str],
  cfg: sizes.ModelConfig,
) -> list[Place]:
  """All tensors of a format that has each matrix apart, as [out, in].

  Args:
    name: (row, number of the layer in the model, or None) -> name in the file.
    cfg: the model's shape.
  """
  shapes, out = parameters.shapes(cfg), []
  layers = {stack.name: stack.layers for stack in cfg.stacks()}
  for row in parameters.table(cfg):
    shape = shapes[row.path][1:] if row.stacked else shapes[row.path]
    shape = shape[::-1] if row.transposed else shape
    for i, n in enumerate(layers.get(row.stack, [None])):
      out.append(Place(row, i if row.stacked else None, name(row, n), shape))
  return out


def put(flat: Mapping[str, Any], place: Place) -> np.ndarray:
  """A tensor as the files have it, on the host, out of {path: parameter}."""
  x = flat[place.row.path]
  x = np.asarray(x if place.layer is None else x[place.layer])
  return x.T if place.row.transposed else x


def _blocks(weights, place, shape):
  """What is read of a tensor in one go: embeddings, the largest, in parts."""
  if place.row.axes[0] != 'vocab':
    get = functools.partial(weights.get, place)
    yield kept.Block(place.layer, 0, shape[0], get)
    return
  piece = weights.together(place)
  step = max(1, _AT_ONCE // math.prod(shape[1:]) // piece) * piece
  for at in range(0, shape[0], step):
    stop = min(at + step, shape[0])
    get = functools.partial(weights.get, place, at, stop)
    yield kept.Block(None, at, stop - at, get)


def _check_same(weights):
  """Refuses another model in one process: all would have a mixture.

  Compared are names, shapes, norms, and of each matrix a row that can be read
  by itself. More would be to read all of it.
  """
  crc = 0
  with processes.told_to_all():
    for place in weights.places(weights.config):
      alone = place.row.norm or weights.together(place) == 1
      if alone and place.name in weights.found:
        rows = () if place.row.norm else (0, 1)
        crc = zlib.crc32(weights.get(place, *rows).tobytes(), crc)
  known = weights.config, sorted(weights.found.items()), weights.heads, crc
  with processes.told_to_all():
    processes.check_same({f'model in {weights.path}': known})


def _check_head(weights, embedding, head):
  both = embedding, dataclasses.replace(embedding, name=head)
  blocks = (_blocks(weights, place, embedding.shape) for place in both)
  own = slice(jax.process_index(), None, jax.process_count())
  with processes.told_to_all():
    same = weights.found[head] == embedding.shape and all(
      np.array_equal(ours.read(), theirs.read())
      for ours, theirs in list(zip(*blocks, strict=True))[own]
    )
    if not same:
      raise errors.UserError(
        f'{weights.path}: the head {head} is another matrix than '
        f'{embedding.name}, and here they are one; take weights whose head is '
        'the embedding, as in every published Gemma.'
      )


def read(
  weights: Weights, key: chex.PRNGKey, keep: kept.Keep = kept.FLOAT32
) -> tuple[parameters.Params, int]:
  """The parameters; each process reads its part of the tensors.

  Args:
    weights: opened.
    key: of the initial values of what a fork has added and the files lack.
    keep: their format and place.

  Returns:
    The parameters, and the CRC-32 of all of them as float32.

  Raises:
    errors.UserError: a file cannot be read, a head is not the embedding, or
      another process has another model.
  """
  cfg, wanted = weights.config, weights.places(weights.config)
  embedding = next(p for p in wanted if p.row.path == 'embedding')
  if jax.process_count() > 1:
    _check_same(weights)
  for head in weights.heads:
    _check_head(weights, embedding, head)
  numbers = {row.path: i for i, row in enumerate(parameters.table(cfg))}
  shapes = parameters.shapes(cfg)

  def blocks(row):
    own = [p for p in wanted if p.row.path == row.path]
    if own[0].name not in weights.found:
      k = jax.random.fold_in(key, numbers[row.path])
      return kept.in_memory(row, np.asarray(parameters.initial(cfg, row, k)))
    shape = shapes[row.path][row.stacked :]
    return [block for p in own for block in _blocks(weights, p, shape)]

  return kept.read(cfg, blocks, keep)
