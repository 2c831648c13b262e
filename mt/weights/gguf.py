"""GGUF -> the model's shape, its parameters and its tokenizer.

Architectures gemma, gemma2 and gemma3, named as llama.cpp names them; see
mt/weights/gguf_file.py for the container. Matrices are stored as [out, in], and
Gemma's norm weights with 1 added.
"""

import chex
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import gguf_file
from mt.weights import load

_PATTERNS = {'gemma': 'G', 'gemma2': 'LG', 'gemma3': 'LLLLLG'}
_MAX_LAYERS = 1024  # Far above any real model.
# Token types of llama.cpp, which are SentencePiece's piece types.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = '\u2581'  # SentencePiece's visible stand-in for a space.
_AT_ONCE = 2**23  # Weights of the embedding that are read in one go.


def read_config(file: gguf_file.GGUFFile) -> sizes.ModelConfig:
  """The model's shape out of a GGUF header.

  Raises:
    errors.UserError: another architecture, or a header without a needed key.
  """
  arch = file.fields.get('general.architecture')
  # str(): a damaged header may hold an array, which cannot be looked up.
  if str(arch) not in _PATTERNS:
    raise errors.UserError(
      f'{file.path}: architecture {arch!r} found, one of '
      f'{", ".join(_PATTERNS)} expected; this project trains Gemma only.'
    )

  def get(key, default=None, kind=int, high=2**31):
    value = file.fields.get(f'{arch}.{key}', default)
    # NaN fails the comparison too.
    if not isinstance(value, int | float) or not 1 <= value < high:
      raise errors.UserError(
        f'{file.path}: {arch}.{key} is {str(value)[:40]}, a number from 1 to '
        f'{high:,} expected; the GGUF header is damaged or incomplete: convert '
        'the model again.'
      )
    return kind(value)

  if 'token_embd.weight' not in file.tensors:
    raise errors.UserError(
      f'{file.path}: no tensor token_embd.weight; the file is not a complete '
      'Gemma.'
    )
  second, third = arch == 'gemma2', arch == 'gemma3'
  layers, width = get('block_count', high=_MAX_LAYERS), get('embedding_length')
  heads = get('attention.head_count')
  head_dim = query_dim = get('attention.key_length', 256)
  if (arch, layers) in (('gemma2', 46), ('gemma3', 62)):  # The two 27B.
    query_dim = width / heads
  base = get('rope.freq_base', 1e6 if third else 1e4, float)
  cap, final_cap = 'attn_logit_softcapping', 'final_logit_softcapping'
  return sizes.ModelConfig(
    vocab_size=file.tensors['token_embd.weight'].shape[0],
    num_layers=layers,
    embed_dim=width,
    hidden_dim=get('feed_forward_length'),
    num_heads=heads,
    num_kv_heads=get('attention.head_count_kv', heads),
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention=_PATTERNS[arch],
    window=get('attention.sliding_window') if second or third else None,
    rope_base_local=get('rope.freq_base_swa', 1e4, float) if third else base,
    rope_base_global=base,
    rope_scale_global=get('rope.scaling.factor', 1.0, float),
    attn_softcap=get(cap, 50.0, float) if second else None,
    final_softcap=get(final_cap, 30.0, float) if second else None,
    qk_norm=third,
    post_norms=second or third,
  )


def read_params(
  file: gguf_file.GGUFFile, cfg: sizes.ModelConfig, key: chex.PRNGKey
) -> parameters.Params:
  """The float32 parameters of a GGUF file, read tensor by tensor.

  Args:
    file: opened.
    cfg: its shape.
    key: of the initial values of what a fork has added and the file lacks.

  Raises:
    errors.UserError: a tensor is missing, too much, or its shape is not the
      model's.
  """

  def name(row, layer):
    return f'{"" if layer is None else f"blk.{layer}."}{row.gguf}.weight'

  def get(place):
    if place.row.path == 'embedding':
      # The largest of all, in parts: no second one in float32.
      rows = max(1, _AT_ONCE // cfg.embed_dim)
      return (
        gguf_file.read_tensor(file, place.name, i, i + rows)
        for i in range(0, cfg.vocab_size, rows)
      )
    x = gguf_file.read_tensor(file, place.name)
    x = x - 1.0 if place.row.norm else x
    return x.T if place.row.transposed else x

  found = {
    n: t.shape
    for n, t in file.tensors.items()
    if n.startswith(('blk.', 'token_embd', 'output'))
  }
  return load.read(cfg, file.path, load.places(cfg, name), found, get, key)


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
  pad, eos, bos, unk = ids = [
    file.fields.get(f'tokenizer.ggml.{name}_token_id', default)
    for default, name in enumerate(('padding', 'eos', 'bos', 'unknown'))
  ]
  if not all(isinstance(i, int) and 0 <= i < len(pieces) for i in ids):
    raise errors.UserError(
      f'{file.path}: pad, EOS, BOS, unknown ids are {str(ids)[:80]}, numbers '
      f'below {len(pieces):,} expected; the file is damaged.'
    )
  special = {pad: _CONTROL, eos: _CONTROL, bos: _CONTROL, unk: _UNKNOWN}
  proto = sp_pb2.ModelProto()
  rows = zip(pieces, scores.tolist(), types.tolist(), strict=True)
  for i, (piece, score, type_) in enumerate(rows):
    # llama.cpp calls <unused…> and <start_of_turn> control tokens; Gemma's own
    # model has them as user-defined symbols. Runs of spaces, user-defined as
    # well, are written as plain spaces here and with U+2581 there.
    type_ = _USER_DEFINED if type_ in (_CONTROL, _UNKNOWN) else type_
    type_ = special.get(i, type_)
    try:
      text = piece.decode()
      if type_ == _USER_DEFINED:
        text = text.replace(' ', _SPACE)
      proto.pieces.add(piece=text, score=score, type=type_)
    except ValueError as e:  # UnicodeDecodeError is one.
      raise errors.UserError(
        f'{file.path}: piece {i} is {piece[:40]!r} of type {type_}, UTF-8 and '
        'a SentencePiece type expected; the file is damaged.'
      ) from e
  tokenizer.set_gemma_spec(proto, ids)
  return tokenizer.from_proto(proto.SerializeToString(), str(file.path))
