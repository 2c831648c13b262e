"""Tokenizers: read from files, trained on the sample."""

import io

from hypothesis import example
from hypothesis import given
from hypothesis import settings
import pytest
import sentencepiece

from mt.data import bitext
from mt.data import corpus
from mt.data import tokenizer
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures.refusal import refusal


def _processor(proto):
  spm = sentencepiece.SentencePieceProcessor()
  spm.LoadFromSerializedProto(proto)
  return spm


# From a file.


def test_from_file_reads_a_model(tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(gguf_fixture.train_proto())
  tok = tokenizer.from_file(path)
  assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, 2)
  assert tok.proto == gguf_fixture.train_proto()
  original = _processor(gguf_fixture.train_proto())
  controls = {original.id_to_piece(i) for i in tok.controls.values()}
  assert controls == {*tok.controls} >= {'<start_of_turn>', '<unused0>'}
  assert not controls & {'<b>', '\n', '<0x0A>'}
  for text in nasty.TEXTS:
    ids = tok.encode(text)
    if any(piece in text for piece in controls):
      assert not {*ids} & {*tok.controls.values()}
      assert tok.decode(ids) == text
    else:
      assert ids == original.encode(text)


def test_a_missing_file_is_refused(tmp_path):
  path = tmp_path / 'none.model'
  refusal(lambda: tokenizer.from_file(path), path, 'No such file')
  refusal(lambda: tokenizer.from_file(tmp_path), tmp_path, 'directory')


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'{"version": "1.0", "model": {"type": "BPE"}}\n',
    bytes(100),
    gguf_fixture.train_proto()[:-100],
    gguf_fixture.train_proto()[50:],
  ],
  ids=('empty', 'json', 'zeros', 'cut', 'headless'),
)
def test_garbage_is_refused(tmp_path, data):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(data)
  refusal(lambda: tokenizer.from_file(path), path, 'not a SentencePiece model')


@pytest.mark.parametrize(
  ('pad', 'bos', 'eos'),
  # The first is what SentencePiece trains unless told otherwise.
  [(-1, 1, 2), (1, -1, 2), (1, 2, -1)],
  ids=('pad', 'BOS', 'EOS'),
)
def test_a_model_without_a_special_id_is_refused(tmp_path, pad, bos, eos):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b c d', 'd c b a']),
    model_writer=out,
    vocab_size=20,
    hard_vocab_limit=False,
    unk_id=0,
    pad_id=pad,
    bos_id=bos,
    eos_id=eos,
    minloglevel=2,
  )
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(out.getvalue())
  refusal(lambda: tokenizer.from_file(path), path, f'{pad}, {bos}, {eos}')


# Trained.


@pytest.fixture(scope='module')
def sample():
  """Both sides of every bundled pair."""
  files = sorted(corpus.SAMPLE.glob('*/*.tsv'))
  assert len(files) == 3
  texts = [bitext.open_bitext([file], 'en-fr') for file in files]
  return [side for text in texts for side in corpus.some_texts(text)]


@pytest.fixture(scope='module')
def trained(sample):
  return tokenizer.train(sample, 512)


def test_training_is_deterministic(sample, trained):
  assert tokenizer.train(sample, 512).proto == trained.proto
  assert (trained.pad_id, trained.eos_id, trained.bos_id) == (0, 1, 2)
  assert trained.spm.unk_id() == 3
  assert trained.vocab_size == 512
  # Few texts give a small vocabulary.
  assert 256 < tokenizer.train(['a b c', 'c b a'], 512).vocab_size < 512


def test_the_sample_survives_the_round_trip(sample, trained):
  for text in sample:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & {0, 1, 2, 3}


def test_a_trained_tokenizer_adds_no_space(trained):
  # Decoding would take a dummy prefix off again, so that no round trip shows
  # it; but "French:" would not be followed by the same tokens as in Gemma.
  pieces = trained.spm.encode(' a  b', out_type=str)
  assert ''.join(pieces) == '\u2581a\u2581\u2581b'
  assert ''.join(trained.spm.encode('a', out_type=str)) == 'a'


def test_training_pays(sample, trained):
  # Spelt in bytes, one token each, nothing would be learned.
  tokens = sum(len(trained.encode(text)) for text in sample)
  assert tokens < 0.6 * sum(len(text.encode()) for text in sample)


@settings(max_examples=100, deadline=None)
@given(nasty.ANY)
@example('\u2581')
def test_any_text_survives_the_round_trip(trained, text):
  # Rare characters are spelt in bytes. U+2581 is SentencePiece's own sign for a
  # space, the one character that it cannot keep.
  decoded = trained.decode(trained.encode(text))
  assert decoded == text.replace('\u2581', ' ')


def test_more_characters_than_pieces_are_spelt_in_bytes():
  # The debug model has 512 pieces; Japanese alone has more characters.
  texts = [chr(0x4E00 + i) + chr(0x4E00 + 7 * i % 999) for i in range(999)]
  tok = tokenizer.train(texts, 512)
  assert tok.vocab_size <= 512
  for text in texts:
    assert tok.decode(tok.encode(text)) == text
