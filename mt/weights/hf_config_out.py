"""A model's shape -> config.json of a folder of Hugging Face's.

The fields: mt/weights/hf_config.py. RoPE is written as version 4 of
transformers has it, which version 5 reads as well; of Gemma 4, which version 4
does not know, as version 5 has it.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

from mt.base import files
from mt.gemma import sizes
from mt.weights import hf_config


def kind_of(cfg: sizes.ModelConfig) -> str:
  """The `model_type` of a shape: gemma, gemma2, gemma3_text, gemma4_text."""
  if cfg.global_head_dim:
    return 'gemma4_text'
  if cfg.qk_norm:
    return 'gemma3_text'
  return 'gemma2' if cfg.post_norms else 'gemma'


def write(
  path: pathlib.Path, cfg: sizes.ModelConfig, dtype: str, ids: Mapping[str, Any]
) -> None:
  """Writes a config.json that `read` reads back to the same function.

  Args:
    path: of the file.
    cfg: the model's shape.
    dtype: of the weights beside it.
    ids: `pad_token_id`, `bos_token_id`, `eos_token_id`.
  """
  files.write_json(path, fields_of(cfg) | {'torch_dtype': dtype} | ids)


def fields_of(cfg: sizes.ModelConfig) -> dict[str, Any]:
  """What a config.json says of a shape."""
  kind = kind_of(cfg)

  def named(names):
    return {theirs: getattr(cfg, ours) for ours, theirs in names.items()}

  fields = {
    'architectures': [f'{kind.removesuffix("_text").capitalize()}ForCausalLM'],
    'model_type': kind,
    **named(hf_config.NUMBERS),
    'head_dim': cfg.head_dim,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'max_position_embeddings': 32_768 if cfg.qk_norm else 8192,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
  }
  if kind != 'gemma':
    kinds = {short: long for long, short in hf_config.KINDS.items()}
    fields |= named(hf_config.CAPS)
    fields['sliding_window'] = cfg.window
    fields['layer_types'] = [kinds[cfg.kind(n)] for n in range(cfg.num_layers)]
  if kind == 'gemma4_text':
    del fields['attn_logit_softcapping']
    fields |= _gemma4_fields(cfg)
  else:
    fields['rope_theta'] = cfg.rope_base_global
  if kind in ('gemma2', 'gemma3_text'):
    fields['query_pre_attn_scalar'] = _tidy(cfg.query_scale**-2)
  if kind == 'gemma3_text':
    fields['rope_local_base_freq'] = cfg.rope_base_local
    factor, fields['rope_scaling'] = cfg.rope_scale_global, None
    if factor != 1.0:
      fields['rope_scaling'] = {'rope_type': 'linear', 'factor': factor}
      fields['max_position_embeddings'] = 131_072
  return fields


def _gemma4_fields(cfg):
  local, global_ = hf_config.GEMMA4_ROPE.values()
  local = local | {'rope_theta': cfg.rope_base_local}
  global_ = global_ | {
    'rope_theta': cfg.rope_base_global,
    'partial_rotary_factor': cfg.rope_part_global,
  }
  return {
    'max_position_embeddings': 131_072,
    'rope_parameters': {'sliding_attention': local, 'full_attention': global_},
    'global_head_dim': cfg.global_head_dim,
    'num_global_key_value_heads': cfg.global_kv_heads,
    'attention_k_eq_v': cfg.keys_are_values,
    'num_kv_shared_layers': cfg.sharing_layers,
    'use_double_wide_mlp': cfg.sharing_hidden_dim is not None,
    'hidden_size_per_layer_input': cfg.layer_input_dim,
    'vocab_size_per_layer_input': cfg.vocab_size,
  }


def _tidy(x):
  """16 for 16.000000000000004: the square of a root."""
  return round(x) if abs(x - round(x)) < 1e-9 * x else x
