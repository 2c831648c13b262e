"""Hugging Face folders: the same model in and out, or one clear refusal."""

import json
import struct
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from mt.weights import hf_config
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures.refusal import refusal

_ARCHS = ('gemma', 'gemma2', 'gemma3')


# In.


@pytest.mark.parametrize(
  ('arch', 'dtype'), list(zip(_ARCHS, hf_fixture.DTYPES, strict=True))
)
def test_a_folder_comes_back_bit_for_bit(tmp_path, arch, dtype):
  dtype = hf_fixture.DTYPES[dtype]
  cfg, params = hf_fixture.write_folder(
    tmp_path, arch, hf_fixture.seven_layers(arch), dtype=dtype
  )
  expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  config, found = hf_fixture.load(tmp_path)
  assert config == cfg
  hf_fixture.assert_same(found, expected)


@pytest.mark.parametrize(
  'prefix', ('', 'model.', 'language_model.model.', 'model.language_model.')
)
def test_any_prefix_is_found(tmp_path, prefix):
  _, params = hf_fixture.write_folder(tmp_path, prefix=prefix)
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


def _multimodal(tmp_path, text, vision, prefix, tower):
  """A folder such as google/gemma-3-4b-pt; vision has a file of its own."""
  cfg, params = hf_fixture.write_folder(tmp_path, prefix=prefix)
  (tmp_path / 'model.safetensors').unlink()
  whole = hf_fixture.tensors('gemma3', params, prefix=prefix)
  extra = {f'{tower}vision_tower.encoder.layers.0.weight': vision}
  extra[f'{tower}multi_modal_projector.mm_input_projection_weight'] = vision
  hf_fixture.write_shards(tmp_path, [whole, extra])
  fields = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  return cfg, params


@pytest.mark.parametrize(
  ('prefix', 'tower'),
  [('language_model.model.', ''), ('model.language_model.', 'model.')],
  ids=('published', 'newer'),
)
def test_vision_is_not_read(tmp_path, prefix, tower):
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  text = hf_fixture.config_json('gemma3', cfg)
  _, params = _multimodal(tmp_path, text, np.ones(9, 'f4'), prefix, tower)
  config, found = hf_fixture.load(tmp_path)
  assert config == cfg
  assert hf_fixture.open_folder(tmp_path).multimodal
  hf_fixture.assert_same(found, params)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


@pytest.mark.parametrize(
  ('whole', 'multimodal'),
  [
    ({'model_type': 'gemma3_text', 'num_hidden_layers': 9}, False),
    ({'model_type': 'gemma3'}, True),
    (
      {'model_type': 'gemma3', 'text_config': {'model_type': 'gemma3_text'}},
      True,
    ),
    (
      {'model_type': 'gemma4', 'text_config': {'model_type': 'gemma4_text'}},
      True,
    ),
    ({'model_type': 'gemma2'}, False),
  ],
)
def test_whether_there_are_towers(tmp_path, whole, multimodal):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(whole))
  assert hf_config.read(path).multimodal is multimodal


def test_vision_in_the_same_file_is_left_alone(tmp_path):
  _, params = hf_fixture.write_folder(tmp_path, prefix='language_model.model.')
  whole = hf_fixture.tensors('gemma3', params, prefix='language_model.model.')
  # A type that numpy does not have: reading it would fail.
  header, data = hf_fixture.split_file(safetensors.numpy.save(whole))
  header['vision_tower.x'] = {
    'dtype': 'F8_E4M3',
    'shape': [8],
    'data_offsets': [len(data), len(data) + 8],
  }
  hf_fixture.write_raw(tmp_path / 'model.safetensors', header, data + bytes(8))
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


def test_several_files_are_one_model(tmp_path):
  _, params = hf_fixture.write_folder(tmp_path)
  whole = load_file(tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors').unlink()
  names = sorted(whole)
  shards = [{n: whole[n] for n in names[i::3]} for i in range(3)]
  hf_fixture.write_shards(tmp_path, shards)
  (tmp_path / 'consolidated.safetensors').write_bytes(b'of another program')
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


def test_links_into_a_cache_are_followed(tmp_path):
  # The Hub's cache has links to ../../blobs.
  _, params = hf_fixture.write_folder(tmp_path / 'blobs')
  (tmp_path / 'snapshot').mkdir()
  for file in (tmp_path / 'blobs').iterdir():
    (tmp_path / 'snapshot' / file.name).symlink_to(file)
  hf_fixture.assert_same(hf_fixture.load(tmp_path / 'snapshot')[1], params)


# What is missing, or does not fit.


def test_a_pickle_is_refused(tmp_path):
  hf_fixture.write_folder(tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x02}q\x00.')
  refusal(
    lambda: hf_fixture.load(tmp_path),
    tmp_path,
    'pickle',
    'run code',
    'save_pretrained',
  )


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
  _, params = hf_fixture.write_folder(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x02}q\x00.')
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


@pytest.mark.parametrize(
  ('file', 'words'),
  [
    ('config.json', ('config.json', 'whole folder')),
    ('model.safetensors', ('no .safetensors', 'whole folder')),
    ('tokenizer.model', ('tokenizer.json', 'weights.tokenizer')),
  ],
)
def test_a_missing_file_is_refused(tmp_path, file, words):
  hf_fixture.write_folder(tmp_path)
  (tmp_path / file).unlink()
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, *words)


def _change(tmp_path, change, arch='gemma3'):
  """A folder whose tensors went through `change` (dict -> dict)."""
  hf_fixture.write_folder(tmp_path, arch)
  path = tmp_path / 'model.safetensors'
  save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
  'name',
  [
    'model.embed_tokens.weight',
    'model.norm.weight',
    'model.layers.0.mlp.up_proj.weight',
    'model.layers.1.self_attn.k_norm.weight',
  ],
)
def test_a_missing_tensor_is_refused(tmp_path, name):
  _change(tmp_path, lambda t: {k: v for k, v in t.items() if k != name})
  word = 'embed_tokens' if 'embed' in name else name
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, word, 'complete')


@pytest.mark.parametrize(
  ('name', 'turn'),
  [
    ('model.embed_tokens.weight', lambda x: x[:, :16]),
    ('model.layers.0.self_attn.q_proj.weight', lambda x: x.T),
    ('model.layers.1.input_layernorm.weight', lambda x: x[:1]),
    ('model.layers.1.mlp.down_proj.weight', lambda x: x[0]),
    ('model.norm.weight', lambda x: x[None]),
  ],
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, turn):
  def change(tensors):
    return tensors | {name: np.ascontiguousarray(turn(tensors[name]))}

  _change(tmp_path, change)
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, name, 'the model')


@pytest.mark.parametrize('dtype', (np.float64, np.int8, np.uint8))
def test_quantised_weights_are_refused(tmp_path, dtype):
  name = 'model.layers.0.mlp.up_proj.weight'
  _change(tmp_path, lambda t: t | {name: t[name].astype(dtype)})
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, name, 'quantised')


@pytest.mark.parametrize(
  'name',
  [
    'model.layers.0.self_attn.q_proj.bias',
    'model.layers.0.self_attn.q_proj.weight.absmax',
    'model.layers.0.self_attn.q_proj.lora_A.weight',
    'model.layers.2.input_layernorm.weight',
    'lm_head.bias',
    'score.weight',
    'model.score.weight',
    'model.rotary_emb.cos',
    'model.embed_tokens_per_layer.weight',
    'model.vision.embed.weight',
    'base_model.model.lora_A.weight',
    'thinker.conv.weight',
  ],
)
def test_no_tensor_is_passed_over(tmp_path, name):
  _change(tmp_path, lambda t: t | {name: np.ones(3, np.float32)})
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, name, 'no part')


def _with_head(tmp_path, change, prefix='', config=None, dtype=np.float32):
  """A folder with a head of its own: `change` (embedding -> head)."""
  hf_fixture.write_folder(tmp_path, config=config, prefix=f'{prefix}model.')
  path = tmp_path / 'model.safetensors'
  tensors = load_file(path)
  head = change(tensors[f'{prefix}model.embed_tokens.weight'])
  rates = {f'{prefix}model.rotary_emb.inv_freq': np.ones(8, np.float32)}
  save_file(tensors | rates | {f'{prefix}lm_head.weight': head}, path)


@pytest.mark.parametrize('prefix', ('', 'language_model.'))
@pytest.mark.parametrize('tied', (None, True, False))
def test_a_head_that_is_the_embedding_is_fine(tmp_path, prefix, tied):
  config = {'tie_word_embeddings': tied}
  _with_head(tmp_path, lambda x: x, prefix, config)
  hf_fixture.load(tmp_path)


@pytest.mark.parametrize(
  'change',
  [
    lambda x: np.concatenate([x[:-1], x[-1:] + 1]),
    lambda x: x[:-1],
    lambda x: x[:, :-1],
    lambda x: x[0],
    lambda x: x.astype(ml_dtypes.bfloat16),
  ],
  ids=('one row', 'short', 'narrow', 'flat', 'rounded'),
)
def test_a_head_of_its_own_is_refused_by_name(tmp_path, change):
  _with_head(tmp_path, lambda x: np.ascontiguousarray(change(x)))
  words = 'head lm_head.weight', 'model.embed_tokens.weight'
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, *words)


def test_gemma_2_is_not_taken_for_gemma_1(tmp_path):
  # Gemma 1 calls its one norm before the feed-forward as Gemma 2 calls the one
  # after attention: a wrong model_type would compute something else.
  hf_fixture.write_folder(tmp_path, 'gemma2', config={'model_type': 'gemma'})
  refusal(
    lambda: hf_fixture.load(tmp_path),
    tmp_path,
    'feedforward_layernorm',
    'no part',
  )


def test_one_tensor_in_two_files_is_refused(tmp_path):
  _, params = hf_fixture.write_folder(tmp_path)
  whole = load_file(tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors').unlink()
  save_file(whole, tmp_path / 'a.safetensors')
  save_file(
    {'model.norm.weight': params['final_norm']}, tmp_path / 'b.safetensors'
  )
  refusal(
    lambda: hf_fixture.load(tmp_path),
    tmp_path,
    'model.norm.weight',
    'a.safetensors',
  )


def test_weights_in_one_file_and_in_parts_are_refused(tmp_path):
  hf_fixture.write_folder(tmp_path)
  whole = load_file(tmp_path / 'model.safetensors')
  hf_fixture.write_shards(tmp_path, [{n: 2 * x for n, x in whole.items()}])
  refusal(
    lambda: hf_fixture.load(tmp_path),
    tmp_path,
    'model.safetensors is in it, and model-00001-of-00001.safetensors as well',
  )


def test_a_missing_part_of_several_is_refused(tmp_path):
  hf_fixture.write_folder(tmp_path)
  whole = load_file(tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors').unlink()
  names = sorted(whole)
  shards = [{n: whole[n] for n in names[i::2]} for i in range(2)]
  hf_fixture.write_shards(tmp_path, shards)
  (tmp_path / 'model-00001-of-00002.safetensors').unlink()
  refusal(lambda: hf_fixture.load(tmp_path), tmp_path, 'complete')


# Hostile files.


def _info(shape, begin, end, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


# The library checks them; here is seen that its complaint becomes a sentence.
_ABSURD = {
  'size beyond the file': {'a': _info([2**40], 0, 2**42)},
  'overlapping': {'a': _info([1], 0, 4), 'b': _info([1], 0, 4)},
  'overflow': {'a': _info([2**62, 2**62], 0, 16)},
  'unknown type': {'a': _info([4], 0, 16, 'F33')},
  'not an object': b'[]',
  'no JSON': b'{' * 64,
}


@pytest.mark.parametrize('what', _ABSURD)
def test_an_absurd_header_is_refused(tmp_path, what):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  hf_fixture.write_raw(path, _ABSURD[what], bytes(16))
  tracemalloc.start()
  try:
    refusal(lambda: hf_fixture.load(tmp_path), path, 'fetch it again')
    assert tracemalloc.get_traced_memory()[1] < 2**22
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('size', (0, 7, 1000, -1))
@pytest.mark.parametrize('claimed', (None, 2**64 - 1, 2**40))
def test_a_cut_file_is_refused(tmp_path, size, claimed):
  hf_fixture.write_folder(tmp_path)
  path = tmp_path / 'model.safetensors'
  data = path.read_bytes()
  header = data[:8] if claimed is None else struct.pack('<Q', claimed)
  path.write_bytes((header + data[8:])[:size])
  refusal(lambda: hf_fixture.load(tmp_path), path, 'fetch it again')
