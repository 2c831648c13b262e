"""Adapters of PEFT: the same factors out and in, or one clear refusal."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from mt.gemma import lora
from mt.weights import peft
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures.refusal import refusal

_CFG = gguf_fixture.tiny_config('gemma3', 400)


@pytest.fixture
def folder(tmp_path):
  """An adapter on the queries and the values."""
  _write(tmp_path, on='q|v')
  return tmp_path


def _factors(on, rank=3):
  params = gguf_fixture.tiny_params(_CFG)
  key = jax.random.key(0)
  factors, _ = lora.partition(
    _CFG, params, 'lora', rank=rank, key=key, matrices=on
  )
  rng = np.random.default_rng(0)
  return {
    k: rng.standard_normal(x.shape, dtype=np.float32)
    for k, x in factors.items()
  }


def _write(folder, on='.*'):
  factors = _factors(on)
  peft.write(folder, _CFG, factors, alpha=7.5, base='google/gemma-3-270m')
  return factors


@pytest.mark.parametrize('on', ('.*', 'q|v', 'down'))
def test_what_is_written_is_read(tmp_path, on):
  factors = _write(tmp_path, on)
  found = peft.read(tmp_path, _CFG)
  assert (found.rank, found.alpha) == (3, 7.5)
  assert found.base == 'google/gemma-3-270m'
  assert found.factors.keys() == factors.keys()
  for name, x in factors.items():
    assert found.factors[name].dtype == np.float32
    np.testing.assert_array_equal(found.factors[name], x)
  targets = {name.split('/')[1].split('_lora_')[0] for name in factors}
  assert set(found.targets) == targets


def test_all_that_peft_says_by_default_is_read(folder):
  # LoraConfig of peft 0.21.2, but for what `write` says.
  _change(
    folder,
    auto_mapping=None,
    peft_version='0.21.2',
    revision=None,
    megatron_core='megatron.core',
    qalora_group_size=16,
    loftq_config={},
    rank_pattern={},
    alpha_pattern={},
    layers_to_transform=None,
    modules_to_save=None,
    target_parameters=None,
    exclude_modules=None,
    use_bdlora=None,
    ensure_weight_tying=False,
    lora_dropout=0.1,
  )
  peft.read(folder, _CFG)


@pytest.mark.parametrize(
  'prefix',
  ('base_model.model.model.language_model.', 'base_model.model.x.model.'),
)
def test_any_prefix_is_found(folder, prefix):
  expected = peft.read(folder, _CFG).factors
  _rename(folder, 'base_model.model.model.', prefix)
  found = peft.read(folder, _CFG).factors
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)


def test_the_names_are_those_of_the_base(tmp_path):
  """PEFT passes over others; the towers have matrices of the same names."""
  factors = _factors('q|v')
  peft.write(tmp_path, _CFG, factors, alpha=7.5, base='x', multimodal=True)
  names = load_file(tmp_path / 'adapter_model.safetensors')
  prefix = 'base_model.model.model.language_model.layers.'
  assert all(name.startswith(prefix) for name in names)
  fields = json.loads((tmp_path / 'adapter_config.json').read_text())
  left_out = re.compile(fields['exclude_modules']).fullmatch  # As PEFT does.
  assert left_out('model.vision_tower.layers.0.self_attn.q_proj')
  assert not left_out('model.language_model.layers.0.self_attn.q_proj')
  assert fields['target_modules'] == ['q_proj', 'v_proj']
  found = peft.read(tmp_path, _CFG).factors
  for name, x in factors.items():
    np.testing.assert_array_equal(found[name], x)


def _change(folder, **fields):
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit(folder, change):
  path = folder / 'adapter_model.safetensors'
  save_file(change(load_file(path)), path)


def _rename(folder, old, new):
  _edit(folder, lambda t: {k.replace(old, new): v for k, v in t.items()})


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('peft_type', 'IA3'),
    ('peft_type', 'ADALORA'),
    ('use_rslora', True),
    ('use_dora', True),
    ('use_qalora', True),
    ('bias', 'all'),
    ('bias', 'lora_only'),
    ('lora_bias', True),
    ('fan_in_fan_out', True),
    ('rank_pattern', {'q_proj': 8}),
    ('alpha_pattern', {'q_proj': 8}),
    ('modules_to_save', ['embed_tokens']),
    ('trainable_token_indices', [1, 2]),
    ('target_parameters', ['mlp.experts']),
    ('layers_to_transform', [0]),
    ('layer_replication', [[0, 2]]),
    ('init_lora_weights', 'pissa_niter_16'),
    ('init_lora_weights', 'loftq'),
    ('init_lora_weights', 'corda'),
    ('alora_invocation_tokens', [1]),
    ('what_comes_next_year', 1),
  ],
)
def test_another_kind_of_lora_is_refused_by_name(folder, key, value):
  _change(folder, **{key: value})
  refusal(
    lambda: peft.read(folder, _CFG),
    folder / 'adapter_config.json',
    f'{key} is ',
    'expected',
    'merge the adapter with PEFT',
  )


_LAYER = 'base_model.model.model.layers.0.'
_ANY = f'{_LAYER}self_attn.q_proj.lora_A.weight'


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (
      lambda t: {k: x for k, x in t.items() if k != _ANY},
      (f'no tensor {_ANY!r}', 'all layers'),
    ),
    (
      lambda t: {k.replace('.weight', '.default.weight'): t[k] for k in t},
      (f'no tensor {_ANY!r}', 'save_pretrained'),
    ),
    (
      lambda t: {k: v[:2] if 'lora_A' in k else v for k, v in t.items()},
      ('A of self_attn.q_proj', '(3, 32)'),
    ),
    (
      lambda t: {k: v[:-1] if 'lora_B' in k else v for k, v in t.items()},
      ('B of self_attn.q_proj', 'another model'),
    ),
    (lambda t: t | {'base_model.model.lm_head.weight': t[_ANY]}, ('lm_head',)),
    (
      lambda t: t | {_ANY.replace('lora_A', 'lora_magnitude_vector'): t[_ANY]},
      ('lora_magnitude_vector', 'beside'),
    ),
    (
      lambda t: t | {_ANY.replace('layers.0', 'layers.2'): t[_ANY]},
      ('layers.2.self_attn', 'beside'),
    ),
    (
      lambda t: t | {_ANY.replace('q_proj', 'out_proj'): t[_ANY]},
      ('out_proj', 'beside'),
    ),
    (
      lambda t: (
        t | {k.replace('model.layers', 'vision_tower.layers'): t[k] for k in t}
      ),
      ('layers.0', 'beside'),
    ),
    (
      lambda t: {k.replace('layers.', 'blocks.'): x for k, x in t.items()},
      ("no tensor 'layers.0.self_attn.q_proj.lora_A.weight'",),
    ),
    (lambda t: {}, ('nothing',)),
  ],
  ids=(
    'one less',
    'names within PEFT',
    'rank',
    'width',
    'head',
    'dora',
    'layer',
    'module',
    'vision',
    'no layers',
    'none',
  ),
)
def test_factors_that_do_not_fit_are_refused(folder, change, words):
  _edit(folder, change)
  path = folder / 'adapter_model.safetensors'
  refusal(lambda: peft.read(folder, _CFG), path, *words)


def test_what_is_no_adapter_is_refused(folder):
  (folder / 'adapter_model.safetensors').unlink()
  refusal(lambda: peft.read(folder, _CFG), folder, 'adapter_model.safetensors')
  pickle = folder / 'adapter_model.bin'
  pickle.write_bytes(b'PK\x03\x04' + bytes(26) + b'adapter_model/data.pkl')
  refusal(lambda: peft.read(folder, _CFG), pickle, 'a pickle', 'safetensors')
  (folder / 'adapter_config.json').unlink()
  refusal(
    lambda: pretrained.find_adapter(str(folder)),
    folder,
    'adapter_config.json',
    'weights.adapter',
  )
  refusal(
    lambda: pretrained.find_adapter('me/mine'), 'hf:me/mine', 'weights.adapter'
  )
