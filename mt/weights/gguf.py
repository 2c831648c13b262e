"""GGUF -> the model's shape and its parameters.

Architectures gemma, gemma2 and gemma3, named as llama.cpp names them; see
mt/weights/gguf_file.py for the container.
"""

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import model
from mt.gemma import sizes
from mt.weights import gguf_file
from mt.weights import load

_OUTER_NAMES = {
  'embedding': 'token_embd.weight',
  'final_norm': 'output_norm.weight',
}
_GGUF_NAMES = {
  'attn_norm': 'attn_norm',
  'q': 'attn_q',
  'k': 'attn_k',
  'v': 'attn_v',
  'o': 'attn_output',
  'ffw_norm': 'ffn_norm',
  'gate': 'ffn_gate',
  'up': 'ffn_up',
  'down': 'ffn_down',
  'post_attn_norm': 'post_attention_norm',
  'post_ffw_norm': 'post_ffw_norm',
  'q_norm': 'attn_q_norm',
  'k_norm': 'attn_k_norm',
}
# Token types of llama.cpp, which are SentencePiece's piece types.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = '\u2581'  # SentencePiece's visible stand-in for a space.
_AT_ONCE = 2**23  # Weights of the embedding that are read in one go.


def read_config(file: gguf_file.GGUFFile) -> sizes.ModelConfig:
  """The model's shape out of a GGUF header.

  Raises:
    errors.UserError: another architecture, or a header without a needed key.
  """
  f = file.fields
  arch = f.get('general.architecture')
  # str(): a damaged header may hold an array, which cannot be compared.
  if str(arch) not in ('gemma', 'gemma2', 'gemma3'):
    raise errors.UserError(
      f'{file.path}: architecture {arch!r} found, gemma, gemma2 or gemma3 '
      'expected; this project trains Gemma only.'
    )

  def get(key, default=None):
    value = f.get(f'{arch}.{key}', default)
    # NaN fails the comparison too.
    if not isinstance(value, int | float) or not 1 <= value < 2**31:
      raise errors.UserError(
        f'{file.path}: {arch}.{key} is {str(value)[:40]}, a number from 1 up '
        'expected; the GGUF header is incomplete: convert the model again.'
      )
    return value

  head_dim = int(get('attention.key_length', 256))
  heads = int(get('attention.head_count'))
  width, layers = int(get('embedding_length')), int(get('block_count'))
  if 'token_embd.weight' not in file.tensors:
    raise errors.UserError(
      f'{file.path}: no tensor token_embd.weight; the file is not a complete '
      'Gemma.'
    )
  query_dim = head_dim
  if (arch, layers) in (('gemma2', 46), ('gemma3', 62)):  # The two 27B.
    query_dim = max(1, width // heads)  # 0 in a damaged header alone.
  modern = arch != 'gemma'
  base = float(get('rope.freq_base', 1e6 if arch == 'gemma3' else 1e4))
  local = float(get('rope.freq_base_swa', 1e4)) if arch == 'gemma3' else base
  return sizes.ModelConfig(
    vocab_size=file.tensors['token_embd.weight'].shape[0],
    num_layers=layers,
    embed_dim=width,
    hidden_dim=int(get('feed_forward_length')),
    num_heads=heads,
    num_kv_heads=int(get('attention.head_count_kv', heads)),
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention={'gemma': 'G', 'gemma2': 'LG', 'gemma3': 'LLLLLG'}[arch],
    window=int(get('attention.sliding_window')) if modern else None,
    rope_base_local=local,
    rope_base_global=base,
    rope_scale_global=float(get('rope.scaling.factor', 1.0)),
    attn_softcap=(
      float(get('attn_logit_softcapping', 50.0)) if arch == 'gemma2' else None
    ),
    final_softcap=(
      float(get('final_logit_softcapping', 30.0)) if arch == 'gemma2' else None
    ),
    qk_norm=arch == 'gemma3',
    post_norms=modern,
  )


def read_params(
  file: gguf_file.GGUFFile, cfg: sizes.ModelConfig
) -> model.Params:
  """The float32 parameters of a GGUF file, read tensor by tensor.

  GGUF stores matrices as [out, in] and Gemma's norm weights with 1 added.

  Raises:
    errors.UserError: a tensor is missing or its shape is not the model's.
  """

  def turned(name, shape):
    return len(shape) == 2 and name != 'token_embd.weight'

  def check(name, shape):
    if name not in file.tensors:
      raise errors.UserError(
        f'{file.path}: no tensor {name!r}; the file is not a complete Gemma.'
      )
    found = file.tensors[name].shape
    found = found[::-1] if turned(name, shape) else found
    if found != shape:
      raise errors.UserError(
        f'{file.path}: tensor {name} gives {found}, the header promises '
        f'{shape}; the file is damaged or of a model not known here.'
      )

  def read(name, shape):
    x = gguf_file.read_tensor(file, name)
    x = x - 1.0 if 'norm' in name else x
    return x.T if turned(name, shape) else x

  shapes = model.param_shapes(cfg)
  # All shapes first: a damaged header must not make us allocate terabytes.
  for ours, name in _OUTER_NAMES.items():
    check(name, shapes[ours])
  known = set()
  for i in range(cfg.num_layers):
    for ours, shape in shapes['layers'].items():
      name = f'blk.{i}.{_GGUF_NAMES[ours]}.weight'
      check(name, shape[1:])
      known.add(name)
  for name in file.tensors:
    # A bias or a scale that we do not read would be another function.
    if name.startswith('blk.') and name not in known:
      raise errors.UserError(
        f'{file.path}: tensor {name!r} is no part of a Gemma of '
        f'{cfg.num_layers} layers; the file is of a model not known here.'
      )

  def leaf(ours, layer, shape):
    if layer is not None:
      return read(f'blk.{layer}.{_GGUF_NAMES[ours]}.weight', shape)
    name = _OUTER_NAMES[ours]
    if len(shape) == 1:
      return read(name, shape)
    # The largest of all, in parts: no second one in float32.
    rows = max(1, _AT_ONCE // shape[1])
    starts = range(0, shape[0], rows)
    return (gguf_file.read_tensor(file, name, i, i + rows) for i in starts)

  return load.stack(cfg, leaf)


def read_tokenizer(file: gguf_file.GGUFFile) -> tokenizer.Tokenizer:
  """Rebuilds Gemma's SentencePiece model from a GGUF vocabulary.

  GGUF keeps pieces, scores and types, and of the trainer's settings only what
  llama.cpp needs; see tokenizer.set_gemma_spec for the others.

  Raises:
    errors.UserError: the vocabulary is missing or not of SentencePiece's kind.
  """
  f = file.fields
  kind = f.get('tokenizer.ggml.model')
  pieces = f.get('tokenizer.ggml.tokens')
  scores = f.get('tokenizer.ggml.scores')
  types = f.get('tokenizer.ggml.token_type')
  if (
    str(kind) != 'llama'
    or not isinstance(pieces, list)
    or getattr(scores, 'dtype', None) != np.float32
    or getattr(types, 'dtype', None) != np.int32
  ):
    raise errors.UserError(
      f'{file.path}: tokenizer kind {kind!r} found, "llama" (SentencePiece '
      'with scores) expected; set weights.tokenizer to a tokenizer.model.'
    )
  if not len(pieces) == len(scores) == len(types):
    raise errors.UserError(
      f'{file.path}: {len(pieces):,} pieces, {len(scores):,} scores and '
      f'{len(types):,} types do not match; the file is damaged.'
    )
  pad, eos, bos, unk = ids = [
    f.get(f'tokenizer.ggml.{name}_token_id', default)
    for default, name in enumerate(('padding', 'eos', 'bos', 'unknown'))
  ]
  if not all(isinstance(i, int) and 0 <= i < len(pieces) for i in ids):
    raise errors.UserError(
      f'{file.path}: pad, EOS, BOS, unknown ids are {str(ids)[:80]}, numbers '
      f'below {len(pieces):,} expected; the file is damaged.'
    )
  special = {pad: _CONTROL, eos: _CONTROL, bos: _CONTROL, unk: _UNKNOWN}
  m = sp_pb2.ModelProto()
  for i, (piece, score, t) in enumerate(
    zip(pieces, scores.tolist(), types.tolist(), strict=True)
  ):
    # llama.cpp calls <unused…> and <start_of_turn> control tokens; Gemma's own
    # model has them as user-defined symbols. Runs of spaces, user-defined as
    # well, are written as plain spaces here and with U+2581 there.
    t = special.get(i, _USER_DEFINED if t in (_CONTROL, _UNKNOWN) else t)
    try:
      text = piece.decode()
      if t == _USER_DEFINED:
        text = text.replace(' ', _SPACE)
      m.pieces.add(piece=text, score=score, type=t)
    except ValueError:  # UnicodeDecodeError is one.
      raise errors.UserError(
        f'{file.path}: piece {i} is {piece[:40]!r} of type {t}, UTF-8 and a '
        'SentencePiece type expected; the file is damaged.'
      ) from None
  tokenizer.set_gemma_spec(m, ids)
  return tokenizer.from_proto(m.SerializeToString(), str(file.path))
