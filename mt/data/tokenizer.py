"""SentencePiece: from a .model file, or trained."""

import collections
from collections.abc import Sequence
import dataclasses
import io
import itertools
import os
import pathlib
import re

from google.protobuf import message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.base import foreign

# SentencePiece's types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# What a template writes, and a model ends its turn with.
TURNS = ('<start_of_turn>', '<end_of_turn>', '<|turn>', '<turn|>')
# Stands for an image in Hugging Face's folders of Gemma 3; no text has it.
IMAGE = '<image_soft_token>'
_ENDS = ('<eos>', '<end_of_turn>', '<turn|>')

# What stands for something else than its characters: in brackets, but no HTML.
_in_brackets = re.compile(
  r'(?!</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong'
  r'|em|b|i|u|s|sub|sup|code|a|html|body|img|span|bbox|ul|li|div|iframe|footer'
  r')>)(?:<.+>|\[.+\])'
).fullmatch


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A SentencePiece model and the ids that the project needs by name.

  A text that spells <end_of_turn> must not end a turn. SentencePiece finds
  pieces of the type `user-defined` in any text, those of the type `control` in
  none: so `spm` has the former as the latter, but for white space and HTML, and
  `controls` has their ids for who wants a real one.
  """

  spm: sentencepiece.SentencePieceProcessor
  proto: bytes  # The model as it was: what stands in `tokenizer.model`.
  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  controls: dict[str, int]  # <start_of_turn>, <unused0>, …
  empty_thought: bool = False  # The model was trained with one before answers.

  def split(self, text: str) -> list[str]:
    """A text of our own, cut before and after each piece of `controls`."""
    # A pattern of all of them, 6,242 of Gemma 3, takes 0.3 s to compile.
    found = [piece for piece in self.controls if piece in text]
    pattern = '|'.join(map(re.escape, sorted(found, key=len, reverse=True)))
    parts = re.split(f'({pattern})', text) if found else [text]
    return [part for part in parts if part]

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone: no BOS, no EOS."""
    return self.spm.encode(text)

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each, on all cores."""
    return self.spm.encode(list(texts), num_threads=os.cpu_count())

  def decode(self, ids: list[int]) -> str:
    return self.spm.decode(ids)

  @property
  def end_ids(self) -> set[int]:
    """What may end a text: EOS, and the end of a turn, whichever is EOS."""
    ids = (self.spm.piece_to_id(piece) for piece in _ENDS)
    return {self.eos_id} | {i for i in ids if i != self.spm.unk_id()}


def from_proto(proto: bytes, where: str) -> Tokenizer:
  """A tokenizer from the bytes of a `tokenizer.model`; `where` they stand.

  Turns are control pieces, whatever type they have there. A piece may have
  several roles.

  Raises:
    errors.UserError: not a SentencePiece model, or one without BOS or EOS.
  """
  spm = sentencepiece.SentencePieceProcessor()
  try:
    model = sp_pb2.ModelProto.FromString(proto)
    controls = {
      p.piece: i
      for i, p in enumerate(model.pieces)
      if (p.type == USER_DEFINED and _in_brackets(p.piece)) or p.piece in TURNS
    }
    for i in controls.values():
      model.pieces[i].type = CONTROL
    spm.LoadFromSerializedProto(model.SerializeToString())
  except (RuntimeError, TypeError, message.DecodeError) as e:
    raise errors.UserError(
      f'{where}: not a SentencePiece model ({str(e).splitlines()[0]}).'
    ) from e
  pad, bos, eos = spm.pad_id(), spm.bos_id(), spm.eos_id()
  if min(pad, bos, eos) < 0:
    # SentencePiece finds control pieces by name (<s>, </s> unless told
    # otherwise); a model put together by other tools may give numbers alone.
    pad, bos, eos = (_role_id(model, role) for role in ('pad', 'bos', 'eos'))
  if min(pad, bos, eos) < 0:
    raise errors.UserError(
      f'{where}: pad, BOS, EOS ids are {pad}, {bos}, {eos}; Gemma needs all '
      'three: use a Gemma tokenizer.'
    )
  return Tokenizer(spm, proto, spm.vocab_size(), pad, bos, eos, controls)


def _role_id(model, role):
  """The number of pad, bos or eos; -1 where there is none."""
  i = getattr(model.trainer_spec, f'{role}_id')
  if not 0 <= i < len(model.pieces):
    return -1
  piece, name = model.pieces[i], getattr(model.trainer_spec, f'{role}_piece')
  named = piece.piece == name and piece.type in (UNKNOWN, USER_DEFINED)
  return i if piece.type == CONTROL or named else -1


def from_file(path: str | pathlib.Path) -> Tokenizer:
  """A tokenizer from a SentencePiece `tokenizer.model`."""
  try:
    proto = pathlib.Path(path).read_bytes()
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read the tokenizer ({e.strerror}).'
    ) from e
  try:
    return from_proto(proto, str(path))
  except errors.UserError:
    foreign.refuse(path, foreign.JSON)
    raise


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
  """A tokenizer with Gemma's settings and ids; few texts give fewer pieces."""
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


def is_control(piece: str, has_role: bool) -> bool:
  """Whether a piece is found in no text.

  All others that are never split are symbols of texts, whatever type a file
  gives them: <end_of_turn>, too, where it is EOS. Gemma has tags of HTML.
  """
  if piece in ('<s>', '</s>'):
    return has_role
  return piece in ('<pad>', '<eos>', '<bos>')


def set_gemma_spec(proto: sp_pb2.ModelProto, ids: Sequence[int]) -> None:
  """Completes a model of pieces alone with the settings of all Gemmas.

  BPE with byte fallback, identity normalisation, no dummy prefix, white space
  kept; `ids` of pad, EOS, BOS and the unknown piece.
  """
  t = proto.trainer_spec
  t.model_type = sp_pb2.TrainerSpec.BPE
  t.vocab_size = len(proto.pieces)
  t.byte_fallback = any(p.type == BYTE for p in proto.pieces)
  set_roles(proto, ids)
  n = proto.normalizer_spec
  n.name = 'identity'
  n.add_dummy_prefix = False
  n.remove_extra_whitespaces = False
  n.escape_whitespaces = True


def set_roles(proto: sp_pb2.ModelProto, ids: Sequence[int]) -> None:
  """Makes these the numbers of pad, EOS, BOS and the unknown piece."""
  t = proto.trainer_spec
  t.pad_id, t.eos_id, t.bos_id, t.unk_id = ids
  t.pad_piece, t.eos_piece, t.bos_piece, t.unk_piece = (
    proto.pieces[i].piece for i in ids
  )
