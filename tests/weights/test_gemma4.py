"""Gemma 4: what transformers makes of tiny random models of each shape."""

import functools
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors_numpy
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.data import tokenizer
from mt.gemma import attention
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sizes
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.weights import flax
from mt.weights import flax_out
from mt.weights import hf
from mt.weights import load
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gemma4
from tests.fixtures.refusal import refusal

SHAPES = tiny_gemma4.WITH_TOKENIZER

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / '.venv-transformers' / 'bin' / 'python'
_B, _L = 2, 20


# The last position's logits of the first eight tokens, by transformers 5.24:
# what the test below compares, for where transformers is not.
_GOLDEN = {
  'e2b': (0.126368, 0.101280, 0.210009, -0.511529, 1.020150, -0.395537),
  'e4b': (-2.300810, -0.756237, 0.250643, 0.036425, 1.444178, 1.251706),
  '12b': (-1.601520, 0.777475, 1.144263, -1.780473, 0.163452, 0.275780),
  '31b': (-2.093765, 0.597342, 1.493889, 0.373229, 1.079275, 1.551642),
}


def _write(folder, name):
  cfg, params = SHAPES[name], tiny_gemma4.params(SHAPES[name])
  folder.mkdir()
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  hf.write(folder, cfg, params, tok)
  return cfg, params


def _tokens():
  return np.random.default_rng(0).integers(4, 400, (_B, _L)).astype(np.int32)


def _weights():
  shape = _B, _L, 400
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _logits(cfg, params):
  tokens = _tokens()
  positions = np.arange(_L, dtype=np.int32)[None].repeat(_B, 0)
  x = model.forward(cfg, params, tokens, positions, np.ones_like(tokens))
  return attention.softcap(x @ params['embedding'].T, cfg.final_softcap)


def _logits_and_gradients(cfg, params):
  def weighted(params):
    logits = _logits(cfg, params)
    return jnp.sum(logits * _weights()), logits

  grads, logits = jax.jit(jax.grad(weighted, has_aux=True))(params)
  return np.asarray(logits), parameters.flatten(grads)


def _error(found, expected):
  found = np.asarray(found, np.float64)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.transformers
@pytest.mark.skipif(
  not _PYTHON.exists(), reason=f'{_PYTHON} is not there: see the Makefile'
)
def test_values_gradients_and_greedy_tokens_are_transformers(tmp_path):
  given = {'tokens': _tokens(), 'weights': _weights()}
  for name in SHAPES:
    _write(tmp_path / name, name)
    np.savez(tmp_path / f'{name}.npz', **given)
  oracle = _ROOT / 'tests' / 'fixtures' / 'gemma4_oracle.py'
  subprocess.run(
    [_PYTHON, oracle, *(tmp_path / name for name in SHAPES)],
    check=True,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  )
  for name, cfg in SHAPES.items():
    params = tiny_gemma4.params(cfg)
    theirs = dict(np.load(tmp_path / f'{name}.npz'))
    logits, grads = _logits_and_gradients(cfg, params)
    print(
      name,
      _error(logits, theirs['logits']),
      theirs['logits'][0, -1, :8].tolist(),
    )
    assert _error(logits, theirs.pop('logits')) < 1e-5, name
    prompt = batching.Prompt(_tokens()[0, : _L // 2].tolist(), limit=24)
    settings = batching.Settings(cfg, search.Search(), (1,), batch_size=1)
    ((best,),) = batching.decode_all(settings, decode.unstack(params), [prompt])
    assert best.tokens == [t for t in theirs.pop('made') if t != 1], name
    for place in hf._places('model.', cfg):
      if place.row.name == 'scale':  # A buffer there: it has no gradient.
        continue
      x = grads[place.row.path]
      x = np.asarray(x if place.layer is None else x[place.layer])
      x = x.T if place.row.transposed else x
      assert _error(x, theirs.pop(place.name)) < 1e-5, (name, place.name)
    assert not theirs, name


@tiny_gemma4.each_shape
def test_a_folder_comes_back_and_is_the_same_function(tmp_path, name):
  cfg, params = _write(tmp_path / 'a', name)
  found, read = hf_fixture.load(tmp_path / 'a')
  assert found == cfg
  jax.tree.map(np.testing.assert_array_equal, read, params)
  logits = jax.jit(functools.partial(_logits, cfg))(read)[0, -1, :6]
  np.testing.assert_allclose(logits, _GOLDEN[name], atol=5e-6)


@pytest.mark.parametrize(
  ('name', 'piece', 'found'),
  [
    ('12b', '<|channel>', True),
    ('e2b', '<|channel>', False),
    ('12b', '<unused0>', False),
  ],
)
def test_a_model_tells_its_prompt_of_an_empty_thought(
  tmp_path, name, piece, found
):
  _write(tmp_path / 'a', name)
  path = tmp_path / 'tokenizer.model'
  proto = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  del proto.trainer_spec.user_defined_symbols[:]
  (old,) = (p for p in proto.pieces if p.piece == '<unused0>')
  old.piece = piece
  path.write_bytes(proto.SerializeToString())
  tok = hf_fixture.open_folder(tmp_path / 'a', path).tokenizer
  assert tok.empty_thought == found


def _rewrite(folder, change):
  path = folder / 'config.json'
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(change(fields)))


def test_a_folder_of_version_5_24_is_understood(tmp_path):
  """It writes the shape of global layers for each of them."""
  for name in ('e2b', '12b'):
    cfg, _ = _write(tmp_path / name, name)
    shape = {'head_dim': 16}
    if cfg.global_kv_heads:
      shape['num_key_value_heads'] = cfg.global_kv_heads

    def change(fields, shape=shape, cfg=cfg):
      del fields['global_head_dim'], fields['num_global_key_value_heads']
      layers = range(2, cfg.num_layers, 3)
      return fields | {'per_layer_config': {f'{n:02}': shape for n in layers}}

    _rewrite(tmp_path / name, change)
    assert hf_fixture.open_folder(tmp_path / name).config == cfg
    _rewrite(tmp_path / name, lambda f: f | {'global_head_dim': 32})
    load = functools.partial(hf_fixture.load, tmp_path / name)
    refusal(load, 'per_layer_config')


@pytest.mark.parametrize('kind', ('gemma4', 'gemma4_unified'))
def test_the_text_model_of_a_multimodal_one(tmp_path, kind):
  """With a tower, and keys and values that sharing layers never read."""
  folder = tmp_path / 'a'
  cfg, params = _write(folder, 'e4b')
  tensors = safetensors_numpy.load_file(folder / 'model.safetensors')
  tensors['model.layers.8.self_attn.k_proj.weight'] = np.ones((32, 24), 'f4')
  tensors['model.layers.8.self_attn.k_norm.weight'] = np.ones(16, 'f4')
  tensors = {
    n.replace('model.', 'model.language_model.', 1): x
    for n, x in tensors.items()
  }
  tensors['model.vision_tower.patch_embedder.weight'] = np.ones(3, 'f4')
  # The 12B has no tower.
  tensors['model.vision_embedder.pos_embedding'] = np.ones((4, 2, 8), 'f4')
  tensors['model.embed_audio.embedding_projection.weight'] = np.ones(3, 'f4')
  safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
  _rewrite(
    folder,
    lambda fields: {
      'model_type': kind,
      'text_config': fields
      | {
        'model_type': f'{kind}_text',
        'use_bidirectional_attention': 'vision',
      },
    },
  )
  found, read = hf_fixture.load(folder)
  assert found == cfg
  jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'enable_moe_block': True}, ('mixture of experts', '12B or 31B')),
    ({'use_bidirectional_attention': 'all'}, ('use_bidirectional',)),
    ({'num_kv_shared_layers': 4}, ('num_kv_shared_layers is 4', 'whole')),
    ({'num_kv_shared_layers': 9}, ('num_kv_shared_layers is 9',)),
    ({'layer_types': ['full_attention'] * 9}, ('layer_types',)),
    ({'vocab_size_per_layer_input': 399}, ('per_layer_input is 399', '400')),
    ({'rope_parameters': {'full_attention': {'rope_type': 'yarn'}}}, ('rope',)),
    (
      {
        'rope_parameters': {
          'full_attention': {
            'rope_type': 'proportional',
            'rope_theta': 1e6,
            'partial_rotary_factor': 1.5,
          },
          'sliding_attention': {'rope_theta': 1e4},
        }
      },
      ('partial_rotary_factor is 1.5, a number above 0, at most 1, expected',),
    ),
    # transformers fills nothing in.
    *(
      ({'rope_parameters': rope}, ('rope_theta is None',))
      for rope in (
        {'sliding_attention': {'rope_theta': 1e4}},
        {'full_attention': {'rope_theta': 1e6}},
        {'full_attention': {}, 'sliding_attention': {'rope_theta': 1e4}},
        {'full_attention': {'rope_theta': 1e6}, 'sliding_attention': None},
      )
    ),
    ({'attn_logit_softcapping': 50.0}, ('attn_logit_softcapping is 50.0',)),
    ({'hidden_activation': 'gelu'}, ('hidden_activation is gelu',)),
  ],
  ids=str,
)
def test_what_is_not_computed_is_refused(tmp_path, change, words):
  _write(tmp_path / 'a', 'e2b')
  _rewrite(tmp_path / 'a', lambda fields: fields | change)
  path = tmp_path / 'a' / 'config.json'
  refusal(lambda: hf_fixture.load(tmp_path / 'a'), path, *words)


# Google's own layout.


def _layer_arrays(cfg, layer):
  """The arrays of a layer, as gemma/gm/nn/gemma4/_modules.py has them."""

  def heads(x, of):  # [D, heads * A] -> [heads, D, A]
    return np.asarray(x).reshape(24, of, cfg.head_dim).transpose(1, 0, 2)

  kv_heads = cfg.num_kv_heads
  out = {
    'pre_attention_norm/scale': layer['attn_norm'],
    'post_attention_norm/scale': layer['post_attn_norm'],
    'pre_ffw_norm/scale': layer['ffw_norm'],
    'post_ffw_norm/scale': layer['post_ffw_norm'],
    'skip_scale': layer['scale'],
    'attn/query_norm/scale': layer['q_norm'],
    'attn/key_norm/scale': layer.get('k_norm', np.ones(cfg.head_dim)),
    'attn/q_einsum/w': heads(layer['q'], 4),
    'attn/attn_vec_einsum/w': layer['o'].reshape(4, cfg.head_dim, 24),
    'mlp/gating_einsum/w': np.stack([layer['gate'].T, layer['up'].T]),
    'mlp/linear/w': layer['down'],
  }
  k = heads(layer.get('k', np.ones((24, kv_heads * cfg.head_dim))), kv_heads)
  if cfg.keys_are_values:
    out['attn/k_einsum/w'] = k
  else:
    v = heads(layer['v'], kv_heads) if 'v' in layer else k
    out['attn/kv_einsum/w'] = np.stack([k, v])
  if cfg.layer_input_dim:
    out |= {
      'per_layer_input_gate/w': layer['input_gate'],
      'per_layer_projection/w': layer['input_proj'],
      'post_per_layer_input_norm/scale': layer['post_input_norm'],
    }
  return out


@tiny_gemma4.each_shape
def test_an_orbax_checkpoint_is_read(tmp_path, monkeypatch, name):
  cfg, params = SHAPES[name], tiny_gemma4.params(SHAPES[name])
  monkeypatch.setattr(sizes, 'SIZES', sizes.SIZES | {'tiny': cfg})
  flat = {
    'embedder/input_embedding': params['embedding'],
    'final_norm/scale': params['final_norm'],
    'embedder/audio_input_projection/w': np.ones(3),
  }
  if cfg.layer_input_dim:
    e = (cfg.num_layers, cfg.layer_input_dim)
    flat |= {
      'embedder/per_layer_embeddings': params['layer_input_embedding'].reshape(
        400, *e
      ),
      'embedder/per_layer_model_projection/w': params[
        'layer_input_proj'
      ].reshape(24, *e),
      'embedder/per_layer_projection_norm/scale': params['layer_input_norm'],
    }
  for stack in cfg.stacks():
    for i, n in enumerate(stack.layers):
      layer = {k: x[i] for k, x in params[stack.name].items()}
      arrays = _layer_arrays(stack.cfg, layer)
      flat |= {f'layer_{n}/{k}': x for k, x in arrays.items()}
  tree = {}  # Flat, but for the last part of a name.
  for key, x in flat.items():
    module, _, last = f'transformer/{key}'.rpartition('/')
    tree.setdefault(module, {})[last] = jnp.asarray(x, jnp.float32)
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'checkpoint', tree)
  weights = flax.open_folder(tmp_path)
  assert weights.config == cfg
  read = load.read(weights, jax.random.key(0))[0]
  jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_flax_layout_is_not_written(tmp_path):
  cfg = SHAPES['12b']
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  refusal(
    lambda: flax_out.write(tmp_path, cfg, tiny_gemma4.params(cfg), tok),
    'Gemma 4',
    '--to=hf',
  )
