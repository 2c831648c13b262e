"""SentencePiece, from a .model file or rebuilt from a GGUF vocabulary."""

import collections
from collections.abc import Sequence
import dataclasses
import io
import itertools
import os
import pathlib
import re

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt import errors
from mt import gguf_file

# Token types of llama.cpp, which are SentencePiece's piece types.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = '\u2581'  # SentencePiece's visible stand-in for a space.


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A SentencePiece model and the ids that the project needs by name.

  Attributes:
    spm: the processor.
    proto: the serialised model, to be written to `tokenizer.model`.
    vocab_size: number of pieces.
  """

  spm: sentencepiece.SentencePieceProcessor
  proto: bytes
  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone: no BOS, no EOS."""
    return self.spm.encode(text)

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each, on all cores."""
    return self.spm.encode(list(texts), num_threads=os.cpu_count())

  def decode(self, ids: list[int]) -> str:
    return self.spm.decode(ids)


def from_proto(proto: bytes, where: str) -> Tokenizer:
  """A tokenizer from a serialised SentencePiece model.

  Args:
    proto: the bytes of a `tokenizer.model`.
    where: file name for error messages.

  Raises:
    errors.UserError: not a SentencePiece model, or one without BOS or EOS.
  """
  spm = sentencepiece.SentencePieceProcessor()
  try:
    spm.LoadFromSerializedProto(proto)
  except (RuntimeError, TypeError) as e:
    raise errors.UserError(
      f'{where}: not a SentencePiece model ({str(e).splitlines()[0]}).'
    ) from None
  pad, bos, eos = spm.pad_id(), spm.bos_id(), spm.eos_id()
  if min(pad, bos, eos) < 0:
    # SentencePiece finds them by name (<s>, </s> unless told otherwise); a
    # model put together by other tools may give their numbers alone.
    spec = sp_pb2.ModelProto.FromString(proto).trainer_spec
    pad, bos, eos = (
      i if 0 <= i < spm.vocab_size() and spm.is_control(i) else -1
      for i in (spec.pad_id, spec.bos_id, spec.eos_id)
    )
  if min(pad, bos, eos) < 0:
    raise errors.UserError(
      f'{where}: pad, BOS, EOS ids are {pad}, {bos}, {eos}; Gemma needs all '
      'three: use a Gemma tokenizer.'
    )
  return Tokenizer(spm, proto, spm.vocab_size(), pad, bos, eos)


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
  """A small tokenizer with Gemma's settings and special ids.

  Args:
    texts: to train on.
    vocab_size: at most this many pieces; few texts give fewer.
  """
  # SentencePiece refuses to train when the characters alone fill the
  # vocabulary, as Japanese would: the rarest are spelt in bytes.
  counts = collections.Counter(itertools.chain.from_iterable(texts))
  rare = {c for c, _ in counts.most_common()[(vocab_size - 260) * 3 // 4 :]}
  if rare:
    split = re.compile(f'[{re.escape("".join(rare))}]+').split
    texts = [part for text in texts for part in split(text)]
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=out,
    model_type='bpe',
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=0.99,  # What is rarer is spelt in bytes.
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    user_defined_symbols=['<start_of_turn>', '<end_of_turn>'],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    num_threads=1,
    minloglevel=2,
  )
  return from_proto(out.getvalue(), 'the trained tokenizer')


def from_file(path: str | pathlib.Path) -> Tokenizer:
  """A tokenizer from a SentencePiece `tokenizer.model`."""
  try:
    proto = pathlib.Path(path).read_bytes()
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read the tokenizer ({e.strerror}).'
    ) from None
  return from_proto(proto, str(path))


def from_gguf(file: gguf_file.GGUFFile) -> Tokenizer:
  """Rebuilds Gemma's SentencePiece model from a GGUF vocabulary.

  GGUF keeps pieces, scores and types, and of the trainer's settings only what
  llama.cpp needs; see set_gemma_spec for the others.

  Raises:
    errors.UserError: the vocabulary is missing or not of SentencePiece's kind.
  """
  f = file.fields
  kind = f.get('tokenizer.ggml.model')
  pieces = f.get('tokenizer.ggml.tokens')
  scores = f.get('tokenizer.ggml.scores')
  types = f.get('tokenizer.ggml.token_type')
  if (
    str(kind) != 'llama'
    or not isinstance(pieces, list)
    or getattr(scores, 'dtype', None) != np.float32
    or getattr(types, 'dtype', None) != np.int32
  ):
    raise errors.UserError(
      f'{file.path}: tokenizer kind {kind!r} found, "llama" (SentencePiece '
      'with scores) expected; set weights.tokenizer to a tokenizer.model.'
    )
  if not len(pieces) == len(scores) == len(types):
    raise errors.UserError(
      f'{file.path}: {len(pieces):,} pieces, {len(scores):,} scores and '
      f'{len(types):,} types do not match; the file is damaged.'
    )
  pad, eos, bos, unk = ids = [
    f.get(f'tokenizer.ggml.{name}_token_id', default)
    for default, name in enumerate(('padding', 'eos', 'bos', 'unknown'))
  ]
  if not all(isinstance(i, int) and 0 <= i < len(pieces) for i in ids):
    raise errors.UserError(
      f'{file.path}: pad, EOS, BOS, unknown ids are {str(ids)[:80]}, numbers '
      f'below {len(pieces):,} expected; the file is damaged.'
    )
  special = {pad: _CONTROL, eos: _CONTROL, bos: _CONTROL, unk: _UNKNOWN}
  m = sp_pb2.ModelProto()
  for i, (piece, score, t) in enumerate(
    zip(pieces, scores.tolist(), types.tolist(), strict=True)
  ):
    # llama.cpp calls <unused…> and <start_of_turn> control tokens; Gemma's own
    # model has them as user-defined symbols. Runs of spaces, user-defined as
    # well, are written as plain spaces here and with U+2581 there.
    t = special.get(i, _USER_DEFINED if t in (_CONTROL, _UNKNOWN) else t)
    try:
      text = piece.decode()
      if t == _USER_DEFINED:
        text = text.replace(' ', _SPACE)
      m.pieces.add(piece=text, score=score, type=t)
    except ValueError:  # UnicodeDecodeError is one.
      raise errors.UserError(
        f'{file.path}: piece {i} is {piece[:40]!r} of type {t}, UTF-8 and a '
        'SentencePiece type expected; the file is damaged.'
      ) from None
  set_gemma_spec(m, ids)
  return from_proto(m.SerializeToString(), str(file.path))


def set_gemma_spec(proto: sp_pb2.ModelProto, ids: Sequence[int]) -> None:
  """Completes a model of pieces alone with the settings of all Gemmas.

  BPE with byte fallback, identity normalisation, no dummy prefix, white space
  kept.

  Args:
    proto: its pieces are there.
    ids: of pad, EOS, BOS and the unknown piece.
  """
  t = proto.trainer_spec
  t.model_type = sp_pb2.TrainerSpec.BPE
  t.vocab_size = len(proto.pieces)
  t.byte_fallback = any(p.type == _BYTE for p in proto.pieces)
  t.pad_id, t.eos_id, t.bos_id, t.unk_id = ids
  t.pad_piece, t.eos_piece, t.bos_piece, t.unk_piece = (
    proto.pieces[i].piece for i in ids
  )
  n = proto.normalizer_spec
  n.name = 'identity'
  n.add_dummy_prefix = False
  n.remove_extra_whitespaces = False
  n.escape_whitespaces = True
