"""Tiny but real GGUF files, laid out as llama.cpp's converter does."""

import functools
import io
import pathlib
import re
from typing import Any

import gguf
import jax
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt import model
from mt import sizes

_TEXT = (
  'My name is Morgane, and this is a letter to the people of the village.',
  'Je m’appelle Morgane, et voici une lettre aux gens du village.',
  'The best thing about the internet is that there are no rules, lol!!!',
  'Le meilleur truc sur internet, c’est qu’il n’y a pas de règles, mdr !',
  'def f(x):\n  return x + 1  # two spaces  and a tab\there',
  'I was there in 2016, 2017 and 2018; they were not there at all.',
  "J'y étais en 2016, 2017 et 2018 ; eux n'y étaient pas du tout.",
)
_USER_DEFINED = (
  '<mask>',
  '[multimodal]',
  '<unused0>',
  '<unused1>',
  '<start_of_turn>',
  '<end_of_turn>',
  '\n',
  '\n\n',
  '\t',
  '\u2581\u2581',
  '\u2581\u2581\u2581',
  '\u2581\u2581\u2581\u2581',
  '<b>',
)
# What the converter, or `special` in tokenizer_config.json, turns to control.
_CONTROL_LOOK = re.compile(rb'<(mask|unused\d+|start_of_turn|end_of_turn)>')
_UNKNOWN, _CONTROL, _USER = 2, 3, 4

_T = gguf.MODEL_TENSOR
_GLOBAL_TENSORS = {'final_norm': _T.OUTPUT_NORM, 'embedding': _T.TOKEN_EMBD}
_LAYER_TENSORS = {
  'attn_norm': _T.ATTN_NORM,
  'q': _T.ATTN_Q,
  'k': _T.ATTN_K,
  'v': _T.ATTN_V,
  'o': _T.ATTN_OUT,
  'ffw_norm': _T.FFN_NORM,
  'gate': _T.FFN_GATE,
  'up': _T.FFN_UP,
  'down': _T.FFN_DOWN,
  'post_attn_norm': _T.ATTN_POST_NORM,
  'post_ffw_norm': _T.FFN_POST_NORM,
  'q_norm': _T.ATTN_Q_NORM,
  'k_norm': _T.ATTN_K_NORM,
}


@functools.cache
def train_proto(vocab_size: int = 400) -> bytes:
  """A SentencePiece model with the settings and special ids of Gemma's."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_TEXT),
    model_writer=out,
    model_type='bpe',
    vocab_size=vocab_size,
    byte_fallback=True,
    character_coverage=1.0,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    unk_piece='<unk>',
    user_defined_symbols=list(_USER_DEFINED),
    minloglevel=2,
  )
  return out.getvalue()


def tiny_config(arch: str, vocab_size: int) -> sizes.ModelConfig:
  """A few kilobytes of each generation; every axis fits blocks of 32."""
  shape = {
    'vocab_size': vocab_size,
    'num_layers': 2,
    'embed_dim': 32,
    'hidden_dim': 96,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 16,
    'query_scale': 16**-0.5,
  }
  if arch == 'gemma':
    return sizes.ModelConfig(**shape)
  if arch == 'gemma2':
    return sizes.ModelConfig(
      **shape,
      attention='LG',
      window=24,
      attn_softcap=50.0,
      final_softcap=30.0,
      post_norms=True,
    )
  return sizes.ModelConfig(
    **shape,
    attention='LLLLLG',
    window=24,
    rope_base_global=1_000_000.0,
    rope_scale_global=8.0,
    qk_norm=True,
    post_norms=True,
  )


def tiny_params(cfg: sizes.ModelConfig, seed: int = 0) -> model.Params:
  """Random parameters whose norms stay exact when 1 is added in float32."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    if 'norm' in path[-1].key:
      return rng.integers(-128, 128, shape).astype(np.float32) / 256
    return rng.standard_normal(shape, dtype=np.float32)

  return jax.tree_util.tree_map_with_path(
    leaf, model.param_shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)
  )


def vocabulary(proto: bytes) -> dict[str, Any]:
  """The tokenizer's keys in a GGUF header.

  As in the published files, what the tokenizer lists as an added token has the
  score -1000, runs of spaces are plain spaces, and <unk> counts as control.
  """
  m = sp_pb2.ModelProto.FromString(proto)
  tokens, scores, types = [], [], []
  for piece in m.pieces:
    token, score, kind = piece.piece.encode(), piece.score, piece.type
    if kind in (_UNKNOWN, _CONTROL, _USER):
      score = -1000.0
      if kind != _USER or _CONTROL_LOOK.fullmatch(token):
        kind = _CONTROL
      else:
        token = token.replace('\u2581'.encode(), b' ')
    tokens.append(token)
    scores.append(score)
    types.append(int(kind))
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.token_type': types,
    'tokenizer.ggml.bos_token_id': m.trainer_spec.bos_id,
    'tokenizer.ggml.eos_token_id': m.trainer_spec.eos_id,
    'tokenizer.ggml.unknown_token_id': m.trainer_spec.unk_id,
    'tokenizer.ggml.padding_token_id': m.trainer_spec.pad_id,
    'tokenizer.ggml.add_bos_token': True,
    'tokenizer.ggml.add_space_prefix': False,
  }


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  if isinstance(value, list):
    writer.add_array(key, value)
  elif isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, int):
    (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  else:
    writer.add_string(key, value)


def _shape_fields(cfg: sizes.ModelConfig, arch: str) -> dict[str, Any]:
  """The model's keys, only those that the converter writes for `arch`."""
  keys = gguf.Keys
  fields = {
    keys.LLM.CONTEXT_LENGTH: 8192,
    keys.LLM.EMBEDDING_LENGTH: cfg.embed_dim,
    keys.LLM.BLOCK_COUNT: cfg.num_layers,
    keys.LLM.FEED_FORWARD_LENGTH: cfg.hidden_dim,
    keys.Attention.HEAD_COUNT: cfg.num_heads,
    keys.Attention.LAYERNORM_RMS_EPS: 1e-6,
    keys.Attention.KEY_LENGTH: cfg.head_dim,
    keys.Attention.VALUE_LENGTH: cfg.head_dim,
    keys.Attention.HEAD_COUNT_KV: cfg.num_kv_heads,
  }
  if arch != 'gemma':
    fields[keys.Attention.SLIDING_WINDOW] = cfg.window
  if arch == 'gemma2':
    fields[keys.LLM.ATTN_LOGIT_SOFTCAPPING] = cfg.attn_softcap
    fields[keys.LLM.FINAL_LOGIT_SOFTCAPPING] = cfg.final_softcap
  if arch != 'gemma3' and cfg.rope_base_global != 10_000.0:
    fields[keys.Rope.FREQ_BASE] = cfg.rope_base_global
  if arch == 'gemma3':
    fields[keys.Rope.FREQ_BASE] = cfg.rope_base_global
    fields[keys.Rope.FREQ_BASE_SWA] = cfg.rope_base_local
    fields[keys.Rope.SCALING_TYPE] = 'linear'
    fields[keys.Rope.SCALING_FACTOR] = cfg.rope_scale_global
  return {k.format(arch=arch): v for k, v in fields.items()}


def write_gguf(
  path: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: model.Params,
  proto: bytes,
  arch: str = 'gemma3',
  quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
  fields: dict[str, Any] | None = None,
) -> pathlib.Path:
  """Writes parameters and vocabulary as a GGUF file.

  Args:
    params: what it lacks is missing in the file, whatever its shapes are.
    proto: a serialised SentencePiece model.
    quant: of matrices; vectors stay float32, as llama.cpp has them.
    fields: header keys that replace those of the model; None drops a key.

  Returns:
    The path.
  """
  writer = gguf.GGUFWriter(str(path), arch)
  header = {'general.architecture': arch} | _shape_fields(cfg, arch)
  header |= vocabulary(proto) | (fields or {})
  writer.kv_data[0].clear()  # The architecture, written with the others.
  for key, value in header.items():
    if value is not None:
      _add_field(writer, key, value)

  def add(name, x):
    x = np.asarray(x, np.float32)
    x = x + np.float32(1) if 'norm' in name else x
    x = x.T if x.ndim == 2 and name != 'token_embd' else x
    kind = quant if x.ndim == 2 else gguf.GGMLQuantizationType.F32
    raw = gguf.quantize(np.ascontiguousarray(x), kind)
    writer.add_tensor(f'{name}.weight', raw, raw_dtype=kind)

  for ours, theirs in _GLOBAL_TENSORS.items():
    if ours in params:
      add(gguf.TENSOR_NAMES[theirs], params[ours])
  for ours, stacked in params['layers'].items():
    for i, x in enumerate(stacked):
      add(gguf.TENSOR_NAMES[_LAYER_TENSORS[ours]].format(bid=i), x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
