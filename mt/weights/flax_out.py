"""Parameters -> Google's own Flax layout, see mt/weights/flax.py."""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import errno
import pathlib

import chex
import numpy as np
import orbax.checkpoint as ocp
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import flax


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tok: tokenizer.Tokenizer,
  dtype: str = 'float32',
) -> None:
  """Writes `folder` as Kaggle has it: tokenizer.model beside a checkpoint.

  gemma.params and mt/weights/flax.py read it: the flat layout. Orbax wants all
  of it at once, so that the weights are in memory twice. The embedding has the
  rows of the published size, as gemma takes no others; those that are lacking
  are <pad>'s again, which no model writes.

  Args:
    folder: exists and is empty.
    cfg: the model's shape.
    params: without low-rank factors, see lora.fold.
    tok: written beside the checkpoint.
    dtype: of the arrays on disk; 'bfloat16' is what Google publishes.

  Raises:
    errors.UserError: see `published`.
    OSError: the disk is full or not writable.
  """
  chex.assert_shape(params['embedding'], cfg.dims()['VD'])
  cfg = published(cfg, tok)
  rows, proto = np.arange(cfg.vocab_size), tok.proto
  if tok.vocab_size > len(rows):
    model = sp_pb2.ModelProto.FromString(proto)
    del model.pieces[len(rows) :]
    model.trainer_spec.vocab_size = len(rows)
    proto = model.SerializeToString()
  (folder / 'tokenizer.model').write_bytes(proto)
  flat, x = parameters.flatten(params), np.asarray(params['embedding'])
  flat['embedding'] = x[: len(rows)]
  if len(x) < len(rows):
    flat['embedding'] = x[np.where(rows < len(x), rows, tok.pad_id)]
  tree = {}
  for (path, last), x in _leaves(cfg, flat):
    tree[path] = {last: np.asarray(x).astype(dtype, copy=False)}
  path = folder.absolute() / 'checkpoint'
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(path, tree)
  except ValueError as e:  # tensorstore's, of a full disk.
    raise OSError(errno.EIO, str(e), str(path)) from e


def published(
  cfg: sizes.ModelConfig, tok: tokenizer.Tokenizer
) -> sizes.ModelConfig:
  """The published size that whoever reads a checkpoint will take it for.

  It has no config: all but the shapes of its arrays is that of sizes.SIZES. The
  multimodal Gemma 3 of Hugging Face have rows after the published ones, and a
  piece that stands for an image, which no text has: they are left out.

  Raises:
    errors.UserError: a Gemma 4, no published size, or pieces without a row.
  """
  if cfg.global_head_dim:
    raise errors.UserError(
      "--to=gemma: Gemma 4 is not written in Google's own layout; use --to=hf."
    )

  def differences(name):
    size, ours = sizes.SIZES[name], cfg
    if cfg.vocab_size >= size.vocab_size - flax.SPARE_ROWS:
      ours = dataclasses.replace(cfg, vocab_size=size.vocab_size)
    ours, there = dataclasses.asdict(ours), dataclasses.asdict(size)
    return [
      f'{k} is {v!r}, in {name} {there[k]!r}'
      for k, v in ours.items()
      if v != there[k]
    ]

  name = min(sizes.SIZES, key=lambda name: len(differences(name)))
  if differs := differences(name):
    raise errors.UserError(
      f"--to=gemma: {differs[0]}; Google's layout has no config, and would be "
      'read as that published size: use --to=hf.'
    )
  size = sizes.SIZES[name]
  rest = range(size.vocab_size, tok.vocab_size)
  new = [p for p in map(tok.spm.id_to_piece, rest) if p != tokenizer.IMAGE]
  if new:
    raise errors.UserError(
      f'--to=gemma: the tokenizer has {len(new)} pieces more than the '
      f'{size.vocab_size:,} of {name}, such as {new[0][:40]!r}; use --to=hf.'
    )
  return size


def is_transposed(cfg: sizes.ModelConfig) -> bool:
  """Whether the gating matrices are [F, D]: from Gemma 2 9B on.

  Source: transpose_gating_einsum in gemma/transformer.py 3.0.2.
  """
  first = sizes.SIZES['gemma2_2b'].num_layers
  return cfg.qk_norm or (cfg.post_norms and cfg.num_layers != first)


def _leaves(
  cfg: sizes.ModelConfig, flat: Mapping[str, chex.Array]
) -> Iterator[tuple[tuple[str, str], chex.Array]]:
  """(path, array) of every array of the flat layout, one after the other."""
  transposed = is_transposed(cfg)

  def theirs(place):
    row, x = place.row, flat[place.row.path]
    if not row.stacked:
      return x
    x = np.asarray(x[place.layer])  # To the host, a matrix at a time.
    if row.name in ('q', 'k', 'v'):  # [D, heads * A] -> [heads, D, A]
      return x.reshape(len(x), -1, cfg.head_dim).transpose(1, 0, 2)
    if row.name == 'o':
      return x.reshape(-1, cfg.head_dim, cfg.embed_dim)
    return x.T if transposed and row.name in ('gate', 'up') else x

  arrays = {}
  for place in flax.places(transposed, cfg):
    arrays.setdefault(place.name, []).append(place)
  for name, parts in arrays.items():
    keys = f'transformer/{name.replace(".", "/")}', 'w'
    if parts[0].row.norm:
      keys = keys[0], 'scale'
    elif name == flax.EMBEDDING:
      keys = tuple(keys[0].rsplit('/', 1))
    xs = [theirs(place) for place in parts]
    yield keys, np.stack(xs) if name.partition('.')[2] in flax.PARTS else xs[0]
