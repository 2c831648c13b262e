"""GGUF -> the model's shape, its parameters and its tokenizer.

Architectures gemma, gemma2, gemma3 and gemma4, named as llama.cpp names them;
see mt/weights/gguf_file.py for the container. Matrices are stored as [out, in],
and norm weights up to Gemma 3 with 1 added. Source: conversion/gemma.py of
llama.cpp.
"""

import functools
import re

import chex
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import gguf_file
from mt.weights import hf_config
from mt.weights import hf_tokenizer
from mt.weights import kept
from mt.weights import load
from mt.weights import mapped

_PATTERNS = {'gemma': 'G', 'gemma2': 'LG', 'gemma3': 'LLLLLG', 'gemma4': ''}
_MAX_LAYERS = 1024  # Far above any real model.
# Tensors of other parts: of vision and audio, as Ollama has them in the same
# file, and RoPE's factors, which no graph of these architectures reads.
_OTHER_PARTS = ('v.', 'a.', 'mm.', 'rope_freqs.')
_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'
_CAP, _FINAL_CAP = 'attn_logit_softcapping', 'final_logit_softcapping'
_NO_PIECE = re.compile(rb'\[PAD\d+\]')  # Of llama.cpp's converter.
_SPACE = '\u2581'  # SentencePiece's visible stand-in for a space.
_AT_ONCE = 2**23  # Weights of the embedding that are read in one go.


def read_config(file: gguf_file.GGUFFile) -> sizes.ModelConfig:
  """The model's shape out of a GGUF header.

  Files of Gemma 3 as Ollama writes them lack the factor of RoPE, and have a
  soft cap that the model was not trained with: for the published shapes both
  are those of mt/gemma/sizes.py.

  Raises:
    errors.UserError: another architecture, a header without a needed key, or
      one that asks for what mt/gemma/model.py does not compute.
  """
  arch = file.fields.get('general.architecture')
  get = functools.partial(_number, file, arch)
  other = 'moe' if get('expert_count', 0, low=0) else str(arch)
  if other in hf_config.OTHERS:
    raise errors.UserError(f'{file.path}: {hf_config.OTHERS[other]}')
  # str(): a damaged header may hold an array, which cannot be looked up.
  if str(arch) not in _PATTERNS:
    raise errors.UserError(
      f'{file.path}: architecture {arch!r} found, one of '
      f'{", ".join(_PATTERNS)} expected; this project trains Gemma only.'
    )
  if _EMBEDDING not in file.tensors:
    raise errors.UserError(
      f'{file.path}: no tensor {_EMBEDDING}; the file is not a complete Gemma.'
    )
  if arch == 'gemma4':
    return _gemma4_config(file, get)
  second, third = arch == 'gemma2', arch == 'gemma3'
  layers, width = get('block_count', high=_MAX_LAYERS), get('embedding_length')
  heads = get('attention.head_count')
  head_dim = query_dim = get('attention.key_length', 256)
  if (arch, layers) in (('gemma2', 46), ('gemma3', 62)):  # The two 27B.
    query_dim = width / heads
  _check_meaning(file, arch, layers, head_dim)
  base = get('rope.global.freq_base', 1e6 if third else 1e4, float)
  base = get('rope.freq_base', base, float)
  local = get('rope.local.freq_base', 1e4, float)
  known = _published_gemma3(layers, width) if third else None
  factor = known.rope_scale_global if known else 1.0
  factor = get('rope.scaling.factor', factor, float)
  if file.fields.get(f'{arch}.rope.scaling.type') == 'none':
    factor = 1.0
  final_cap = str(file.fields.get(f'{arch}.{_FINAL_CAP}', 0.0)) != '0.0'
  return sizes.ModelConfig(
    vocab_size=file.tensors[_EMBEDDING].shape[0],
    num_layers=layers,
    embed_dim=width,
    hidden_dim=get('feed_forward_length'),
    num_heads=heads,
    num_kv_heads=get('attention.head_count_kv', heads),
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention=_PATTERNS[arch],
    window=get('attention.sliding_window') if second or third else None,
    rope_base_local=get('rope.freq_base_swa', local, float) if third else base,
    rope_base_global=base,
    rope_scale_global=factor,
    attn_softcap=get(_CAP, 50.0, float) if second else None,
    final_softcap=(
      get(_FINAL_CAP, 30.0, float)
      if second or (final_cap and not known)
      else None
    ),
    qk_norm=third,
    post_norms=second or third,
  )


def _number(file, arch, key, default=None, kind=int, low=1, high=2**31):
  value = file.fields.get(f'{arch}.{key}', default)
  # NaN fails the comparison too.
  if type(value) not in (int, kind) or not low <= value < high:
    whole = 'whole ' if kind is int else ''
    raise errors.UserError(
      f'{file.path}: {arch}.{key} is {str(value)[:40]}, a {whole}number from '
      f'{low} to {high:,} expected; the GGUF header is damaged or incomplete: '
      'convert the model again.'
    )
  return kind(value)


def _published_gemma3(layers, width):
  for name, size in sizes.SIZES.items():
    same = (size.num_layers, size.embed_dim) == (layers, width)
    if same and name.startswith('gemma3'):  # Of the others some are as large.
      return size
  return None


def _check_meaning(file, arch, layers, head_dim):
  """Refuses keys that stand for another function than mt/gemma/model.py's."""
  pattern = _PATTERNS[arch]
  local = [pattern[i % len(pattern)] == 'L' for i in range(layers)]
  third = arch == 'gemma3'

  def same_as(key):  # An array is none; it is refused where it is read.
    value = file.fields.get(f'{arch}.{key}')
    return (value,) if isinstance(value, int | float) else None

  allowed = {
    # Ollama's names for these.
    'rope.global.freq_base': same_as('rope.freq_base'),
    'rope.local.freq_base': same_as('rope.freq_base_swa'),
    'rope.scaling.type': ('linear', 'none'),
    'rope.dimension_count': (head_dim,),
    'attention.value_length': (head_dim,),
    'attention.layer_norm_rms_epsilon': (1e-6, float(np.float32(1e-6))),
    'attention.sliding_window_pattern': (len(pattern), local),
    _CAP: (0.0,) if arch != 'gemma2' else None,
    _FINAL_CAP: (0.0,) if arch == 'gemma' else None,
    # Of all layers, where the model has but one kind of RoPE.
    'rope.scaling.factor': None if third else (1.0,),
    'rope.scale_linear': (1.0,),
  }
  for key, values in allowed.items():
    found = file.fields.get(f'{arch}.{key}')
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if found is not None and values and found not in values:
      raise errors.UserError(
        f'{file.path}: {arch}.{key} is {str(found)[:60]}, {values[0]} '
        'expected; mt/gemma/model.py computes nothing else.'
      )


def _gemma4_config(file, get):
  """The shape of a Gemma 4, whose header has some numbers for each layer."""
  layers, fields = get('block_count', high=_MAX_LAYERS), file.fields

  def bad(key, expected):
    value = str(fields.get(f'gemma4.{key}'))[:60]
    return errors.UserError(
      f'{file.path}: gemma4.{key} is {value}, {expected} expected; the GGUF '
      'header is damaged or of a model not known here.'
    )

  def each(key):  # Its value in each layer; one number is of all.
    value = fields.get(f'gemma4.{key}')
    if not isinstance(value, np.ndarray):
      return [get(key)] * layers
    if value.dtype.kind not in 'iu' or len(value) != layers or min(value) < 1:
      raise bad(key, f'{layers} whole numbers')
    return value.tolist()

  local = fields.get('gemma4.attention.sliding_window_pattern')
  kinds = ''.join('GL'[bool(x)] for x in np.ravel(local))
  period = kinds.find('G') + 1
  sharing = get('attention.shared_kv_layers', 0, low=0)
  if (
    period < 2
    or kinds != (kinds[:period] * layers)[:layers]
    or layers % period
    or sharing % period
    or sharing >= layers
  ):
    raise bad('attention.sliding_window_pattern', 'whole periods of layers')
  kv_heads, hidden = (
    each('attention.head_count_kv'),
    each('feed_forward_length'),
  )
  own, last = period - 1, layers - 1
  by_kind = [kv_heads[own if k == 'G' else 0] for k in kinds]
  by_part = [
    hidden[last if n >= layers - sharing else 0] for n in range(layers)
  ]
  if kv_heads != by_kind or hidden != by_part:
    raise bad('feed_forward_length', 'one number for each kind of layer')
  width = get('embedding_length_per_layer_input', 0, low=0)
  head_dim = get('attention.key_length')
  return sizes.ModelConfig(
    vocab_size=file.tensors[_EMBEDDING].shape[0],
    num_layers=layers,
    embed_dim=get('embedding_length'),
    hidden_dim=hidden[0],
    num_heads=get('attention.head_count'),
    num_kv_heads=kv_heads[0],
    head_dim=get('attention.key_length_swa'),
    query_scale=1.0,
    attention=kinds[:period],
    window=get('attention.sliding_window'),
    rope_base_local=get('rope.freq_base_swa', 1e4, float),
    rope_base_global=get('rope.freq_base', 1e6, float),
    final_softcap=(
      get(_FINAL_CAP, None, float) if f'gemma4.{_FINAL_CAP}' in fields else None
    ),
    qk_norm=True,
    post_norms=True,
    norm_offset=0.0,
    value_norm=True,
    layer_scale=True,
    global_head_dim=head_dim,
    global_kv_heads=None if kv_heads[own] == kv_heads[0] else kv_heads[own],
    keys_are_values=f'blk.{own}.attn_v.weight' not in file.tensors,
    rope_part_global=_turned_part(file, head_dim),
    sharing_layers=sharing,
    sharing_hidden_dim=None if hidden[last] == hidden[0] else hidden[last],
    layer_input_dim=width,
  )


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
    or not (np.all(factors[:turned] == 1) and np.all(factors[turned:] > 1e20))
  ):
    raise errors.UserError(
      f'{file.path}: {name} does not say which part of a head RoPE turns; '
      'convert the model again with a current llama.cpp.'
    )
  return turned / len(factors)


def tensor_name(row: parameters.Parameter, layer: int | None) -> str:
  """Of a row of the table, in that layer of the model."""
  return f'{"" if layer is None else f"blk.{layer}."}{row.gguf}.weight'


def read_params(
  file: gguf_file.GGUFFile,
  cfg: sizes.ModelConfig,
  key: chex.PRNGKey,
  keep: kept.Keep = kept.FLOAT32,
) -> tuple[parameters.Params, int]:
  """The parameters of a GGUF file, read tensor by tensor.

  Args:
    file: opened.
    cfg: its shape.
    key: of the initial values of what a fork has added and the file lacks.
    keep: their format and place.

  Returns:
    The parameters, and the CRC-32 of all of them as float32.

  Raises:
    errors.UserError: a tensor is missing, too much, or its shape is not the
      model's.
  """

  def get(place):
    if not (place.row.norm or place.row.transposed):
      # Embeddings, the largest of all, in parts: no second one in float32.
      rows = max(1, _AT_ONCE // place.shape[1])
      return (
        gguf_file.read_tensor(file, place.name, i, i + rows)
        for i in range(0, cfg.vocab_size, rows)
      )
    x = gguf_file.read_tensor(file, place.name)
    x = x - cfg.norm_offset if place.row.norm else x
    return x.T if place.row.transposed else x

  # Files have what layers that share keys and values never read.
  unread = tuple(
    f'blk.{n}.attn_{x}'
    for n in range(cfg.num_layers - cfg.sharing_layers, cfg.num_layers)
    for x in ('k', 'v')
  )
  found = {
    n: t.shape
    for n, t in file.tensors.items()
    if not n.startswith((*_OTHER_PARTS, *unread))
  }
  if _HEAD in found:
    read = functools.partial(gguf_file.read_tensor, file)
    load.check_head(file.path, found, _HEAD, _EMBEDDING, read)
    del found[_HEAD]
  wanted = load.places(cfg, tensor_name)
  read = functools.partial(load.read, cfg, file.path, wanted, found, get, key)
  quantised = file.tensors[_EMBEDDING].kind not in gguf_file.FLOATS
  if quantised and found.keys() >= {p.name for p in wanted}:
    return mapped.read(file.path, cfg, keep, read)
  return read(keep)


def read_tokenizer(file: gguf_file.GGUFFile) -> tokenizer.Tokenizer:
  """Rebuilds Gemma's SentencePiece model from a GGUF vocabulary.

  GGUF keeps pieces, scores and types, and of the trainer's settings only what
  llama.cpp needs; see tokenizer.set_gemma_spec for the others.

  Raises:
    errors.UserError: the vocabulary is missing, damaged, or not of
      SentencePiece's kind.
  """
  kind, pieces, scores, types = (
    file.fields.get(f'tokenizer.ggml.{key}')
    for key in ('model', 'tokens', 'scores', 'token_type')
  )
  # Ollama calls that of Gemma 4 llama, with ids in place of scores.
  if 'gemma4' in (str(kind), str(file.fields.get('tokenizer.ggml.pre'))):
    return _gemma4_tokenizer(file, pieces, types)
  if (
    str(kind) != 'llama'
    or not isinstance(pieces, list)
    or getattr(scores, 'dtype', None) != np.float32
    or getattr(types, 'dtype', None) != np.int32
    or not len(pieces) == len(scores) == len(types)
  ):
    raise errors.UserError(
      f'{file.path}: tokenizer kind {kind!r} found, "llama" (SentencePiece, '
      'each piece with a score and a type) expected; set weights.tokenizer to '
      'a tokenizer.model.'
    )
  n = len(pieces)
  while (
    n
    and types[n - 1] == tokenizer.UNUSED
    and _NO_PIECE.fullmatch(pieces[n - 1])
  ):
    n -= 1  # A row without a piece.
  ids = _roles(file, n)
  proto = sp_pb2.ModelProto()
  rows = zip(pieces[:n], scores[:n].tolist(), types[:n].tolist(), strict=True)
  for i, (piece, score, type_) in enumerate(rows):
    try:
      text = piece.decode()
      type_ = _piece_type(text, type_, i, ids)
      if type_ == tokenizer.USER_DEFINED:
        text = text.replace(' ', _SPACE)
      proto.pieces.add(piece=text, score=score, type=type_)
    except ValueError as e:  # UnicodeDecodeError is one.
      raise errors.UserError(
        f'{file.path}: piece {i} is {piece[:40]!r} of type {type_}, UTF-8 and '
        'a SentencePiece type expected; the file is damaged.'
      ) from e
  tokenizer.set_gemma_spec(proto, ids)
  return tokenizer.from_proto(proto.SerializeToString(), str(file.path))


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


def _gemma4_tokenizer(file, pieces, types):
  """Gemma 4 has merges in place of scores, as a tokenizer.json has."""
  merges = file.fields.get('tokenizer.ggml.merges')
  if (
    not isinstance(pieces, list)
    or not isinstance(merges, list)
    or getattr(types, 'shape', None) != (len(pieces),)
  ):
    raise errors.UserError(
      f'{file.path}: pieces with a type each, and merges, expected; set '
      'weights.tokenizer to a tokenizer.json.'
    )
  pieces = [p.decode(errors='replace') for p in pieces]
  ranks = {}
  for rank, merge in enumerate(merges):
    ranks.setdefault(merge.decode(errors='replace').replace(' ', '', 1), rank)
  kinds = (tokenizer.CONTROL, tokenizer.USER_DEFINED)
  symbols = set(np.flatnonzero(np.isin(types, kinds)))
  ids = zip(hf_tokenizer.ROLES, _roles(file, len(pieces)), strict=True)
  roles = {role: pieces[i] for role, i in ids}
  return hf_tokenizer.build(file.path, pieces, symbols, ranks, roles)
