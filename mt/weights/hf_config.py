"""Hugging Face's config.json <-> the model's shape.

Fields: transformers, configuration_gemma.py, _gemma2.py and _gemma3.py. Both
ways of writing RoPE are read, `rope_theta` with `rope_scaling` (version 4) and
`rope_parameters` (version 5); the first is written, which both versions read.
"""

import functools
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mt.base import errors
from mt.base import foreign
from mt.gemma import sizes

# What transformers fills in; the published files of the multimodal Gemma 3
# leave out what equals it.
_DEFAULTS = {
  'gemma': {
    'vocab_size': 256_000,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
  },
  'gemma2': {
    'vocab_size': 256_000,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'sliding_window': 4096,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3_text': {
    'vocab_size': 262_208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'sliding_window': 4096,
    'rope_theta': 1_000_000.0,
  },
}
_KINDS = {'sliding_attention': 'L', 'full_attention': 'G'}
_OLD = 'rope_scaling'
_MAX_LAYERS = 1024  # Far above any real model.
# What mt/gemma/model.py computes; None where the file does not say.
_ONLY = {
  'hidden_activation': (None, 'gelu', 'gelu_pytorch_tanh'),
  'hidden_act': (None, 'gelu', 'gelu_pytorch_tanh'),  # All mean the latter.
  'rms_norm_eps': (None, 1e-6),
  'attention_bias': (None, False),
  'use_bidirectional_attention': (None, False),
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object out of a file.

  Raises:
    errors.UserError: missing, unreadable, no JSON, or no object.
  """
  try:
    value = json.loads(path.read_bytes())
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read it ({e.strerror}); fetch the folder again.'
    ) from e
  except (ValueError, RecursionError) as e:
    foreign.refuse(path, foreign.JSON)
    raise errors.UserError(
      f'{path}: damaged JSON ({str(e)[:100]}); fetch it again.'
    ) from e
  if not isinstance(value, dict):
    raise errors.UserError(
      f'{path}: a JSON {type(value).__name__} found, an object expected; fetch '
      'it again.'
    )
  return value


def read(path: pathlib.Path) -> sizes.ModelConfig:
  """The text model's shape out of a config.json.

  Raises:
    errors.UserError: another model, a missing or impossible value, or a
      variant of Gemma that mt/gemma/model.py does not compute.
  """
  kind, fields = _text_fields(path)
  bad = functools.partial(_bad, path, fields)
  number = functools.partial(_number, path, fields)
  for key, allowed in _ONLY.items():
    if fields.get(key) not in allowed:
      raise bad(key, str(allowed[-1]))
  layers = number('num_hidden_layers', high=_MAX_LAYERS)
  head_dim = query_dim = number('head_dim', 256)
  caps = {'attn_softcap': None, 'final_softcap': None}
  if kind != 'gemma':
    query_dim = number('query_pre_attn_scalar', 256, float)
    for ours, key in zip(
      caps, ('attn_logit_softcapping', 'final_logit_softcapping'), strict=True
    ):
      if fields.get(key) is not None:
        caps[ours] = number(key, kind=float)
  local, global_, scale = _rope(path, kind, fields)
  return sizes.ModelConfig(
    vocab_size=number('vocab_size'),
    num_layers=layers,
    embed_dim=number('hidden_size'),
    hidden_dim=number('intermediate_size'),
    num_heads=number('num_attention_heads'),
    num_kv_heads=number('num_key_value_heads'),
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention=_attention(kind, fields, layers, number, bad),
    window=number('sliding_window') if kind != 'gemma' else None,
    rope_base_local=local,
    rope_base_global=global_,
    rope_scale_global=scale,
    qk_norm=kind == 'gemma3_text',
    post_norms=kind != 'gemma',
    **caps,
  )


def _text_fields(path):
  """(model_type, fields) of the text model, with what transformers fills in."""
  whole = read_json(path)
  fields = whole.get('text_config', whole)
  kind = fields.get('model_type') if isinstance(fields, dict) else None
  if kind == 'gemma3' and fields is whole:
    fields, kind = {}, 'gemma3_text'  # All of it left to the defaults.
  if str(kind) not in _DEFAULTS:
    raise errors.UserError(
      f'{path}: model_type {str(kind)[:40]!r} found, one of '
      f'{", ".join(_DEFAULTS)} expected; this project trains Gemma only.'
    )
  return kind, _DEFAULTS[kind] | fields


def is_tied(path: pathlib.Path) -> bool:
  """Whether a config.json says that the head is the embedding."""
  whole = read_json(path)
  both = (whole, _text_fields(path)[1])
  return all(d.get('tie_word_embeddings') in (None, True) for d in both)


def _bad(path, fields, key, expected):
  return errors.UserError(
    f'{path}: {key} is {str(fields.get(key))[:60]}, {expected} expected; the '
    'file is damaged or of a model not known here.'
  )


def _number(path, fields, key, default=None, kind=int, high=2**31):
  """A positive number; a whole one unless kind is float."""
  value = fields.get(key)
  value = default if value is None else value
  if type(value) not in (int, kind) or not 0 < value < high:  # Nor NaN.
    raise _bad(path, fields, key, f'a number from 1 to {high:,}')
  return kind(value)


def _rope(path, kind, fields):
  """(base of local layers, base of global layers, factor of global layers)."""
  old, new = fields.get('rope_scaling'), fields.get('rope_parameters')
  third, key = kind == 'gemma3_text', 'rope_parameters' if new else _OLD
  if old and new and old != new:
    raise _bad(path, fields, key, f'the same as {_OLD}, or one of them')
  base = _number(path, fields, 'rope_theta', 10_000.0, float)

  def read(value, base):
    value = {} if value is None else value
    if not isinstance(value, dict):
      raise _bad(path, fields, key, 'an object')
    types = {value.get(k) for k in ('rope_type', 'type')} - {None}
    if types - {'default', 'linear'} or len(types) > 1:
      raise _bad(path, fields, key, 'a rope_type of default or linear')
    base = _number(path, value, 'rope_theta', base, float)
    factor = _number(path, value, 'factor', 1.0, float)
    if factor != 1.0 and types != {'linear'}:
      raise _bad(path, fields, key, 'a rope_type of linear with a factor')
    if value.get('partial_rotary_factor', 1.0) != 1.0:
      raise _bad(path, fields, key, 'no partial_rotary_factor')
    return base, factor

  if third and new:
    if not isinstance(new, dict) or new.keys() - _KINDS:
      raise _bad(path, fields, key, f'an object of {", ".join(_KINDS)}')
    local = read(new.get('sliding_attention'), 10_000.0)
    global_ = read(new.get('full_attention'), base)
  elif third:
    base_local = _number(path, fields, 'rope_local_base_freq', 10_000.0, float)
    local, global_ = (base_local, 1.0), read(old, base)
  else:
    local = global_ = read(new or old, base)
  if local[1] != 1.0:
    raise _bad(path, fields, key, 'no scaling of sliding_attention')
  return local[0], *global_


def _attention(kind, fields, layers, number, bad):
  """The pattern of 'L' and 'G', as short as it can be."""
  if kind == 'gemma':
    return 'G'
  types = fields.get('layer_types')
  if types is None:
    if kind == 'gemma2':
      return 'LG'
    period = number('sliding_window_pattern', 6, high=_MAX_LAYERS)
    return 'L' * (period - 1) + 'G'
  if len(types) != layers or not all(str(t) in _KINDS for t in types):
    raise bad('layer_types', f'{layers} of {", ".join(_KINDS)}')
  text = ''.join(_KINDS[t] for t in types)
  # Its own length is a period.
  periods = (text[:n] for n in range(1, layers + 1))
  return next(p for p in periods if (p * layers)[:layers] == text)


def kind_of(cfg: sizes.ModelConfig) -> str:
  """The `model_type` of a shape: gemma, gemma2 or gemma3_text."""
  if cfg.qk_norm:
    return 'gemma3_text'
  return 'gemma2' if cfg.post_norms else 'gemma'


def write(
  path: pathlib.Path,
  cfg: sizes.ModelConfig,
  dtype: np.dtype,
  ids: dict[str, int],
) -> None:
  """Writes a config.json that `read` reads back to the same function.

  Args:
    path: of the file.
    cfg: the model's shape.
    dtype: of the weights beside it.
    ids: `pad_token_id`, `bos_token_id`, `eos_token_id`.
  """
  kind = kind_of(cfg)
  name = {'gemma': 'Gemma', 'gemma2': 'Gemma2', 'gemma3_text': 'Gemma3'}[kind]
  bfloat16 = dtype == ml_dtypes.bfloat16
  fields = {
    'architectures': [f'{name}ForCausalLM'],
    'model_type': kind,
    'torch_dtype': 'bfloat16' if bfloat16 else np.dtype(dtype).name,
    'vocab_size': cfg.vocab_size,
    'num_hidden_layers': cfg.num_layers,
    'hidden_size': cfg.embed_dim,
    'intermediate_size': cfg.hidden_dim,
    'num_attention_heads': cfg.num_heads,
    'num_key_value_heads': cfg.num_kv_heads,
    'head_dim': cfg.head_dim,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'max_position_embeddings': 32_768 if cfg.qk_norm else 8192,
    'rms_norm_eps': 1e-6,
    'rope_theta': cfg.rope_base_global,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'tie_word_embeddings': True,
    'use_cache': True,
  } | ids
  if kind != 'gemma':
    kinds = {short: long for long, short in _KINDS.items()}
    pattern = cfg.attention * cfg.num_layers
    fields |= {
      'query_pre_attn_scalar': _tidy(cfg.query_scale**-2),
      'sliding_window': cfg.window,
      'layer_types': [kinds[k] for k in pattern[: cfg.num_layers]],
      'attn_logit_softcapping': cfg.attn_softcap,
      'final_logit_softcapping': cfg.final_softcap,
    }
  if kind == 'gemma3_text':
    factor = cfg.rope_scale_global
    fields |= {
      'rope_local_base_freq': cfg.rope_base_local,
      'rope_scaling': None,
    }
    if factor != 1.0:
      fields |= {
        'rope_scaling': {'rope_type': 'linear', 'factor': factor},
        'max_position_embeddings': 131_072,
      }
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def _tidy(x):
  """16 for 16.000000000000004: the square of a root."""
  return round(x) if abs(x - round(x)) < 1e-9 * x else x
