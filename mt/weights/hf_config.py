"""Hugging Face's config.json -> the model's shape.

Fields: transformers, configuration_gemma.py, _gemma2.py, _gemma3.py and
_gemma4.py. Both ways of writing RoPE are read, `rope_theta` with `rope_scaling`
(version 4) and `rope_parameters` (version 5). Gemma 4, which version 4 does not
know, has the second alone; the shape of its global layers is in
`global_head_dim` and `num_global_key_value_heads`, as published, or in
`per_layer_config`, as version 5.24 writes it.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from mt.base import errors
from mt.base import foreign
from mt.gemma import sizes

# What transformers fills in; the published files of the multimodal Gemma 3
# leave out what equals it.
_DEFAULTS = {
  'gemma': {},
  'gemma2': {
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
  'gemma4_text': {
    'vocab_size': 262_144,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'sliding_window': 512,
    'hidden_size_per_layer_input': 256,
    'vocab_size_per_layer_input': 262_144,
  },
  'gemma4_unified_text': {
    'vocab_size': 262_144,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'sliding_window': 1024,
    'hidden_size_per_layer_input': 0,
  },
}
GEMMA4_ROPE = {
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
  'full_attention': {
    'rope_type': 'proportional',
    'partial_rotary_factor': 0.25,
    'rope_theta': 1_000_000.0,
  },
}
KINDS = {'sliding_attention': 'L', 'full_attention': 'G'}
NUMBERS = {
  'vocab_size': 'vocab_size',
  'num_layers': 'num_hidden_layers',
  'embed_dim': 'hidden_size',
  'hidden_dim': 'intermediate_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
}
CAPS = {
  'attn_softcap': 'attn_logit_softcapping',
  'final_softcap': 'final_logit_softcapping',
}
# Far above any real model; other numbers are at most 2**31.
_AT_MOST = {'num_hidden_layers': 1024, 'partial_rotary_factor': 1}
# What mt/gemma/model.py computes; None where the file does not say.
_ONLY = {
  'hidden_activation': (None, 'gelu_pytorch_tanh'),
  # Of the first Gemma 1, where both mean the latter.
  'hidden_act': (None, 'gelu', 'gelu_pytorch_tanh'),
  'rms_norm_eps': (None, float(np.float32(1e-6)), 1e-6),
  'attention_bias': (None, False),
  'use_bidirectional_attention': (None, False, 'vision'),  # Text is causal.
}
# Gemmas that are none of ours: what to take instead.
OTHERS = {
  'gemma3n': 'Gemma 3n is not supported; take its successor, Gemma 4 E2B or '
  'E4B, or Gemma 3 4B.',
  'moe': 'the mixture of experts of Gemma 4 (26B-A4B) is not supported; take '
  'Gemma 4 12B or 31B.',
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
      f'{path}: cannot read it ({e.strerror}); fetch the whole folder.'
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


@dataclasses.dataclass(frozen=True)
class Fields:
  """What a file says of a model, by the names of config.json.

  Attributes:
    path: of the file, for messages.
    kind: the `model_type` of the text model.
    values: by name.
    names: the file's own names, where they are others.
    tied: whether the head is the embedding, for all that it says.
    multimodal: whether it is of the text model and others beside it.
  """

  path: pathlib.Path
  kind: str
  values: Mapping[str, Any]
  names: Mapping[str, str]
  tied: bool = True
  multimodal: bool = False

  @property
  def is_4(self) -> bool:
    """Whether it is a Gemma 4."""
    return self.kind.startswith('gemma4')

  def bad(self, key: str, expected: str) -> errors.UserError:
    """That the value of `key` is none that is `expected`."""
    return errors.UserError(
      f'{self.path}: {self.names.get(key, key)} is '
      f'{str(self.values.get(key))[:60]}, {expected} expected; the file is '
      'damaged or of a model not known here: fetch or convert it again.'
    )

  def number(self, key: str, default: float | None = None, kind=int) -> Any:
    """A positive number; a whole one unless kind is float.

    Raises:
      errors.UserError: another value, or none and no default.
    """
    value, high = self.values.get(key), _AT_MOST.get(key, 2**31)
    value = default if value is None else value
    if type(value) not in (int, kind) or not 0 < value <= high:  # Nor NaN.
      expected = f'a number above 0, at most {high:,},'
      if kind is int:
        expected = f'a whole number from 1 to {high:,}'
      raise self.bad(key, expected)
    return kind(value)


def read(path: pathlib.Path) -> Fields:
  """What a config.json says of its text model, and what transformers fills in.

  Raises:
    errors.UserError: no such file, damaged, or of another model.
  """
  whole = read_json(path)
  fields = whole.get('text_config', whole)
  kind = fields.get('model_type') if isinstance(fields, dict) else None
  if kind == 'gemma3' and fields is whole:
    fields, kind = {}, 'gemma3_text'  # All of it left to the defaults.
  if str(kind).startswith('gemma3n'):
    raise errors.UserError(f'{path}: {OTHERS["gemma3n"]}')
  outer, own = whole.get('model_type'), (kind, str(kind).removesuffix('_text'))
  # In PaliGemma a Gemma lies that does not see its prompt causally.
  if str(kind) not in _DEFAULTS or outer not in own:
    raise errors.UserError(
      f'{path}: model_type {str(outer)[:40]!r} found, one of '
      f'{", ".join(_DEFAULTS)} expected; this project trains Gemma only.'
    )
  ties = (d.get('tie_word_embeddings') in (None, True) for d in (whole, fields))
  values = _DEFAULTS[kind] | fields
  return Fields(path, kind, values, {}, all(ties), multimodal=outer != kind)


def shape(f: Fields) -> sizes.ModelConfig:
  """The shape of a model.

  Raises:
    errors.UserError: a missing or impossible value, or a variant of Gemma that
      mt/gemma/model.py does not compute.
  """
  if f.values.get('enable_moe_block'):
    raise errors.UserError(f'{f.path}: {OTHERS["moe"]}')
  for key, allowed in _ONLY.items():
    if f.values.get(key) not in allowed:
      raise f.bad(key, str(allowed[-1]))
  cap = CAPS['attn_softcap']  # In transformers no effect from Gemma 3 on.
  if f.kind not in ('gemma', 'gemma2') and f.values.get(cap) is not None:
    raise f.bad(cap, 'null')
  head_dim = query_dim = f.number('head_dim', 256)
  later, caps = f.kind != 'gemma', {}
  if later:
    query_dim = 1 if f.is_4 else f.number('query_pre_attn_scalar', 256, float)
    given = {k: x for k, x in CAPS.items() if f.values.get(x) is not None}
    caps = {
      ours: f.number(theirs, kind=float) for ours, theirs in given.items()
    }
  local, global_, scale, part = _rope(f)
  numbers = {ours: f.number(theirs) for ours, theirs in NUMBERS.items()}
  cfg = sizes.ModelConfig(
    **numbers,
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention=_attention(f, numbers['num_layers']),
    window=f.number('sliding_window') if later else None,
    rope_base_local=local,
    rope_base_global=global_,
    rope_scale_global=scale,
    rope_part_global=part,
    qk_norm=f.is_4 or f.kind == 'gemma3_text',
    post_norms=later,
    **caps,
  )
  return _gemma4(f, cfg) if f.is_4 else cfg


def _gemma4(f, cfg):
  """What Gemma 4 has besides."""
  period = len(cfg.attention)
  if cfg.attention != 'L' * (period - 1) + 'G' or period == 1:
    raise f.bad('layer_types', 'periods of sliding layers and a full one')
  sharing, width = (
    f.number(key) if f.values.get(key) else 0
    for key in ('num_kv_shared_layers', 'hidden_size_per_layer_input')
  )
  if cfg.num_layers % period or sharing % period or sharing >= cfg.num_layers:
    raise f.bad('num_kv_shared_layers', f'whole periods of {period} layers')
  if width and f.number('vocab_size_per_layer_input') != cfg.vocab_size:
    raise f.bad(
      'vocab_size_per_layer_input', f'{cfg.vocab_size}, as vocab_size,'
    )
  same = bool(f.values.get('attention_k_eq_v'))
  head_dim, kv_heads = _global_shape(f, cfg)
  if kv_heads not in (None, cfg.num_kv_heads) and not same:
    raise f.bad('attention_k_eq_v', 'true, as global layers have other heads,')
  doubled = sharing and f.values.get('use_double_wide_mlp')
  return dataclasses.replace(
    cfg,
    norm_offset=0.0,
    value_norm=True,
    layer_scale=True,
    global_head_dim=head_dim,
    global_kv_heads=kv_heads if same else None,
    keys_are_values=same,
    sharing_layers=sharing,
    sharing_hidden_dim=2 * cfg.hidden_dim if doubled else None,
    layer_input_dim=width,
  )


def _global_shape(f, cfg):
  """(A, K or None) of global layers, in either of the two ways."""
  layers, default = f.values.get('per_layer_config'), 512
  names = plain = 'global_head_dim', 'num_global_key_value_heads'
  if layers is not None:
    wanted = [str(n) for n in range(cfg.num_layers) if cfg.kind(n) == 'G']
    layers = layers if isinstance(layers, dict) else {}
    shapes = list(layers.values())
    names, default = ('head_dim', 'num_key_value_heads'), cfg.head_dim
    if (
      sorted(n.lstrip('0') or '0' for n in layers) != sorted(wanted)
      or not isinstance(shapes[0], dict)
      or shapes[0].keys() - {*names}
      or any(x != shapes[0] for x in shapes)
      or any(
        f.values.get(ours) not in (None, shapes[0].get(name))
        for ours, name in zip(plain, names, strict=True)
      )
    ):
      raise f.bad(
        'per_layer_config', f'one {" and ".join(names)} of all global layers'
      )
    f = dataclasses.replace(f, values=shapes[0])
  head_dim, kv_heads = names
  heads = None if f.values.get(kv_heads) is None else f.number(kv_heads)
  return f.number(head_dim, default), heads


def _rope(f):
  """Bases of local and of global layers; factor and part of global ones."""
  old, new = f.values.get('rope_scaling'), f.values.get('rope_parameters')
  if old and new and old != new:
    raise f.bad('rope_parameters', 'the same as rope_scaling, or one of them')
  base = base_local = None  # In Gemma 4 all is in rope_parameters.
  if f.is_4:
    new = new or GEMMA4_ROPE
  else:
    base = f.number('rope_theta', 10_000.0, float)
    base_local = f.number('rope_local_base_freq', 10_000.0, float)
  key = 'rope_parameters' if new else 'rope_scaling'
  if f.kind in ('gemma', 'gemma2'):  # One kind of RoPE in all layers.
    local = global_ = _rope_of_kind(f, key, new or old, base)
  else:
    new = new or {'full_attention': old}
    if not isinstance(new, dict) or new.keys() - KINDS:
      raise f.bad(key, f'an object of {", ".join(KINDS)}')
    local = _rope_of_kind(f, key, new.get('sliding_attention'), base_local)
    global_ = _rope_of_kind(f, key, new.get('full_attention'), base)
  if local[1:] != (1.0, 1.0):
    raise f.bad(key, 'no scaling of sliding_attention')
  return local[0], *global_


def _rope_of_kind(f, key, value, base):
  """Base, factor and part of a head that is turned."""
  value = {} if value is None else value
  if not isinstance(value, dict):
    raise f.bad(key, 'an object')
  own = dataclasses.replace(f, values=value)
  types = {str(value[k]) for k in ('rope_type', 'type') if value.get(k)}
  known = ('default', 'linear', 'proportional')[: 3 if f.is_4 else 2]
  if types - {*known} or len(types) > 1:
    raise f.bad(key, f'a rope_type of {" or ".join(known)}')
  factor = own.number('factor', 1.0, float)
  part = own.number('partial_rotary_factor', 1.0, float)
  linear = types == {'linear'}
  if (
    (factor != 1.0 and not linear)
    or (linear and value.get('factor') is None)
    or (part != 1.0 and types != {'proportional'})
  ):
    raise f.bad(
      key,
      'factor with the rope_type linear, partial_rotary_factor with '
      'proportional',
    )
  return own.number('rope_theta', base, float), factor, part


def _attention(f, layers):
  """The pattern of 'L' and 'G', as short as it can be."""
  types = f.values.get('layer_types')
  if f.kind == 'gemma':
    return 'G'
  if types is None:
    period = 2 if f.kind == 'gemma2' else f.number('sliding_window_pattern', 6)
    return 'L' * (period - 1) + 'G'
  if (
    not isinstance(types, list)
    or len(types) != layers
    or not all(str(t) in KINDS for t in types)
  ):
    raise f.bad('layer_types', f'{layers} of {", ".join(KINDS)}')
  text = ''.join(KINDS[t] for t in types)
  # Its own length is a period.
  periods = (text[:n] for n in range(1, layers + 1))
  return next(p for p in periods if (p * layers)[:layers] == text)
