"""GGUF -> the model's shape, its parameters and its tokenizer.

Architectures gemma, gemma2, gemma3 and gemma4, named as llama.cpp names them;
see mt/weights/gguf_file.py for the container. Matrices are stored as [out, in],
and norm weights up to Gemma 3 with 1 added. Source: conversion/gemma.py of
llama.cpp.
"""

import dataclasses
import functools
import pathlib
import re

import numpy as np

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import gguf_file
from mt.weights import hf_config
from mt.weights import hf_tokenizer
from mt.weights import load

_PATTERNS = {'gemma': 'G', 'gemma2': 'LG', 'gemma3': 'LLLLLG'}
_KINDS = {
  'gemma': 'gemma',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'gemma4': 'gemma4_text',
}
# The names in config.json -> those in a GGUF header, after the architecture's.
NAMES = {
  'num_hidden_layers': 'block_count',
  'hidden_size': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'sliding_window': 'attention.sliding_window',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
  'rope_local_base_freq': 'rope.freq_base_swa',
  'factor': 'rope.scaling.factor',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
_NAMES_4 = NAMES | {
  'enable_moe_block': 'expert_count',
  'head_dim': 'attention.key_length_swa',
  'global_head_dim': 'attention.key_length',
  'layer_types': 'attention.sliding_window_pattern',
  'num_kv_shared_layers': 'attention.shared_kv_layers',
  'hidden_size_per_layer_input': 'embedding_length_per_layer_input',
}
# Tensors of other parts: of vision and audio, as Ollama has them in the same
# file, and RoPE's factors, which no graph of these architectures reads.
_OTHER_PARTS = ('v.', 'a.', 'mm.', 'rope_freqs.')
_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'
_NO_PIECE = re.compile(rb'\[PAD\d+\]')  # Of llama.cpp's converter.


def read_config(file: gguf_file.GGUFFile) -> sizes.ModelConfig:
  """The model's shape out of a GGUF header.

  Files of Gemma 3 as Ollama writes them lack the factor of RoPE, and have a
  soft cap that the model was not trained with: for the published shapes both
  are those of mt/gemma/sizes.py.

  Raises:
    errors.UserError: another architecture, a header without a needed key, or
      one that asks for what mt/gemma/model.py does not compute.
  """
  # str(): a damaged header may hold an array, which cannot be looked up.
  arch = str(file.fields.get('general.architecture'))
  if arch in hf_config.OTHERS:
    raise errors.UserError(f'{file.path}: {hf_config.OTHERS[arch]}')
  if arch not in _KINDS:
    raise errors.UserError(
      f'{file.path}: architecture {arch!r} found, one of '
      f'{", ".join(_KINDS)} expected; this project trains Gemma only.'
    )
  if _EMBEDDING not in file.tensors:
    raise errors.UserError(
      f'{file.path}: no tensor {_EMBEDDING}; the file is not a complete Gemma.'
    )
  own = {
    key.removeprefix(f'{arch}.'): x.tolist() if isinstance(x, np.ndarray) else x
    for key, x in file.fields.items()
    if key.startswith(f'{arch}.')
  }
  names = _NAMES_4 if arch == 'gemma4' else NAMES
  values = {ours: own[name] for ours, name in names.items() if name in own}
  values['vocab_size'] = file.tensors[_EMBEDDING].shape[0]
  names = {ours: f'{arch}.{name}' for ours, name in names.items()}
  fields = hf_config.Fields(file.path, _KINDS[arch], values, names)
  if arch == 'gemma4':
    more = _gemma4(file, fields)
  else:
    more = _before_4(arch, own, fields)
    _check_meaning(arch, own, fields)
  return hf_config.shape(dataclasses.replace(fields, values=more))


def _before_4(arch, own, fields):
  """What headers of Gemma 1 to 3 leave out, or say in another way."""
  layers, width, heads = map(
    fields.number, ('num_hidden_layers', 'hidden_size', 'num_attention_heads')
  )
  largest = (arch, layers) in (('gemma2', 46), ('gemma3', 62))  # The two 27B.
  query_dim = width / heads if largest else fields.number('head_dim', 256)
  caps = ('attn_logit_softcapping', 50.0), ('final_logit_softcapping', 30.0)
  values = dict(caps) if arch == 'gemma2' else {}
  values |= {'num_key_value_heads': heads, 'query_pre_attn_scalar': query_dim}
  if arch == 'gemma3':
    values['rope_theta'] = own.get('rope.global.freq_base', 1e6)
    values['rope_local_base_freq'] = own.get('rope.local.freq_base', 1e4)
  values |= fields.values
  known = _published_gemma3(layers, width) if arch == 'gemma3' else None
  if arch == 'gemma3' and own.get('rope.scaling.type') != 'none':
    factor = known.rope_scale_global if known else 1.0
    factor = own.get('rope.scaling.factor', factor)
    values['rope_scaling'] = {'rope_type': 'linear', 'factor': factor}
  none = [key for key, _ in caps if known or not values.get(key)]  # Or 0.
  return values | dict.fromkeys(none)


def _published_gemma3(layers, width):
  for name, size in sizes.SIZES.items():
    same = (size.num_layers, size.embed_dim) == (layers, width)
    if same and name.startswith('gemma3'):  # Of the others some are as large.
      return size
  return None


def _check_meaning(arch, own, fields):
  """Refuses keys that stand for another function than mt/gemma/model.py's."""
  pattern, head_dim = _PATTERNS[arch], fields.number('head_dim', 256)
  local = [
    pattern[i % len(pattern)] == 'L'
    for i in range(fields.number('num_hidden_layers'))
  ]

  def same_as(key):
    return (own[key],) if key in own else ()

  allowed = {
    # Ollama's names for these.
    'rope.global.freq_base': same_as('rope.freq_base'),
    'rope.local.freq_base': same_as('rope.freq_base_swa'),
    'rope.scaling.type': ('linear', 'none'),
    'rope.dimension_count': (head_dim,),
    'attention.value_length': (head_dim,),
    'attention.sliding_window_pattern': (len(pattern), local),
    'attn_logit_softcapping': (0.0,) if arch != 'gemma2' else (),
    'final_logit_softcapping': (0.0,) if arch == 'gemma' else (),
    # Of all layers, where the model has but one kind of RoPE.
    'rope.scaling.factor': (1.0,) if arch != 'gemma3' else (),
    'rope.scale_linear': (1.0,),
  }
  for key, values in allowed.items():
    if values and own.get(key, values[0]) not in values:
      raise errors.UserError(
        f'{fields.path}: {arch}.{key} is {str(own[key])[:60]}, {values[0]} '
        'expected; mt/gemma/model.py computes nothing else.'
      )


def _gemma4(file, fields):
  """What a header of Gemma 4 has for each layer, or says in another way."""
  values, layers = fields.values, fields.number('num_hidden_layers')
  local = values.get('layer_types')
  if not isinstance(local, list) or len(local) != layers or all(local):
    raise fields.bad('layer_types', f'{layers} of them, one false at least,')
  own = local.index(False)  # The first global layer.
  sharing = values.get('num_kv_shared_layers')
  sharing = fields.number('num_kv_shared_layers') if sharing else 0

  def each(key):  # Its value in each layer; one number is of all.
    x = values.get(key)
    return x if isinstance(x, list) else [x] * layers

  kv_heads, hidden = each('num_key_value_heads'), each('intermediate_size')
  by_kind = [kv_heads[0 if x else own] for x in local]
  by_part = [hidden[-1 if n >= layers - sharing else 0] for n in range(layers)]
  if kv_heads != by_kind or hidden != by_part:
    raise fields.bad('intermediate_size', 'one number for each kind of layer')
  turned = _turned_part(file, fields.number('global_head_dim'))
  return values | {
    'num_key_value_heads': kv_heads[0],
    'num_global_key_value_heads': (
      None if kv_heads[own] == kv_heads[0] else kv_heads[own]
    ),
    'intermediate_size': hidden[0],
    'use_double_wide_mlp': hidden[-1] != hidden[0],
    'layer_types': [
      'sliding_attention' if x else 'full_attention' for x in local
    ],
    'vocab_size_per_layer_input': values['vocab_size'],
    'attention_k_eq_v': f'blk.{own}.attn_v.weight' not in file.tensors,
    'rope_parameters': {
      'sliding_attention': {
        'rope_theta': values.get('rope_local_base_freq', 1e4)
      },
      'full_attention': {
        'rope_type': 'proportional',
        'partial_rotary_factor': turned,
        'rope_theta': values.get('rope_theta', 1e6),
      },
    },
  }


def _turned_part(file, head_dim):
  """Of a global head; what divides the other rates leaves nothing of them."""
  name = 'rope_freqs.weight'
  factors = np.zeros(0)
  if name in file.tensors:
    factors = gguf_file.read_tensor(file, name)
  turned = int(np.sum(factors == 1.0))
  if (
    factors.shape != (head_dim // 2,)
    or not turned
    or np.any(factors[:turned] != 1)
    or not np.all(factors[turned:] > 1e20)
  ):
    raise errors.UserError(
      f'{file.path}: {name} does not say which part of a head RoPE turns; '
      'convert the model again with a current llama.cpp.'
    )
  return turned / len(factors)


def tensor_name(row: parameters.Parameter, layer: int | None) -> str:
  """Of a row of the table, in that layer of the model."""
  return f'{"" if layer is None else f"blk.{layer}."}{row.gguf}.weight'


def open_weights(path: pathlib.Path) -> load.Weights:
  """Reads the header of a file; no tensor yet, but for RoPE's of Gemma 4.

  Raises:
    errors.UserError: no GGUF file, damaged, no Gemma, or its tensors are not
      those that the header promises.
  """
  file = gguf_file.open_gguf(path)
  cfg = read_config(file)
  template = file.fields.get('tokenizer.chat_template')
  return load.Weights(
    path,
    cfg,
    functools.partial(load.places, tensor_name),
    {
      name: tensor.shape
      for name, tensor in file.tensors.items()
      if not name.startswith(_OTHER_PARTS)
    },
    functools.partial(_get, file, cfg),
    lambda: read_tokenizer(file),
    [_HEAD] if _HEAD in file.tensors else [],
    quantised=file.tensors[_EMBEDDING].kind not in gguf_file.FLOATS,
    chat_template=template if isinstance(template, str) else '',
  )


def _get(file, cfg, place, *rows):
  """A tensor in our orientation, or rows of it."""
  x = gguf_file.read_tensor(file, place.name, *rows)
  if place.row.transposed:
    return x.T
  return x - cfg.norm_offset if place.row.norm else x


def read_tokenizer(file: gguf_file.GGUFFile) -> tokenizer.Tokenizer:
  """Rebuilds Gemma's SentencePiece model from a GGUF vocabulary.

  GGUF keeps pieces, types, scores or (of Gemma 4) merges, and of the trainer's
  settings only what llama.cpp needs; see tokenizer.set_gemma_spec for others.

  Raises:
    errors.UserError: the vocabulary is missing, damaged, or of another kind.
  """
  if file.fields.get('tokenizer.ggml.add_space_prefix') is True:
    raise errors.UserError(
      f'{file.path}: tokenizer.ggml.add_space_prefix is true, false expected; '
      'no Gemma puts a space before a text: convert the model again.'
    )
  kind, pieces, types, scores, merges = (
    file.fields.get(f'tokenizer.ggml.{key}')
    for key in ('model', 'tokens', 'token_type', 'scores', 'merges')
  )
  shape = (len(pieces),) if isinstance(pieces, list) else None
  whole = shape is not None and getattr(types, 'shape', None) == shape
  # Ollama calls that of Gemma 4 llama, with ids in place of scores.
  of_4 = 'gemma4' in (str(kind), str(file.fields.get('tokenizer.ggml.pre')))
  if whole and of_4 and isinstance(merges, list):
    return _of_merges(file, _texts(pieces), types, _texts(merges))
  scored = str(kind) == 'llama' and getattr(scores, 'shape', None) == shape
  if not whole or not scored:
    raise errors.UserError(
      f'{file.path}: tokenizer kind {kind!r} found, "llama" (pieces with a '
      'score and a type each) or "gemma4" (with a type each, and merges) '
      'expected; set weights.tokenizer to a tokenizer.model or tokenizer.json.'
    )
  n = len(pieces)
  while n and types[n - 1] == tokenizer.UNUSED:
    if not _NO_PIECE.fullmatch(pieces[n - 1]):
      break
    n -= 1  # A row without a piece.
  texts, ids = _texts(pieces[:n]), _roles(file, n)
  found = zip(texts, scores[:n].tolist(), types[:n].tolist(), strict=True)
  rows = (
    (text, score, _piece_type(text, type_, i, ids))
    for i, (text, score, type_) in enumerate(found)
  )
  return hf_tokenizer.assemble(file.path, rows, ids)


def _texts(pieces):
  # What is no UTF-8 stays none, and is refused where SentencePiece wants it.
  return [piece.decode(errors='surrogateescape') for piece in pieces]


def _piece_type(text, type_, i, ids):
  """SentencePiece's type of piece i, whose type is `type_` in llama.cpp.

  llama.cpp calls <unused…> and <start_of_turn> control tokens; Gemma's own
  model has them as user-defined symbols. Runs of spaces, user-defined as well,
  are written as plain spaces here and with U+2581 there.
  """
  if i == ids[-1]:
    return tokenizer.UNKNOWN
  if tokenizer.is_control(text, i in ids):
    return tokenizer.CONTROL
  special = type_ in (tokenizer.CONTROL, tokenizer.UNKNOWN)
  return tokenizer.USER_DEFINED if special else type_


def _roles(file, n):
  """Ids of pad, EOS, BOS and the unknown piece."""
  ids = [
    file.fields.get(f'tokenizer.ggml.{name}_token_id', default)
    for default, name in enumerate(('padding', 'eos', 'bos', 'unknown'))
  ]
  if not all(isinstance(i, int) and 0 <= i < n for i in ids):
    raise errors.UserError(
      f'{file.path}: pad, EOS, BOS, unknown ids are {str(ids)[:80]}, numbers '
      f'below {n:,} expected; the file is damaged.'
    )
  return ids


def _of_merges(file, pieces, types, merges):
  """Gemma 4 has merges in place of scores, as a tokenizer.json has."""
  ranks = {}
  for rank, merge in enumerate(merges):
    ranks.setdefault(merge.replace(' ', '', 1), rank)
  kinds = (tokenizer.CONTROL, tokenizer.USER_DEFINED)
  symbols = set(np.flatnonzero(np.isin(types, kinds)))
  ids = zip(hf_tokenizer.ROLES, _roles(file, len(pieces)), strict=True)
  roles = {role: pieces[i] for role, i in ids}
  return hf_tokenizer.build(file.path, pieces, symbols, ranks, roles)
