"""Hugging Face's config.json <-> the model's shape.

Fields: transformers, configuration_gemma.py, _gemma2.py and _gemma3.py. Both
ways of writing RoPE are read, `rope_theta` with `rope_scaling` (version 4) and
`rope_parameters` (version 5); the first is written, which both versions read.
"""

import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mt.base import errors
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
_MAX_LAYERS = 1024  # Far above any real model.
_ACTIVATIONS = (None, 'gelu', 'gelu_pytorch_tanh')  # All mean the latter.


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
    ) from None
  except (ValueError, RecursionError) as e:
    raise errors.UserError(
      f'{path}: damaged JSON ({" ".join(str(e).split())[:100]}); fetch it '
      'again.'
    ) from None
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
  whole = read_json(path)
  fields = whole.get('text_config', whole)
  kind = fields.get('model_type') if isinstance(fields, dict) else None
  if kind == 'gemma3' and fields is whole:
    fields, kind = {}, 'gemma3_text'  # All of it left to the defaults.
  if not isinstance(kind, str) or kind not in _DEFAULTS:
    raise errors.UserError(
      f'{path}: model_type {str(kind)[:40]!r} found, one of '
      f'{", ".join(_DEFAULTS)} expected; this project trains Gemma only.'
    )
  fields = _DEFAULTS[kind] | fields

  def bad(key, expected):
    value = str(fields.get(key))[:60]
    return errors.UserError(
      f'{path}: {key} is {value}, {expected} expected; the file is damaged or '
      'of a model not known here.'
    )

  def number(key, default=None, low=1, high=2**31, kinds=(int, float)):
    value = fields.get(key)
    value = default if value is None else value
    if (
      isinstance(value, bool)
      or not isinstance(value, kinds)
      or not low <= value < high  # NaN fails it too.
    ):
      raise bad(key, f'a number from {low} to {high:,}')
    return value

  def whole_number(key, default=None, high=2**31):
    return number(key, default, high=high, kinds=int)

  for key, allowed in (
    ('hidden_activation', _ACTIVATIONS),
    ('hidden_act', _ACTIVATIONS),
    ('rms_norm_eps', (None, 1e-6)),
    ('attention_bias', (None, False)),
    ('tie_word_embeddings', (None, True)),
    ('use_bidirectional_attention', (None, False)),
  ):
    if fields.get(key) not in allowed:
      raise bad(key, str(allowed[-1]))
  layers = whole_number('num_hidden_layers', high=_MAX_LAYERS)
  head_dim = whole_number('head_dim', 256)
  heads = whole_number('num_attention_heads')
  kv_heads = whole_number('num_key_value_heads')
  if heads % kv_heads or head_dim % 2:
    raise bad('num_key_value_heads', f'a divisor of {heads} and even heads')
  query_dim = head_dim
  if kind != 'gemma':
    query_dim = number('query_pre_attn_scalar', 256, low=1e-3)
  (local, local_scale), (global_, scale) = _rope(kind, fields, number, bad)
  if local_scale != 1.0:
    raise bad('rope_parameters', 'no scaling of sliding_attention')
  caps = {}
  for ours, key in (
    ('attn_softcap', 'attn_logit_softcapping'),
    ('final_softcap', 'final_logit_softcapping'),
  ):
    none = kind == 'gemma' or fields.get(key) is None
    caps[ours] = None if none else float(number(key, low=1e-3))
  attention = _attention(kind, fields, layers, whole_number, bad)
  return sizes.ModelConfig(
    vocab_size=whole_number('vocab_size'),
    num_layers=layers,
    embed_dim=whole_number('hidden_size'),
    hidden_dim=whole_number('intermediate_size'),
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention=attention,
    window=whole_number('sliding_window') if kind != 'gemma' else None,
    rope_base_local=local,
    rope_base_global=global_,
    rope_scale_global=scale,
    qk_norm=kind == 'gemma3_text',
    post_norms=kind != 'gemma',
    **caps,
  )


def _rope(kind, fields, number, bad):
  """(base, factor) of local layers and of global ones."""

  def read(key, value, base):
    value = {} if value is None else value
    if not isinstance(value, dict):
      raise bad(key, 'an object')
    type_ = value.get('rope_type', value.get('type', 'default'))
    if type_ not in ('default', 'linear'):
      raise bad(key, 'a rope_type of default or linear')
    factor = value.get('factor', 1.0) if type_ == 'linear' else 1.0
    out = []
    for v in (value.get('rope_theta', base), factor):
      if isinstance(v, bool) or not isinstance(v, int | float):
        raise bad(key, 'numbers')
      if not 1 <= v < math.inf:
        raise bad(key, 'numbers from 1 up')
      out.append(float(v))
    return tuple(out)

  base = number('rope_theta', 10_000.0)
  new = fields.get('rope_parameters')
  if kind != 'gemma3_text':
    key = 'rope_scaling' if new is None else 'rope_parameters'
    base, scale = read(key, fields.get(key), base)
    if scale != 1.0:
      raise bad(key, 'no scaling')
    return (base, 1.0), (base, 1.0)
  local = number('rope_local_base_freq', 10_000.0)
  if new is None:
    scaling = fields.get('rope_scaling')
    return (float(local), 1.0), read('rope_scaling', scaling, base)
  if not isinstance(new, dict):
    raise bad('rope_parameters', 'an object')
  return (
    read('rope_parameters', new.get('sliding_attention'), local),
    read('rope_parameters', new.get('full_attention'), base),
  )


def _attention(kind, fields, layers, whole_number, bad):
  """The pattern of 'L' and 'G', as short as it can be."""
  if kind == 'gemma':
    return 'G'
  types = fields.get('layer_types')
  if types is None:
    if kind == 'gemma2':
      return 'LG'
    period = whole_number('sliding_window_pattern', 6, high=_MAX_LAYERS)
    return 'L' * (period - 1) + 'G'
  if (
    not isinstance(types, list)
    or len(types) != layers
    or not all(isinstance(t, str) and t in _KINDS for t in types)
  ):
    raise bad('layer_types', f'{layers} of {", ".join(_KINDS)}')
  text = ''.join(_KINDS[t] for t in types)
  for period in range(1, layers + 1):
    if (text[:period] * layers)[:layers] == text:
      return text[:period]
  raise AssertionError(text)  # Its own length is a period.


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
    scaled = cfg.rope_scale_global != 1.0
    fields |= {
      'rope_local_base_freq': cfg.rope_base_local,
      'rope_scaling': {'rope_type': 'linear', 'factor': cfg.rope_scale_global}
      if scaled
      else None,
    }
    if cfg.rope_scale_global > 1.0:
      fields['max_position_embeddings'] = 131_072
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def _tidy(x):
  """16 for 16.000000000000004: the square of a root."""
  return round(x) if abs(x - round(x)) < 1e-9 * x else x
