"""Parameters -> Google's own Flax layout, see mt/weights/flax.py."""

from collections.abc import Iterator
import pathlib

import chex
import numpy as np

from mt.data import tokenizer
from mt.gemma import model
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import flax_store


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: model.Params,
  tok: tokenizer.Tokenizer,
  dtype: str = 'float32',
) -> None:
  """Writes `folder` as Kaggle has it: tokenizer.model beside a checkpoint.

  gemma.params and mt/weights/flax.py read it: the flat layout, array by array.

  Args:
    folder: exists and is empty.
    cfg: the model's shape.
    params: without low-rank factors, see trainable.fold.
    tok: written beside the checkpoint.
    dtype: of the arrays on disk; 'bfloat16' is what Google publishes.

  Raises:
    OSError: the disk is full or not writable.
  """
  chex.assert_shape(params['embedding'], model.param_shapes(cfg)['embedding'])
  (folder / 'checkpoint').mkdir()
  (folder / 'tokenizer.model').write_bytes(tok.proto)
  names = []
  for keys, x in _leaves(cfg, params):
    flax_store.write_array(folder / 'checkpoint', keys, x, dtype)
    names.append(keys)
  flax_store.write_metadata(folder / 'checkpoint', names)


def is_transposed(cfg: sizes.ModelConfig) -> bool:
  """Whether the gating matrices are [F, D]: from Gemma 2 9B on.

  Source: transpose_gating_einsum in gemma/transformer.py 3.0.2.
  """
  first = sizes.SIZES['gemma2_2b'].num_layers
  return cfg.qk_norm or (cfg.post_norms and cfg.num_layers != first)


def _leaves(
  cfg: sizes.ModelConfig, params: model.Params
) -> Iterator[tuple[tuple[str, str], chex.Array]]:
  """(path, array) of every array of the flat layout, one after the other."""
  transposed = is_transposed(cfg)
  d, a = cfg.embed_dim, cfg.head_dim
  yield ('transformer/embedder', 'input_embedding'), params['embedding']
  yield ('transformer/final_norm', 'scale'), params['final_norm']

  def heads(x):  # [D, heads * A] -> [heads, D, A]
    return x.reshape(d, -1, a).transpose(1, 0, 2)

  for i in range(cfg.num_layers):
    # To the host, a matrix at a time.
    get = {
      name: lambda x=x, i=i: np.asarray(x[i])
      for name, x in params['layers'].items()
    }
    at = f'transformer/layer_{i}'
    for ours, theirs in flax.NORMS.items():
      if ours in get:
        yield (f'{at}/{theirs.replace(".", "/")}', 'scale'), get[ours]()
    if cfg.num_heads == cfg.num_kv_heads:
      x = np.stack([heads(get[n]()) for n in 'qkv'])
      yield (f'{at}/attn/qkv_einsum', 'w'), x
    else:
      yield (f'{at}/attn/q_einsum', 'w'), heads(get['q']())
      x = np.stack([heads(get[n]()) for n in 'kv'])
      yield (f'{at}/attn/kv_einsum', 'w'), x
    o = get['o']().reshape(cfg.num_heads, a, d)
    yield (f'{at}/attn/attn_vec_einsum', 'w'), o
    x = np.stack(
      [get[n]().T if transposed else get[n]() for n in ('gate', 'up')]
    )
    yield (f'{at}/mlp/gating_einsum', 'w'), x
    yield (f'{at}/mlp/linear', 'w'), get['down']()
