"""Hugging Face's tokenizer.json -> a SentencePiece model.

Format: github.com/huggingface/tokenizers, as GemmaConverter of transformers
fills it: BPE over characters with byte fallback, the merges in the order of the
scores, and the symbols that are never split as added tokens.
"""

from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import pathlib
import re

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.weights import hf_config

SPACE = '\u2581'
_BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
ROLES = ('pad', 'eos', 'bos', 'unk')
_A_SPACE = {'pattern': {'String': ' '}}
TO_VISIBLE = {'type': 'Replace', **_A_SPACE, 'content': SPACE}
_SPLIT = {'type': 'Split', **_A_SPACE, 'behavior': 'MergedWithPrevious'}
# What stands next to the vocabulary of Gemmas.
_NEXT_TO = {
  'normalizer': (
    TO_VISIBLE,
    {'type': 'Sequence', 'normalizers': [TO_VISIBLE]},
  ),
  # Spaces, of which there are none by then.
  'pre_tokenizer': (None, _SPLIT | {'invert': False}),
}
# What is set of no Gemma's merges, and of none of its added tokens.
_OFF = (
  *('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'),
  'ignore_merges',
)
_TAKES_MORE = 'single_word', 'lstrip', 'rstrip'


def read_folder(folder: pathlib.Path, rows: int) -> tokenizer.Tokenizer:
  """tokenizer.model or, where they differ, tokenizer.json, as transformers.

  Who adds tokens, or gives an <unused0> a name, leaves tokenizer.model as it
  was, and texts would be split otherwise than in training.

  Args:
    folder: of Hugging Face.
    rows: of the embedding, see `read`.

  Raises:
    errors.UserError: damaged, or none that has all tokens.
  """
  model, fast = folder / 'tokenizer.model', folder / 'tokenizer.json'
  if not model.exists() and not fast.exists():
    raise errors.UserError(
      f'{folder}: neither tokenizer.model nor tokenizer.json in it; fetch the '
      'whole folder, or set weights.tokenizer.'
    )
  tok = None
  if model.exists():
    tok = _with_roles(tokenizer.from_file(model), folder)
  if fast.exists() and (tok is None or not _agree(tok, fast, rows)):
    tok = read(fast, rows)
  if added := _added_beside(folder, tok, rows):
    raise errors.UserError(
      f'{folder}: the tokenizer lacks the tokens {", ".join(added)[:80]} that '
      'added_tokens.json or tokenizer_config.json lists; fetch the whole '
      'folder, with its tokenizer.json, or set weights.tokenizer.'
    )
  return tok


def _with_roles(tok, folder):
  """A tokenizer.model, whose roles are those of tokenizer_config.json."""
  spm, ids = tok.spm, ids_of_roles(tok)
  names = _role_pieces(folder, spm.id_to_piece(spm.unk_id()))
  for n, role in enumerate(ROLES):
    i = spm.piece_to_id(names[role])
    if spm.id_to_piece(i) == names[role]:  # Not the unknown piece's.
      ids[n] = i
  if ids == ids_of_roles(tok):
    return tok
  proto = sp_pb2.ModelProto.FromString(tok.proto)
  tokenizer.set_roles(proto, ids)
  where = str(folder / 'tokenizer_config.json')
  return tokenizer.from_proto(proto.SerializeToString(), where)


def ids_of_roles(tok: tokenizer.Tokenizer) -> list[int]:
  """The ids of ROLES, in their order."""
  return [tok.pad_id, tok.eos_id, tok.bos_id, tok.spm.unk_id()]


def _agree(tok, path, rows):
  """Whether a tokenizer.json merges the pieces of a tokenizer.model as it."""
  _, pieces, symbols, ranks = _parse(path, rows)
  proto = sp_pb2.ModelProto.FromString(tok.proto)
  same = len(pieces) == tok.vocab_size and all(
    p.piece == (piece.replace(' ', SPACE) if i in symbols else piece)
    and (i not in symbols or p.type != tokenizer.NORMAL)
    for i, (p, piece) in enumerate(zip(proto.pieces, pieces, strict=True))
  )
  merged = sorted(
    (ranks[p.piece], -p.score)
    for p in proto.pieces
    if p.type == tokenizer.NORMAL and p.piece in ranks
  )
  return same and all(a[1] <= b[1] for a, b in itertools.pairwise(merged))


def _added_beside(folder, tok, rows):
  """Tokens that have a row and that the tokenizer does not know."""
  own = folder / 'added_tokens.json'
  added = hf_config.read_json(own) if own.exists() else {}
  listed = _config(folder).get('added_tokens_decoder') or {}
  added |= {token['content']: int(i) for i, token in listed.items()}
  return [
    text
    for text, i in added.items()
    if text != tokenizer.IMAGE
    and i < rows
    and (
      i >= tok.vocab_size or tok.spm.id_to_piece(i) != text.replace(' ', SPACE)
    )
  ]


def read(path: pathlib.Path, rows: int) -> tokenizer.Tokenizer:
  """Rebuilds Gemma's SentencePiece model from a tokenizer.json.

  A piece's score is the rank of the first merge that makes it: SentencePiece
  merges by score, tokenizers by rank.

  Args:
    path: of the file; a tokenizer_config.json beside it names pad, BOS and EOS.
    rows: of the embedding. Added tokens past them are left out: the published
      text models of Gemma 3 list one for images that they have no row for.

  Raises:
    errors.UserError: damaged, or not of Gemma's kind.
  """
  model, pieces, symbols, ranks = _parse(path, rows)
  roles = _role_pieces(path.parent, model.get('unk_token'))
  return build(path, pieces, symbols, ranks, roles)


def build(
  path: pathlib.Path,
  pieces: Sequence[str],
  symbols: Container[int],
  ranks: Mapping[str, int],
  roles: Mapping[str, str],
) -> tokenizer.Tokenizer:
  """A SentencePiece model that does what these merges do.

  Args:
    path: of the file, for messages.
    pieces: by id.
    symbols: ids of pieces that are never split.
    ranks: of the first merge that makes a piece.
    roles: pad, eos, bos and unk -> piece.

  Raises:
    errors.UserError: a piece is no text, or a special one is missing.
  """
  rows = []
  for i, piece in enumerate(pieces):
    score, rank = 0.0, ranks.get(piece)
    if piece == roles.get('unk'):
      kind = tokenizer.UNKNOWN
    elif tokenizer.is_control(piece, piece in roles.values()):
      kind = tokenizer.CONTROL
    elif i in symbols:
      kind = tokenizer.USER_DEFINED
    elif _BYTE_PIECE.fullmatch(piece):
      kind = tokenizer.BYTE
    elif rank is None and len(piece) > 1:
      # No merge makes it, so it must be taken whole.
      kind = tokenizer.USER_DEFINED
    else:
      # Single characters come last: no merge makes them.
      kind = tokenizer.NORMAL
      score = -float(len(ranks) + i if rank is None else rank)
    rows.append((piece, score, kind))
  ids = {role: pieces.index(p) for role, p in roles.items() if p in pieces}
  if len(ids) != len(ROLES):
    raise bad(path, f'of pad, EOS, BOS, unknown only {sorted(ids)} found')
  return assemble(path, rows, [ids[role] for role in ROLES])


def assemble(
  path: pathlib.Path,
  rows: Iterable[tuple[str, float, int]],
  ids: Sequence[int],
) -> tokenizer.Tokenizer:
  """A SentencePiece model of pieces, with the settings of all Gemmas.

  Args:
    path: of the file, for messages.
    rows: piece, score and SentencePiece's type.
    ids: of pad, EOS, BOS and the unknown piece.

  Raises:
    errors.UserError: a piece is no text, or has a type that is none.
  """
  proto = sp_pb2.ModelProto()
  for i, (piece, score, kind) in enumerate(rows):
    whole = kind == tokenizer.USER_DEFINED
    text = piece.replace(' ', SPACE) if whole else piece
    try:
      proto.pieces.add(piece=text, score=score, type=kind)
    except ValueError as e:  # A lone surrogate: UnicodeEncodeError.
      what = f'piece {i} is {piece[:40]!r} of type {kind}'
      raise bad(path, f'{what}, no UTF-8 or no type of SentencePiece') from e
  tokenizer.set_gemma_spec(proto, ids)
  return tokenizer.from_proto(proto.SerializeToString(), str(path))


def bad(path: pathlib.Path, what: str) -> errors.UserError:
  """What is wrong with a vocabulary."""
  return errors.UserError(
    f"{path}: {what}; Gemma's BPE with byte fallback expected: set "
    'weights.tokenizer to a tokenizer.model.'
  )


def _parse(path, rows):
  """(model, pieces by id, added tokens by id, ranks of the merges)."""
  whole = hf_config.read_json(path)
  try:
    model = whole['model']
    vocab, merges = model['vocab'], model['merges']
    kind = model.get('type', 'BPE')
    symbols = {
      a['id']: a['content'] + ''
      for a in whole.get('added_tokens', [])
      if a['id'] < rows
    }
    by_id = {i: piece for piece, i in vocab.items()} | symbols
    pieces = [by_id.get(i) for i in range(len(by_id))]
    # Older files have one text with a space in it.
    pairs = [m.split(' ') if isinstance(m, str) else m for m in merges]
    ranks = {}
    for rank, (left, right) in enumerate(pairs):
      ranks.setdefault(left + right, rank)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise bad(
      path, f'no vocabulary, merges and added tokens found ({str(e)[:60]})'
    ) from e
  if kind != 'BPE':
    raise bad(path, f'a tokenizer of type {str(kind)[:40]!r} found')
  _check_function(path, whole)
  unique = len(set(pieces)) == len(pieces) >= len(vocab)
  if not pieces or not all(pieces) or not unique:
    raise bad(path, 'its ids are not 0, 1, 2, …, each of a piece of its own')
  # Those of Gemma 1 and 2 have the tab where the model has its byte.
  tab = vocab.get('<0x08>', -2) + 1 if '<0x09>' not in vocab else -1
  if 0 <= tab < len(pieces) and pieces[tab] == '\t' and tab not in symbols:
    pieces[tab] = '<0x09>'
  _check_merges(path, pieces, symbols, ranks, {(a, b) for a, b in pairs})
  return model, pieces, symbols, ranks


def _check_function(path, whole):
  """Refuses what would split a text otherwise than the merges alone."""
  model, more = whole['model'], {key: whole.get(key) for key in _NEXT_TO}
  spelt = any(map(_BYTE_PIECE.fullmatch, model['vocab']))
  wrong = {key: x for key, x in more.items() if x not in _NEXT_TO[key]}
  wrong |= {key: model[key] for key in _OFF if model.get(key)}
  if bool(model.get('byte_fallback')) != spelt:
    wrong['byte_fallback'] = model.get('byte_fallback')
  for token in whole.get('added_tokens', []):
    name = f'of {token["content"][:40]!r}'
    wrong |= {f'{key} {name}': True for key in _TAKES_MORE if token.get(key)}
  if wrong:
    key, value = next(iter(wrong.items()))
    raise bad(path, f'{key} is {str(value)[:80]}')


def _check_merges(path, pieces, symbols, ranks, pairs):
  """Refuses a piece that not all its pairs make: in SentencePiece they do.

  The trainers of the tokenizers library list one pair of most pieces.
  """
  merged = {
    piece
    for i, piece in enumerate(pieces)
    if i not in symbols and (piece in ranks or len(piece) == 1)
  }
  for piece in filter(merged.__contains__, ranks):
    for at in range(1, len(piece)):
      pair = left, right = piece[:at], piece[at:]
      if left in merged and right in merged and pair not in pairs:
        raise bad(path, f'no merge makes {piece!r} of {left!r} and {right!r}')


def _role_pieces(folder, unknown):
  """pad, eos, bos and unk -> its piece."""
  out, fields = {}, _config(folder)
  for role in ROLES:
    value = fields.get(f'{role}_token')
    if isinstance(value, dict):
      value = value.get('content')
    if role == 'unk' and value is None:
      value = unknown
    out[role] = value if isinstance(value, str) else f'<{role}>'
  return out


def _config(folder):
  path = folder / 'tokenizer_config.json'
  return hf_config.read_json(path) if path.exists() else {}


def chat_template(folder: pathlib.Path) -> str:
  """As a file or in the config, or '' where the folder has none.

  Raises:
    errors.UserError: a file that is not UTF-8.
  """
  own = folder / 'chat_template.jinja'
  if own.exists():
    try:
      return own.read_text('utf-8')
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f'{own}: not UTF-8 ({e}); fetch it again, or remove it.'
      ) from e
  template = _config(folder).get('chat_template')
  return template if isinstance(template, str) else ''
