"""A tokenizer -> tokenizer.json of Hugging Face, and what stands beside it.

The format: mt/weights/hf_tokenizer.py.
"""

import json
import pathlib

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import files
from mt.data import tokenizer
from mt.weights import hf_tokenizer


def write(
  folder: pathlib.Path, tok: tokenizer.Tokenizer, chat_template: str = ''
) -> None:
  """Writes tokenizer.model and the files that transformers reads.

  A chat template is written where programs of today look for it, and where
  older ones do.

  Raises:
    OSError: the disk is full or not writable.
  """
  proto = sp_pb2.ModelProto.FromString(tok.proto)
  pieces = [p.piece for p in proto.pieces]
  ids = zip(hf_tokenizer.ROLES, hf_tokenizer.ids_of_roles(tok), strict=True)
  special = {f'{role}_token': pieces[i] for role, i in ids}
  (folder / 'tokenizer.model').write_bytes(tok.proto)
  # Indented it takes twice as long, for 500,000 merges.
  fast = json.dumps(_fast(proto, tok, special), ensure_ascii=False)
  files.write(folder / 'tokenizer.json', fast + '\n')
  files.write_json(folder / 'special_tokens_map.json', special)
  chat = {'chat_template': chat_template} if chat_template else {}
  if chat:
    (folder / 'chat_template.jinja').write_text(chat_template, 'utf-8')
  files.write_json(
    folder / 'tokenizer_config.json',
    special
    | chat
    | {
      'tokenizer_class': 'GemmaTokenizer',
      'add_bos_token': True,
      'add_eos_token': False,
      'clean_up_tokenization_spaces': False,
      'spaces_between_special_tokens': False,
      'model_max_length': 10**30,  # As the published ones: no limit.
    },
  )


def _fast(proto, tok, special):
  """The content of tokenizer.json."""
  vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
  if '\t' not in vocab and '<0x09>' in vocab:
    # Gemma 1 and 2 have runs of tabs, but no tab, which merges must name.
    vocab = {'\t' if p == '<0x09>' else p: i for p, i in vocab.items()}
  added = [
    _added_token(i, p)
    for i, p in enumerate(proto.pieces)
    if p.type in (tokenizer.UNKNOWN, tokenizer.CONTROL, tokenizer.USER_DEFINED)
  ]
  to_space = {'pattern': {'String': hf_tokenizer.SPACE}, 'content': ' '}
  bos = special['bos_token']
  first, second = (
    [
      {'SpecialToken': {'id': bos, 'type_id': i}},
      {'Sequence': {'id': name, 'type_id': i}},
    ]
    for i, name in enumerate('AB')
  )
  return {
    'version': '1.0',
    'added_tokens': added,
    'normalizer': hf_tokenizer.TO_VISIBLE,
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': first,
      'pair': first + second,
      'special_tokens': {
        bos: {'id': bos, 'ids': [tok.bos_id], 'tokens': [bos]}
      },
    },
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', **to_space},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
      ],
    },
    'model': {
      'type': 'BPE',
      'unk_token': special['unk_token'],
      'fuse_unk': True,
      'byte_fallback': proto.trainer_spec.byte_fallback,
      'vocab': vocab,
      'merges': _merges(proto, vocab),
    },
  }


def _added_token(i, piece):
  symbol = piece.type == tokenizer.USER_DEFINED
  return {
    'id': i,
    'content': piece.piece,
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    # Runs of spaces are looked for where spaces are U+2581 already.
    'normalized': symbol,
    'special': not symbol or piece.piece in tokenizer.TURNS,
  }


def _merges(proto, vocab):
  """All pairs of pieces that make a piece, by its score, as transformers."""
  out = []
  for p in proto.pieces:
    if p.type not in (tokenizer.NORMAL, tokenizer.USER_DEFINED):
      continue
    piece = p.piece
    score = 0.0 if p.type == tokenizer.USER_DEFINED else p.score
    for at in range(1, len(piece)):
      left, right = piece[:at], piece[at:]
      if left in vocab and right in vocab:
        out.append((-score, -len(left), -len(right), left, right))
  out.sort(key=lambda x: x[:3])
  return [list(x[3:]) for x in out]
