"""config.json of Hugging Face: read, written, refused."""

import dataclasses
import json

import pytest

from mt.gemma import sizes
from mt.weights import hf_config
from mt.weights import hf_config_out
from tests.fixtures import hf_fixture
from tests.fixtures.refusal import refusal

_GEMMA4 = {
  'attention_bias': False,
  'enable_moe_block': False,
  'final_logit_softcapping': 30.0,
  'global_head_dim': 512,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'num_experts': None,
  'rms_norm_eps': 1e-06,
  'rope_parameters': {
    'full_attention': {
      'partial_rotary_factor': 0.25,
      'rope_theta': 1000000.0,
      'rope_type': 'proportional',
    },
    'sliding_attention': {'rope_theta': 10000.0, 'rope_type': 'default'},
  },
  'tie_word_embeddings': True,
  'vocab_size': 262144,
  'vocab_size_per_layer_input': 262144,
}
# As published, without what has no bearing on the shape. Those of 4B and up are
# the `text_config`, which leaves out what equals transformers' defaults.
_CONFIGS = {
  'gemma1_2b': {
    'head_dim': 256,
    'hidden_act': 'gelu',
    'hidden_size': 2048,
    'intermediate_size': 16384,
    'model_type': 'gemma',
    'num_attention_heads': 8,
    'num_hidden_layers': 18,
    'num_key_value_heads': 1,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'vocab_size': 256000,
  },
  'gemma1_7b': {
    'head_dim': 256,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': None,
    'hidden_size': 3072,
    'intermediate_size': 24576,
    'model_type': 'gemma',
    'num_attention_heads': 16,
    'num_hidden_layers': 28,
    'num_key_value_heads': 16,
    'rms_norm_eps': 1e-06,
    'rope_theta': 10000.0,
    'vocab_size': 256000,
  },
  'gemma2_27b': {
    'attn_logit_softcapping': 50.0,
    'cache_implementation': 'hybrid',
    'final_logit_softcapping': 30.0,
    'head_dim': 128,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 4608,
    'intermediate_size': 36864,
    'model_type': 'gemma2',
    'num_attention_heads': 32,
    'num_hidden_layers': 46,
    'num_key_value_heads': 16,
    'query_pre_attn_scalar': 144,
    'rms_norm_eps': 1e-06,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'vocab_size': 256000,
  },
  'gemma3_270m': {
    '_sliding_window_pattern': 6,
    'attention_bias': False,
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 640,
    'intermediate_size': 2048,
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3,
    'model_type': 'gemma3_text',
    'num_attention_heads': 4,
    'num_hidden_layers': 18,
    'num_key_value_heads': 1,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-06,
    'rope_local_base_freq': 10000.0,
    'rope_scaling': None,
    'rope_theta': 1000000.0,
    'sliding_window': 512,
    'use_bidirectional_attention': False,
    'vocab_size': 262144,
  },
  'gemma3_4b': {
    'hidden_size': 2560,
    'intermediate_size': 10240,
    'model_type': 'gemma3_text',
    'num_hidden_layers': 34,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
  'gemma3_27b': {
    'head_dim': 128,
    'hidden_size': 5376,
    'intermediate_size': 21504,
    'model_type': 'gemma3_text',
    'num_attention_heads': 32,
    'num_hidden_layers': 62,
    'num_key_value_heads': 16,
    'query_pre_attn_scalar': 168,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
  # TranslateGemma's, whose bases of RoPE stand beside rope_parameters.
  'gemma3_12b': {
    'head_dim': 256,
    'hidden_size': 3840,
    'intermediate_size': 15360,
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 8,
    'model_type': 'gemma3_text',
    'num_attention_heads': 16,
    'num_hidden_layers': 48,
    'num_key_value_heads': 8,
    'query_pre_attn_scalar': 256,
    'rope_local_base_freq': 10000.0,
    'rope_parameters': {
      'full_attention': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_attention': {'rope_type': 'default'},
    },
    'rope_theta': 1000000.0,
    'sliding_window': 1024,
    'vocab_size': 262208,
  },
  'gemma4_e2b': _GEMMA4
  | {
    'attention_k_eq_v': False,
    'hidden_size': 1536,
    'hidden_size_per_layer_input': 256,
    'intermediate_size': 6144,
    'layer_types': (['sliding_attention'] * 4 + ['full_attention']) * 7,
    'model_type': 'gemma4_text',
    'num_attention_heads': 8,
    'num_global_key_value_heads': None,
    'num_hidden_layers': 35,
    'num_key_value_heads': 1,
    'num_kv_shared_layers': 20,
    'sliding_window': 512,
    'use_double_wide_mlp': True,
  },
  'gemma4_12b': _GEMMA4
  | {
    'attention_k_eq_v': True,
    'hidden_size': 3840,
    'hidden_size_per_layer_input': 0,
    'intermediate_size': 15360,
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 8,
    'model_type': 'gemma4_unified_text',
    'num_attention_heads': 16,
    'num_global_key_value_heads': 1,
    'num_hidden_layers': 48,
    'num_key_value_heads': 8,
    'num_kv_shared_layers': 0,
    'sliding_window': 1024,
    'use_bidirectional_attention': 'vision',
    'use_double_wide_mlp': False,
  },
}


def _shape(path):
  return hf_config.shape(hf_config.read(path))


@pytest.mark.parametrize('name', _CONFIGS)
def test_published_configs_are_understood(tmp_path, name):
  fields, cfg = _CONFIGS[name], sizes.SIZES[name]
  if name in ('gemma3_4b', 'gemma3_12b', 'gemma3_27b'):
    fields = {'model_type': 'gemma3', 'text_config': fields}
    cfg = dataclasses.replace(cfg, vocab_size=262_208)
  elif cfg.vocab_size == 256_128:
    cfg = dataclasses.replace(cfg, vocab_size=256_000)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  assert _shape(tmp_path / 'config.json') == cfg


@pytest.mark.parametrize('name', sizes.SIZES)
def test_every_size_survives_its_config(tmp_path, name):
  path = tmp_path / 'config.json'
  ids = {'pad_token_id': 0, 'bos_token_id': 2, 'eos_token_id': 1}
  hf_config_out.write(path, sizes.SIZES[name], 'float32', ids)
  assert _shape(path) == sizes.SIZES[name]
  fields = json.loads(path.read_text())
  assert fields['torch_dtype'] == 'float32'
  assert fields['eos_token_id'] == 1


@pytest.mark.parametrize(
  ('arch', 'config', 'change'),
  [
    ('gemma2', {'sliding_window': 8}, {'window': 8}),
    ('gemma2', {'attn_logit_softcapping': 40.0}, {'attn_softcap': 40.0}),
    ('gemma2', {'final_logit_softcapping': 20.0}, {'final_softcap': 20.0}),
    ('gemma2', {'query_pre_attn_scalar': 24}, {'query_scale': 24**-0.5}),
    (
      'gemma2',
      {'rope_theta': 2e4},
      {'rope_base_global': 2e4, 'rope_base_local': 2e4},
    ),
    ('gemma3', {'rope_theta': 2e6}, {'rope_base_global': 2e6}),
    ('gemma3', {'rope_local_base_freq': 2e4}, {'rope_base_local': 2e4}),
    (
      'gemma3',
      {'rope_scaling': {'type': 'linear', 'factor': 4}},
      {'rope_scale_global': 4.0},
    ),
    (
      'gemma3',
      {'rope_scaling': {'rope_type': 'default'}},
      {'rope_scale_global': 1.0},
    ),
    ('gemma3', {'sliding_window_pattern': 2}, {'attention': 'LG'}),
    (
      'gemma3',
      {
        'rope_local_base_freq': 2e4,
        'rope_parameters': {'sliding_attention': {'rope_type': 'default'}},
        'rope_scaling': None,
      },
      {'rope_base_local': 2e4, 'rope_scale_global': 1.0},
    ),
    (
      'gemma3',
      {
        'rope_scaling': None,
        'rope_parameters': {
          'full_attention': {
            'rope_type': 'linear',
            'factor': 2.0,
            'rope_theta': 5e5,
          },
          'sliding_attention': {'rope_type': 'default', 'rope_theta': 3e4},
        },
      },
      {
        'rope_base_global': 5e5,
        'rope_base_local': 3e4,
        'rope_scale_global': 2.0,
      },
    ),
    (
      'gemma',
      {'rope_parameters': {'rope_type': 'default', 'rope_theta': 3e4}},
      {'rope_base_global': 3e4, 'rope_base_local': 3e4},
    ),
    (
      'gemma3',
      {'layer_types': ['full_attention'] + ['sliding_attention'] * 6},
      {'attention': 'GLLLLLL'},
    ),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_the_config_is_read_and_not_assumed(tmp_path, arch, config, change):
  cfg, _ = hf_fixture.write_folder(
    tmp_path, arch, hf_fixture.seven_layers(arch), config=config
  )
  found = _shape(tmp_path / 'config.json')
  assert found == dataclasses.replace(cfg, **change)


@pytest.mark.parametrize(
  ('arch', 'config', 'words'),
  [
    ('gemma3', {'model_type': 'llama'}, ("'llama'", 'Gemma only')),
    ('gemma3', {'model_type': 'gemma3n'}, ('Gemma 3n', 'Gemma 4 E2B')),
    ('gemma3', {'model_type': 'gemma3n_text'}, ('Gemma 3n', 'Gemma 3 4B')),
    ('gemma3', {'model_type': ['gemma']}, ('model_type',)),
    ('gemma3', {'text_config': 'x'}, ('model_type',)),
    ('gemma3', {'hidden_size': None}, ('hidden_size',)),
    ('gemma3', {'hidden_size': -32}, ('hidden_size is -32',)),
    ('gemma3', {'hidden_size': 32.0}, ('hidden_size is 32.0',)),
    ('gemma3', {'hidden_size': '32'}, ('hidden_size',)),
    ('gemma3', {'vocab_size': 2**40}, ('vocab_size',)),
    ('gemma3', {'num_hidden_layers': 2**31 - 1}, ('num_hidden_layers',)),
    ('gemma3', {'sliding_window': float('nan')}, ('sliding_window',)),
    ('gemma3', {'sliding_window_pattern': 0}, ('sliding_window_pattern',)),
    ('gemma3', {'rope_theta': float('inf')}, ('rope_theta',)),
    ('gemma3', {'rope_theta': 'far'}, ('rope_theta is far, a number above 0',)),
    ('gemma3', {'rope_scaling': 'linear'}, ('rope_scaling',)),
    ('gemma3', {'rope_scaling': {'rope_type': 'yarn'}}, ('rope_scaling',)),
    (
      'gemma3',
      {'rope_scaling': {'rope_type': 'linear', 'factor': 0}},
      ('factor is 0',),
    ),
    ('gemma2', {'rope_scaling': {'type': 'linear', 'factor': 2}}, ('scaling',)),
    *(
      ('gemma3', {'rope_scaling': scaling}, ('rope_scaling',))
      for scaling in (
        {'type': 'dynamic', 'factor': 2.0},
        {'rope_type': 'longrope', 'factor': 2.0},
        {'rope_type': 'llama3', 'factor': 8.0},
        {'rope_type': 'linear', 'type': 'yarn', 'factor': 8.0},
        {'rope_type': 'default', 'factor': 8.0},
        {'factor': 8.0},
        {'rope_type': 'linear'},
        {'rope_type': 'linear', 'factor': None},
        {
          'rope_type': 'linear',
          'factor': 8.0,
          'partial_rotary_factor': 0.25,
        },
      )
    ),
    (
      'gemma3',
      {'rope_parameters': {'rope_type': 'linear', 'factor': 8.0}},
      ('rope_parameters',),
    ),
    (
      'gemma3',
      {
        'rope_scaling': None,
        'rope_parameters': {'rope_type': 'linear', 'factor': 8.0},
      },
      ('rope_parameters', 'full_attention'),
    ),
    ('gemma3', {'rope_parameters': 3}, ('rope_parameters',)),
    (
      'gemma3',
      {
        'rope_parameters': {
          'sliding_attention': {'rope_type': 'linear', 'factor': 2}
        }
      },
      ('sliding_attention',),
    ),
    ('gemma3', {'layer_types': ['full_attention']}, ('layer_types',)),
    ('gemma3', {'layer_types': 3}, ('layer_types is 3',)),
    ('gemma3', {'layer_types': ['chunked', 'chunked']}, ('layer_types',)),
    ('gemma2', {'final_logit_softcapping': 0}, ('final_logit_softcapping',)),
    ('gemma3', {'query_pre_attn_scalar': 0}, ('query_pre_attn_scalar',)),
    # Of another function than ours.
    ('gemma3', {'hidden_activation': 'relu'}, ('hidden_activation',)),
    ('gemma', {'hidden_act': 'silu'}, ('hidden_act',)),
    *(
      (arch, {'hidden_activation': 'gelu'}, ('hidden_activation is gelu',))
      for arch in ('gemma', 'gemma2', 'gemma3')
    ),
    (
      'gemma3',
      {'attn_logit_softcapping': 50.0},
      ('attn_logit_softcapping is 50.0, null expected',),
    ),
    ('gemma3', {'rms_norm_eps': 1e-5}, ('rms_norm_eps',)),
    ('gemma3', {'attention_bias': True}, ('attention_bias',)),
    ('gemma3', {'tie_word_embeddings': False}, ('tie_word_embeddings',)),
    ('gemma3', {'use_bidirectional_attention': True}, ('use_bidirectional',)),
  ],
  ids=lambda x: str(x)[:50],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, arch, config, words):
  hf_fixture.write_folder(tmp_path, arch, config=config)
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path / 'config.json', *words)


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', ('damaged JSON',)),
    (b'\xff\xfe\xfa', ('UTF-16',)),
    (b'[1, 2]', ('list found',)),
    (b'[' * 100_000, ('damaged JSON',)),
    (b'{}', ('model_type',)),
  ],
  ids=lambda x: repr(x)[:20],
)
def test_json_that_is_none_is_refused(tmp_path, data, words):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'config.json'
  path.write_bytes(data)
  refusal(lambda: hf_fixture.load(tmp_path), path, *words)


def test_a_gemma_within_another_model_is_refused(tmp_path):
  # PaliGemma's sees all of its prompt, which its text_config does not say.
  hf_fixture.write_folder(tmp_path, 'gemma', prefix='language_model.model.')
  path = tmp_path / 'config.json'
  fields = {'model_type': 'paligemma', 'vision_config': {}}
  fields['text_config'] = json.loads(path.read_text())
  path.write_text(json.dumps(fields))
  refusal(lambda: hf_fixture.load(tmp_path), path, "'paligemma' found")


def test_a_head_of_the_whole_model_is_refused(tmp_path):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'config.json'
  fields = {
    'model_type': 'gemma3',
    'tie_word_embeddings': False,
    'text_config': json.loads(path.read_text()),
  }
  path.write_text(json.dumps(fields))
  refusal(lambda: hf_fixture.load(tmp_path), path, 'tie_word_embeddings')
