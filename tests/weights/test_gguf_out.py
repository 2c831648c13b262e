"""GGUF files that are written: what llama.cpp expects, and the same model."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.data import tokenizer
from mt.weights import gguf as weights_gguf
from mt.weights import gguf_file
from mt.weights import gguf_out
from mt.weights import load
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.fixtures.refusal import refusal

_ARCHS = ('gemma', 'gemma2', 'gemma3')


@pytest.fixture(scope='module')
def tok():
  return tokenizer.from_proto(gguf_fixture.train_proto(), 'x')


def _written(path, cfg, params, tok, *args):
  gguf_out.write(path, cfg, params, tok, *args)
  weights = weights_gguf.open_weights(path)
  params, _ = load.read(weights, jax.random.key(0))
  return gguf_file.open_gguf(path), weights.config, params


@pytest.mark.parametrize('dtype', sorted(gguf_out.KINDS))
@pytest.mark.parametrize('arch', _ARCHS)
def test_the_model_comes_back(tmp_path, tok, arch, dtype):
  cfg = hf_fixture.seven_layers(arch)
  params = gguf_fixture.tiny_params(cfg)
  _, read, found = _written(tmp_path / 'a', cfg, params, tok, dtype)
  assert read == cfg
  # The fixture's file, laid out as llama.cpp's converter does.
  path, kind = tmp_path / 'b', gguf_out.KINDS[dtype]
  gguf_fixture.write_gguf(path, cfg, params, tok.proto, arch, kind)
  weights = weights_gguf.open_weights(path)
  expected, _ = load.read(weights, jax.random.key(0))
  hf_fixture.assert_same(found, jax.tree.map(np.asarray, expected))
  same = np.array_equal(found['layers']['q'], params['layers']['q'])
  assert same == (dtype == 'float32')


@pytest.mark.parametrize('arch', _ARCHS)
def test_the_header_is_that_of_the_converter(tmp_path, tok, arch):
  cfg = gguf_fixture.tiny_config(arch, 400)
  params = gguf_fixture.tiny_params(cfg)
  path, template = tmp_path / 'b', '{{ bos_token }}é'
  file, *_ = _written(tmp_path / 'a', cfg, params, tok, 'q8_0', template)
  gguf_fixture.write_gguf(path, cfg, params, tok.proto, arch)
  expected = dict(gguf_file.open_gguf(path).fields)
  found = dict(file.fields)
  for fields in found, expected:
    del fields[f'{arch}.context_length']  # The fixture has one for all.
  kinds = [
    x.pop('tokenizer.ggml.token_type').tolist() for x in (found, expected)
  ]
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)
  assert file.tensors.keys() == gguf_file.open_gguf(path).tensors.keys()
  more = {key for key in found.keys() - expected.keys() if arch not in key}
  assert more == {
    'general.file_type',
    'general.quantization_version',
    'tokenizer.chat_template',
    'tokenizer.ggml.add_eos_token',
    'tokenizer.ggml.eot_token_id',
  }
  assert found['tokenizer.chat_template'] == template
  eot = tok.spm.piece_to_id('<end_of_turn>')
  assert found['tokenizer.ggml.eot_token_id'] == eot
  # The converter calls the unknown piece control, and leaves in texts what is
  # none of Gemma's own.
  different = [i for i, (a, b) in enumerate(zip(*kinds, strict=True)) if a != b]
  pieces = [tok.spm.id_to_piece(i) for i in different]
  assert pieces == ['<unk>', '[multimodal]']


def _assert_same_tokenizer(found, tok, texts):
  pieces = [sp_pb2.ModelProto.FromString(t.proto).pieces for t in (found, tok)]
  for a, b in zip(*pieces, strict=True):
    assert a.piece == b.piece
    assert (a.type == b.type) or a.piece in tokenizer.TURNS, a.piece
    assert a.score == b.score or a.type != tokenizer.NORMAL
  roles = [
    (t.pad_id, t.eos_id, t.bos_id, t.spm.unk_id(), t.controls, t.end_ids)
    for t in (found, tok)
  ]
  assert roles[0] == roles[1]
  assert found.spm.encode(texts) == tok.spm.encode(texts)


def test_the_tokenizer_comes_back(tmp_path, tok):
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  file, *_ = _written(tmp_path / 'a', cfg, gguf_fixture.tiny_params(cfg), tok)
  found = weights_gguf.read_tokenizer(file)
  _assert_same_tokenizer(found, tok, list(nasty.TEXTS))


@pytest.mark.parametrize('generation', ('gemma1', 'gemma3'))
def test_published_tokenizers_come_back(tmp_path, generation):
  tok = real_tokenizers.original(generation)
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config(
      {'gemma1': 'gemma'}.get(generation, generation), tok.vocab_size
    ),
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    embed_dim=2,
    hidden_dim=2,
    query_scale=2**-0.5,
  )
  file, *_ = _written(tmp_path / 'a', cfg, gguf_fixture.tiny_params(cfg), tok)
  found = weights_gguf.read_tokenizer(file)
  _assert_same_tokenizer(found, tok, real_tokenizers.texts(10))


def test_rows_without_a_piece_are_left_out(tmp_path, tok):
  cfg = gguf_fixture.tiny_config('gemma3', 410)
  params = gguf_fixture.tiny_params(cfg)
  _, read, found = _written(tmp_path / 'a', cfg, params, tok)
  assert read == dataclasses.replace(cfg, vocab_size=400)
  np.testing.assert_array_equal(found['embedding'], params['embedding'][:400])


def test_rows_that_are_no_whole_blocks_stay_float32(tmp_path, tok):
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config('gemma3', 400), hidden_dim=80
  )
  params = gguf_fixture.tiny_params(cfg)
  file, *_ = _written(tmp_path / 'a', cfg, params, tok, 'q8_0')
  kinds = gguf.GGMLQuantizationType
  assert file.tensors['blk.0.ffn_down.weight'].kind == kinds.F32
  assert file.tensors['blk.0.ffn_up.weight'].kind == kinds.Q8_0


@pytest.mark.parametrize(
  ('arch', 'change', 'words'),
  [
    ('gemma3', {'attention': 'LLG'}, ('attention', "'LLG'")),
    ('gemma2', {'query_scale': 0.5}, ('query_scale', '0.5')),
    ('gemma', {'final_softcap': 30.0}, ('final_softcap', '30.0')),
  ],
)
def test_a_shape_that_llama_cpp_would_take_for_another(
  tmp_path, tok, arch, change, words
):
  cfg = dataclasses.replace(gguf_fixture.tiny_config(arch, 400), **change)
  params = gguf_fixture.tiny_params(cfg)
  path = tmp_path / 'a'
  refusal(lambda: gguf_out.write(path, cfg, params, tok), *words)
