"""Tiny Hugging Face folders, laid out as the published ones."""

import dataclasses
import json
import pathlib
import struct
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mt import model
from mt import sizes
from mt import weights
from tests import gguf_fixture

# gemma, gemma2, gemma3_text: names in a checkpoint of google/gemma-2b,
# google/gemma-2-2b and google/gemma-3-1b-pt.
_LAYER = {
  'self_attn.q_proj': 'q',
  'self_attn.k_proj': 'k',
  'self_attn.v_proj': 'v',
  'self_attn.o_proj': 'o',
  'mlp.gate_proj': 'gate',
  'mlp.up_proj': 'up',
  'mlp.down_proj': 'down',
  'input_layernorm': 'attn_norm',
}
_GEMMA1 = {'post_attention_layernorm': 'ffw_norm'}
_GEMMA2 = {
  'post_attention_layernorm': 'post_attn_norm',
  'pre_feedforward_layernorm': 'ffw_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}
_GEMMA3 = _GEMMA2 | {
  'self_attn.q_norm': 'q_norm',
  'self_attn.k_norm': 'k_norm',
}
NAMES = {
  'gemma': _LAYER | _GEMMA1,
  'gemma2': _LAYER | _GEMMA2,
  'gemma3': _LAYER | _GEMMA3,
}
DTYPES = {
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}


def config_json(arch: str, cfg: sizes.ModelConfig) -> dict[str, Any]:
  """config.json as version 4 of transformers writes it."""
  fields = {
    'model_type': 'gemma3_text' if arch == 'gemma3' else arch,
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.embed_dim,
    'intermediate_size': cfg.hidden_dim,
    'num_hidden_layers': cfg.num_layers,
    'num_attention_heads': cfg.num_heads,
    'num_key_value_heads': cfg.num_kv_heads,
    'head_dim': cfg.head_dim,
    'rms_norm_eps': 1e-06,
    'rope_theta': cfg.rope_base_global,
  }
  if arch == 'gemma':
    return fields | {'hidden_act': 'gelu', 'hidden_activation': None}
  fields |= {
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': round(cfg.query_scale**-2),
    'sliding_window': cfg.window,
    'attn_logit_softcapping': cfg.attn_softcap,
    'final_logit_softcapping': cfg.final_softcap,
  }
  if arch == 'gemma3':
    fields |= {
      'rope_local_base_freq': cfg.rope_base_local,
      'rope_scaling': {'rope_type': 'linear', 'factor': cfg.rope_scale_global},
      'sliding_window_pattern': len(cfg.attention),
    }
  return fields


def tensors(
  arch: str,
  params: model.Params,
  dtype: Any = np.float32,
  prefix: str = 'model.',
) -> dict[str, np.ndarray]:
  """Parameters by the names of a checkpoint, matrices as [out, in]."""
  out = {
    f'{prefix}embed_tokens.weight': params['embedding'],
    f'{prefix}norm.weight': params['final_norm'],
  }
  for theirs, ours in NAMES[arch].items():
    for i, x in enumerate(params['layers'][ours]):
      out[f'{prefix}layers.{i}.{theirs}.weight'] = x.T
  return {k: np.ascontiguousarray(v).astype(dtype) for k, v in out.items()}


def write_shards(
  folder: pathlib.Path, shards: list[dict[str, np.ndarray]]
) -> None:
  """Several files and their index, named as on the Hub."""
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    name = f'model-{i:05}-of-{len(shards):05}.safetensors'
    save_file(shard, folder / name, {'format': 'pt'})
    weight_map |= dict.fromkeys(shard, name)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map})
  )


def write_folder(
  folder: pathlib.Path,
  arch: str = 'gemma3',
  cfg: sizes.ModelConfig | None = None,
  config: dict[str, Any] | None = None,
  dtype: Any = np.float32,
  prefix: str = 'model.',
) -> tuple[sizes.ModelConfig, model.Params]:
  """A folder of one file, with tokenizer.model.

  Args:
    cfg: a tiny one of `arch` where None is given.
    config: fields that replace those of config.json; None drops a field.

  Returns:
    What was written: the shape and the float32 parameters.
  """
  folder.mkdir(exist_ok=True)
  cfg = cfg or gguf_fixture.tiny_config(arch, 400)
  params = gguf_fixture.tiny_params(cfg)
  fields = config_json(arch, cfg) | (config or {})
  fields = {k: v for k, v in fields.items() if v is not None}
  (folder / 'config.json').write_text(json.dumps(fields))
  save_file(tensors(arch, params, dtype, prefix), folder / 'model.safetensors')
  (folder / 'tokenizer.model').write_bytes(gguf_fixture.train_proto())
  return cfg, params


def open_folder(path, tokenizer_path=''):
  return weights.open_source(str(path), '', tokenizer_path, seed=0, texts=())


def load(path):
  """Everything that a run reads from the folder."""
  source = open_folder(path)
  return source.config, source.read()


def assert_same(params, expected):
  """The same tree, float32, bit for bit."""
  found = dict(jax.tree_util.tree_leaves_with_path(params))
  wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
  assert found.keys() == wanted.keys()
  for path, x in found.items():
    assert x.dtype == np.float32, path
    assert x.shape == wanted[path].shape, path
    assert np.asarray(x).tobytes() == wanted[path].tobytes(), path


def seven_layers(arch):
  """Layers of both kinds in every generation that has two."""
  return dataclasses.replace(gguf_fixture.tiny_config(arch, 400), num_layers=7)


def split_file(data):
  """(header, tensors) of a safetensors file."""
  (size,) = struct.unpack('<Q', data[:8])
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_raw(path, header, data):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
