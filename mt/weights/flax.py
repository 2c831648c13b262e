"""Google's own Flax checkpoints of Gemma 1 to 4, read.

They lie in Orbax folders (mt/weights/flax_store.py) as a tree of single layers,
either `flat` (transformer/layer_0/attn/q_einsum and so on, as published and
as gemma.params saves it) or `nested`, with or without a vision tower:

  embedder/input_embedding [V, D]           final_norm/scale [D]
  layer_N/attn/q_einsum/w [H, D, A]         and kv_einsum/w [2, K, D, A],
    or, where H = K, attn/qkv_einsum/w [3, H, D, A]
  layer_N/attn/attn_vec_einsum/w [H, A, D]  layer_N/mlp/linear [F, D]
  layer_N/mlp/gating_einsum [2, D, F], or [2, F, D] from Gemma 2 9B on
  layer_N/{pre_attention,post_attention,pre_ffw,post_ffw}_norm/scale [D]
  layer_N/attn/{_query,_key}_norm/scale [A]

Gemma 4 calls the last two query_norm and key_norm, has k_einsum [K, D, A] where
values are keys, and besides:

  layer_N/per_layer_input_gate [D, E]       layer_N/per_layer_projection [E, D]
  layer_N/post_per_layer_input_norm [D]     layer_N/skip_scale [1]
  embedder/per_layer_embeddings [V, N, E]   and per_layer_projection_norm [E]
  embedder/per_layer_model_projection [D, N, E]

Source: gemma/modules.py, params.py and transformer.py of gemma 3.0.2; for Gemma
4 google-deepmind/gemma, gemma/gm/nn/gemma4, and google/tunix, params.py. A
checkpoint does not say which Gemma it is: its shapes do, as in the library's
own `from_params`, and the rest comes from mt/gemma/sizes.py.
"""

import dataclasses
import functools
import pathlib
import re

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import flax_store
from mt.weights import load

_PREFIXES = ('', 'transformer.', 'params.', 'params.transformer.')
# Vision.
_OTHER_PARTS = (
  *('embedder.mm_', 'embedder.audio_', 'SigLiPFromPatches_0.'),
  *('vision_encoder.', 'audio_encoder.'),
)
EMBEDDING = 'embedder.input_embedding'
# Our name of a weight -> the array that it is, or is a part of.
_ARRAYS = {
  'embedding': EMBEDDING,
  'layer_input_embedding': 'embedder.per_layer_embeddings',
  'layer_input_proj': 'embedder.per_layer_model_projection',
  'layer_input_norm': 'embedder.per_layer_projection_norm',
  'attn_norm': 'pre_attention_norm',
  'ffw_norm': 'pre_ffw_norm',
  'post_attn_norm': 'post_attention_norm',
  'post_ffw_norm': 'post_ffw_norm',
  'q_norm': 'attn._query_norm',
  'k_norm': 'attn._key_norm',
  'q': 'attn.q_einsum',
  'k': 'attn.kv_einsum',
  'v': 'attn.kv_einsum',
  'o': 'attn.attn_vec_einsum',
  'gate': 'mlp.gating_einsum',
  'up': 'mlp.gating_einsum',
  'down': 'mlp.linear',
  'scale': 'skip_scale',
  'input_gate': 'per_layer_input_gate',
  'input_proj': 'per_layer_projection',
  'post_input_norm': 'post_per_layer_input_norm',
}
# Array -> which of ours are stacked in it.
PARTS = {
  'attn.qkv_einsum': ('q', 'k', 'v'),
  'attn.kv_einsum': ('k', 'v'),
  'mlp.gating_einsum': ('gate', 'up'),
}
# Shapes of arrays that are not as ours.
_LETTERS = {
  'embedder.per_layer_embeddings': 'VNE',
  'embedder.per_layer_model_projection': 'DNE',
  'attn.q_einsum': 'HDA',
  'attn.qkv_einsum': '3HDA',
  'attn.kv_einsum': '2KDA',
  'attn.k_einsum': 'KDA',
  'attn.attn_vec_einsum': 'HAD',
  'mlp.gating_einsum': '2DF',
}
SPARE_ROWS = 128  # Of the embedding: no token uses them, some files lack them.


def find_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """The folder itself, or the one folder in it that is an Orbax checkpoint.

  Kaggle's downloads have the checkpoint beside the tokenizer.

  Raises:
    errors.UserError: no checkpoint, or several.
  """
  if flax_store.is_checkpoint(folder):
    return folder
  found = [p for p in sorted(folder.iterdir()) if flax_store.is_checkpoint(p)]
  if len(found) != 1:
    names = ', '.join(p.name for p in found) or 'none'
    raise errors.UserError(
      f'{folder}: one Orbax checkpoint (a folder with manifest.ocdbt or '
      f'_METADATA) expected, {names} found; give its folder in weights.source.'
    )
  return found[0]


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """The SentencePiece model in a checkpoint's folder or in the one above.

  Raises:
    errors.UserError: none, or several of which none is tokenizer.model.
  """
  for place in (folder, folder.absolute().parent):
    found = sorted(place.glob('tokenizer.model'))
    found = found or sorted(place.glob('*.model'))
    if len(found) == 1:
      return found[0]
    if found:
      break
  raise errors.UserError(
    f'{folder}: {"several" if found else "no"} *.model beside it or in it, one '
    'tokenizer.model expected; give its path in weights.tokenizer.'
  )


def open_checkpoint(folder: pathlib.Path) -> flax_store.Store:
  """The text model in an Orbax folder.

  Its names are without a prefix, and without the endings '.w' and '.scale' that
  not all have: 'layer_0.attn.q_einsum'.

  Raises:
    errors.UserError: damaged, or without Gemma's embedding.
  """
  store = flax_store.open_store(folder)
  prefixes = [p for p in _PREFIXES if p + EMBEDDING in store.names]
  if len(prefixes) != 1:
    some = ', '.join(sorted(store.names)[:3])
    raise errors.UserError(
      f'{store.path}: {EMBEDDING} of a Gemma expected once, found '
      f'{len(prefixes)} times among {len(store.names)} arrays ({some} …); give '
      'the folder of a published Flax checkpoint in weights.source.'
    )
  names = {}
  for full, place in store.names.items():
    name = full.removeprefix(prefixes[0])
    # Beside `params` a training state has its optimizer and its steps.
    state = prefixes[0].startswith('params.') and not full.startswith('params.')
    if state or name.startswith(_OTHER_PARTS):
      continue
    short = name.removesuffix('.w').removesuffix('.scale')
    short = re.sub(r'\.(query|key)_norm$', r'._\1_norm', short)
    if short in names:
      raise store.damaged(f'array {short} is there twice')
    names[short] = place
  return dataclasses.replace(store, names=names)


def _shape(store, name, rank):
  found = flax_store.open_array(store, name).shape
  if len(found) != rank:
    raise store.damaged(f'array {name} has the shape {found}')
  return found


def read_config(store: flax_store.Store) -> sizes.ModelConfig:
  """The published size that has a checkpoint's shapes.

  Raises:
    errors.UserError: another model, named with what is nearest to it.
  """
  vocab_size, width = _shape(store, EMBEDDING, 2)
  layers = [re.match(r'layer_(\d{1,4})\.', n) for n in store.names]
  heads, head_dim, _ = _shape(store, 'layer_0.attn.attn_vec_einsum', 3)
  kv_heads = heads
  if 'layer_0.attn.qkv_einsum' not in store.names:
    kv_heads = _shape(store, 'layer_0.attn.kv_einsum', 4)[1]
  found = {
    'vocab_size': vocab_size,
    'num_layers': 1 + max(int(m[1]) for m in layers if m),
    'embed_dim': width,
    'hidden_dim': _shape(store, 'layer_0.mlp.linear', 2)[0],
    'num_heads': heads,
    'num_kv_heads': kv_heads,
    'head_dim': head_dim,
    'qk_norm': 'layer_0.attn._query_norm' in store.names,
    'post_norms': 'layer_0.post_ffw_norm' in store.names,
    'layer_scale': 'layer_0.skip_scale' in store.names,
  }

  def differences(name):
    there = dataclasses.asdict(sizes.SIZES[name])
    if 0 <= there['vocab_size'] - vocab_size <= SPARE_ROWS:
      there['vocab_size'] = vocab_size
    return [
      f'{k} {v} (there {there[k]})' for k, v in found.items() if v != there[k]
    ]

  name = min(sizes.SIZES, key=lambda name: len(differences(name)))
  if differs := differences(name):
    raise errors.UserError(
      f'{store.path}: no Gemma known here has these shapes, the nearest '
      f'is {name}: {", ".join(differs)}; the sizes in mt/gemma/sizes.py are '
      'those that can be read.'
    )
  return dataclasses.replace(sizes.SIZES[name], vocab_size=vocab_size)


def places(transposed: bool, cfg: sizes.ModelConfig) -> list[load.Place]:
  """Which array has which of our tensors, or has it as a part.

  Args:
    transposed: whether the gating matrices are [F, D].
    cfg: the model's shape.
  """
  shapes, out = parameters.shapes(cfg), []
  stacks = {stack.name: stack for stack in cfg.stacks()}
  for row in parameters.table(cfg):
    own = stacks[row.stack].cfg if row.stacked else cfg
    name, shape = _array(row.name, own), shapes[row.path]
    shape = shape[1:] if row.stacked else shape
    if letters := _LETTERS.get(name):
      turned = transposed and name == 'mlp.gating_einsum'
      shape = own.dims()['2FD' if turned else letters]
    if not row.stacked:
      out.append(load.Place(row, None, name, shape))
      continue
    for i, n in enumerate(stacks[row.stack].layers):
      out.append(load.Place(row, i, f'layer_{n}.{name}', shape))
  return out


def _array(ours, cfg):
  """The array of one of our weights, in the layers of a stack or in none."""
  if ours == 'k' and cfg.keys_are_values:
    return 'attn.k_einsum'
  one = cfg.num_heads == cfg.num_kv_heads and not cfg.layer_scale
  if one and ours in PARTS['attn.qkv_einsum']:
    return 'attn.qkv_einsum'
  # What a fork has added is under our name, if at all.
  return _ARRAYS.get(ours, ours)


def open_folder(folder: pathlib.Path) -> load.Weights:
  """Opens a folder as Kaggle has it, or the checkpoint in it; reads no tensor.

  Raises:
    errors.UserError: no checkpoint, damaged, no Gemma that is known, or an
      array is missing, too much, or has another shape.
  """
  path = find_checkpoint(folder)
  store = open_checkpoint(path)
  cfg = read_config(store)
  gating = _shape(store, 'layer_0.mlp.gating_einsum', 3)
  transposed = gating[1:] != (cfg.embed_dim, cfg.hidden_dim)
  return load.Weights(
    store.path,
    cfg,
    functools.partial(places, transposed),
    {name: flax_store.open_array(store, name).shape for name in store.names},
    functools.partial(_get, store, cfg, transposed),
    lambda: tokenizer.from_file(find_tokenizer(path)),
    together=functools.partial(_chunk, store),
  )


def _chunk(store, place):
  """Rows of an array that are read whole, however few of them are wanted."""
  array = flax_store.open_array(store, place.name)
  return array.chunk_layout.read_chunk.shape[0]


def _get(store, cfg, transposed, place, *rows):
  """A tensor in our orientation, out of the array that it is, or is part of."""
  array, ours = flax_store.open_array(store, place.name), place.row.name
  parts = PARTS.get(place.name.partition('.')[2], ())
  if ours in parts:
    array = array[parts.index(ours)]
  if rows:
    array = array[slice(*rows)]
  x = flax_store.read_array(store, place.name, array)
  if ours in ('q', 'k', 'v'):
    return x.transpose(1, 0, 2).reshape(cfg.embed_dim, -1)
  if ours == 'o':
    return x.reshape(-1, cfg.embed_dim)
  if place.name in _LETTERS:  # All layers' inputs: [V, N, E] and [D, N, E].
    return x.reshape(len(x), -1)
  return x.T if transposed and ours in ('gate', 'up') else x
