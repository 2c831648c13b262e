"""A tiny random model of each generation, and prompts for it."""

import dataclasses
import functools

import jax
import numpy as np

from mt.gemma import parameters
from mt.translate import decode
from tests.fixtures import gemma_oracle
from tests.fixtures import tiny_gemma4

VOCAB = 96
_TWO = {'vocab_size': VOCAB, 'num_layers': 2}
_ORACLES = gemma_oracle.FAMILIES
FAMILIES = {
  'gemma1': dataclasses.replace(_ORACLES['gemma1_multi_query'], **_TWO),
  'gemma2': dataclasses.replace(_ORACLES['gemma2'], **_TWO, final_softcap=2.5),
  'gemma3': dataclasses.replace(_ORACLES['gemma3'], **_TWO, attention='LG'),
  'gemma4_e2b': dataclasses.replace(tiny_gemma4.SHAPES['e2b'], num_layers=6),
  'gemma4_12b': tiny_gemma4.SHAPES['12b'],
}


@functools.cache
def stacked(name='gemma3'):
  """Parameters as training has them.

  What the layers add outweighs the embedding of the last token. Otherwise a
  model with tied embeddings only repeats that token, and a decoder that reads
  nothing else would pass.
  """
  rng = np.random.default_rng(10)

  def draw(path, shape):
    key = path[-1].key
    if 'norm' in key or key == 'scale':
      mean = 8.0 if key.startswith('post_') else 0.0
      if not FAMILIES[name].norm_offset:
        means = {'post': 8.0, 'q': 0.7, 'k': 0.7}
        mean = means.get(key.split('_')[0], 1.0)
      return rng.normal(mean, 0.3, shape).astype(np.float32)
    std = shape[-1 if key == 'embedding' else -2] ** -0.5
    std *= 10.0 if key in ('o', 'down', 'input_proj') else 1.0
    # Else some tokens open no gate, and the norm after it amplifies noise.
    std *= 0.1 if key == 'input_gate' else 1.0
    return rng.normal(scale=std, size=shape).astype(np.float32)

  return jax.tree.map_with_path(
    draw,
    parameters.unflatten(parameters.shapes(FAMILIES[name])),
    is_leaf=lambda x: isinstance(x, tuple),
  )


@functools.cache
def params(name='gemma3'):
  """The same as decoding has them."""
  return decode.unstack(stacked(name))
