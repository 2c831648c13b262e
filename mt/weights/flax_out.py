"""Parameters -> Google's own Flax layout, see mt/weights/flax.py."""

from collections.abc import Iterator
import errno
import pathlib

import chex
import numpy as np
import orbax.checkpoint as ocp

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
  of it at once, so that the weights are in memory twice.

  Args:
    folder: exists and is empty.
    cfg: the model's shape.
    params: without low-rank factors, see lora.fold.
    tok: written beside the checkpoint.
    dtype: of the arrays on disk; 'bfloat16' is what Google publishes.

  Raises:
    errors.UserError: a Gemma 4.
    OSError: the disk is full or not writable.
  """
  chex.assert_shape(params['embedding'], cfg.dims()['VD'])
  if cfg.global_head_dim:
    raise errors.UserError(
      "--to=gemma: Gemma 4 is not written in Google's own layout; use --to=hf."
    )
  (folder / 'tokenizer.model').write_bytes(tok.proto)
  tree = {}
  for (path, last), x in _leaves(cfg, params):
    tree[path] = {last: np.asarray(x).astype(dtype, copy=False)}
  path = folder.absolute() / 'checkpoint'
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(path, tree)
  except ValueError as e:  # tensorstore's, of a full disk.
    raise OSError(errno.EIO, str(e), str(path)) from e


def is_transposed(cfg: sizes.ModelConfig) -> bool:
  """Whether the gating matrices are [F, D]: from Gemma 2 9B on.

  Source: transpose_gating_einsum in gemma/transformer.py 3.0.2.
  """
  first = sizes.SIZES['gemma2_2b'].num_layers
  return cfg.qk_norm or (cfg.post_norms and cfg.num_layers != first)


def _leaves(
  cfg: sizes.ModelConfig, params: parameters.Params
) -> Iterator[tuple[tuple[str, str], chex.Array]]:
  """(path, array) of every array of the flat layout, one after the other."""
  flat, transposed = parameters.flatten(params), is_transposed(cfg)

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
