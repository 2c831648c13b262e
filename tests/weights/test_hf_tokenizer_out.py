"""tokenizer.json: the same ids as the SentencePiece model, out and in.

And out of a GGUF vocabulary.
"""

import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.data import tokenizer
from mt.weights import gguf
from mt.weights import gguf_file
from mt.weights import hf_tokenizer
from mt.weights import hf_tokenizer_out
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.fixtures import tiny_gguf
from tests.weights import tokenizers


@pytest.fixture(scope='module')
def of_gguf(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'a.gguf'
  tiny_gguf.write(path)
  return gguf.read_tokenizer(gguf_file.open_gguf(path))


@pytest.fixture(scope='module', params=('tokenizer.json', 'gguf'))
def rebuilt(request, written, of_gguf):
  if request.param == 'gguf':
    return of_gguf
  return hf_tokenizer.read(written / 'tokenizer.json', 400)


def test_pieces_and_special_ids_come_back(rebuilt, original):
  assert rebuilt.vocab_size == original.vocab_size == 400
  # Gemma's: pad 0, EOS 1, BOS 2, unknown 3, in every generation.
  for tok in (rebuilt, original):
    assert hf_tokenizer.ids_of_roles(tok) == [0, 1, 2, 3]
  ours = sp_pb2.ModelProto.FromString(rebuilt.proto).pieces
  theirs = sp_pb2.ModelProto.FromString(original.proto).pieces
  for a, b in zip(ours, theirs, strict=True):
    assert (a.piece, a.type) == (b.piece, b.type)


def test_nasty_texts_are_encoded_as_by_the_original(rebuilt, original):
  for text in nasty.TEXTS:
    tokenizers.assert_same_ids(rebuilt, original, text)
    tokenizers.assert_same_ids(
      rebuilt, original, f'English: {text}\nFrench: {text}'
    )
    # Text never becomes a control token.
    assert not set(rebuilt.encode(text)) & {0, 1, 2}


@settings(max_examples=100, deadline=None)
@given(nasty.ANY)
def test_any_text_is_encoded_as_by_the_original(rebuilt, original, text):
  tokenizers.assert_same_ids(rebuilt, original, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 399)))
def test_any_ids_are_decoded_as_by_the_original(rebuilt, original, ids):
  # Half characters in bytes and special ids in the middle are what an untrained
  # model writes.
  assert rebuilt.decode(ids) == original.decode(ids)


def test_a_gguf_vocabulary_goes_the_same_way(tmp_path, original, of_gguf):
  # Its added tokens have the score -1000 instead of 0.
  hf_tokenizer_out.write(tmp_path, of_gguf)
  assert tokenizers.content_of(tmp_path)['model']['merges']
  again = hf_tokenizer.read(tmp_path / 'tokenizer.json', 400)
  tokenizers.same_everywhere(again, original)


def test_our_own_small_tokenizers_go_the_same_way(tmp_path):
  # Their special pieces are <s> and </s>, as SentencePiece calls them.
  tok = tokenizer.train(nasty.TEXTS * 3, 400)
  hf_tokenizer_out.write(tmp_path, tok)
  again = hf_tokenizer.read(tmp_path / 'tokenizer.json', 400)
  assert (again.bos_id, again.eos_id) == (tok.bos_id, tok.eos_id)
  tokenizers.same_everywhere(again, tok)


def test_the_files_say_what_transformers_needs(written):
  files = {p.name for p in written.iterdir()}
  assert files == {
    'tokenizer.model',
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
  }
  assert (
    written / 'tokenizer.model'
  ).read_bytes() == gguf_fixture.train_proto()
  config = json.loads((written / 'tokenizer_config.json').read_text())
  assert config['add_bos_token'] is True
  assert config['add_eos_token'] is False
  special = json.loads((written / 'special_tokens_map.json').read_text())
  assert special == {
    'bos_token': '<bos>',
    'eos_token': '<eos>',
    'pad_token': '<pad>',
    'unk_token': '<unk>',
  }


@pytest.mark.parametrize(
  'generation',
  [pytest.param('gemma1', marks=pytest.mark.heavy), 'gemma3'],
)
def test_tokenizer_json_gives_the_real_tokenizers(tmp_path, generation):
  original = real_tokenizers.original(generation)
  texts = real_tokenizers.texts(1 if generation == 'gemma1' else 5)
  hf_tokenizer_out.write(tmp_path, original)
  rebuilt = hf_tokenizer.read(tmp_path / 'tokenizer.json', original.vocab_size)
  assert rebuilt.proto != original.proto  # It is not simply the file beside.
  real_tokenizers.assert_same(rebuilt, original, texts)
