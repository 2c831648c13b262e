"""tokenizer.json as others write it: read, or refused."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.data import tokenizer
from mt.weights import hf_tokenizer
from mt.weights import hf_tokenizer_out
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures.refusal import refusal
from tests.weights import tokenizers


def test_the_knob_takes_one(written, original):
  source = pretrained.open_source(
    'random', 'debug', written / 'tokenizer.json', seed=0, texts=()
  )
  tokenizers.same_everywhere(source.tokenizer, original)


# Other ways to write one.


def test_merges_may_be_texts(tmp_path, written, original):
  content = tokenizers.content_of(written)
  model = content['model']
  model['merges'] = [' '.join(pair) for pair in model['merges']]
  tokenizers.same_everywhere(
    tokenizers.read(tmp_path / 't.json', content), original
  )


def test_added_tokens_need_not_be_in_the_vocabulary(
  tmp_path, written, original
):
  content = tokenizers.content_of(written)
  for token in content['added_tokens']:
    del content['model']['vocab'][token['content']]
  tokenizers.same_everywhere(
    tokenizers.read(tmp_path / 't.json', content), original
  )


def test_tokens_without_a_row_are_left_out(tmp_path, written, original):
  # Gemma 3 270M and 1B list <image_soft_token>, number 262,144.
  content = tokenizers.content_of(written)
  content['added_tokens'].append({'id': 400, 'content': '<image_soft_token>'})
  tok = tokenizers.read(tmp_path / 't.json', content)
  assert tok.vocab_size == 400
  tokenizers.same_everywhere(tok, original)
  tok = tokenizers.read(tmp_path / 't.json', content, rows=464)  # As 4B has.
  assert tok.vocab_size == 401
  assert tok.controls['<image_soft_token>'] == 400
  tokenizers.same_everywhere(tok, original)


def test_symbols_that_no_merge_makes_are_taken_whole(
  tmp_path, written, original
):
  # Files from before 2024 list only the first few as added tokens.
  content = tokenizers.content_of(written)
  content['added_tokens'] = [
    t for t in content['added_tokens'] if t['special'] or t['id'] < 20
  ]
  names = [t['content'] for t in content['added_tokens']]
  assert '<b>' in {
    p['content'] for p in tokenizers.content_of(written)['added_tokens']
  }
  if '<b>' in names:
    content['added_tokens'] = content['added_tokens'][: names.index('<b>')]
  tok = tokenizers.read(tmp_path / 't.json', content)
  for text in ('<b>bold</b>', 'a<b>\n\n<b>', '<mask><unused0>'):
    tokenizers.assert_same_ids(tok, original, text)


def test_a_tab_in_place_of_its_byte(tmp_path, written):
  # As in the files of Gemma 1 and 2, whose models have runs of tabs, no tab.
  m = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  for p in m.pieces:
    if p.piece == '\t':
      p.piece, p.type = '\t\t', 1
  tok = tokenizer.from_proto(m.SerializeToString(), 'x')
  hf_tokenizer_out.write(tmp_path, tok)
  content = tokenizers.content_of(tmp_path)
  assert '<0x09>' not in content['model']['vocab']
  assert ['\t', '\t'] in content['model']['merges']
  again = hf_tokenizer.read(tmp_path / 'tokenizer.json', 400)
  for text in ('\t', 'a\tb', '\t\t', '\t\t\t', *nasty.TEXTS):
    tokenizers.assert_same_ids(again, tok, text)


@pytest.mark.parametrize('form', ('text', 'object'))
def test_special_tokens_are_those_of_the_config(tmp_path, written, form):
  content = tokenizers.content_of(written)
  names = {'bos_token': '[multimodal]', 'pad_token': '<unused0>'}
  fields = {
    k: {'content': v, 'special': True} if form == 'object' else v
    for k, v in names.items()
  }
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
  tok = tokenizers.read(tmp_path / 'tokenizer.json', content)
  assert tok.spm.id_to_piece(tok.bos_id) == '[multimodal]'
  assert tok.spm.id_to_piece(tok.pad_id) == '<unused0>'
  assert tok.spm.id_to_piece(tok.eos_id) == '<eos>'


@pytest.mark.parametrize('beside', (True, False))
@pytest.mark.parametrize(
  'roles',
  [
    {'eos': '<end_of_turn>'},
    {'pad': '<eos>'},
    {'pad': '<unk>'},
    {'pad': '<end_of_turn>', 'eos': '<end_of_turn>'},
  ],
  ids=str,
)
def test_a_role_leaves_a_piece_as_it_is(tmp_path, written, roles, beside):
  # With tokenizer.model beside tokenizer.json, which knows nothing of them.
  original = tokenizer.from_file(written / 'tokenizer.model')
  for name in ('tokenizer.json', 'tokenizer.model')[: 1 + beside]:
    (tmp_path / name).write_bytes((written / name).read_bytes())
  fields = {f'{role}_token': piece for role, piece in roles.items()}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
  tok = hf_tokenizer.read_folder(tmp_path, 400)
  ids = original.spm.piece_to_id
  assert tok.eos_id == ids(roles.get('eos', '<eos>'))
  assert tok.pad_id == ids(roles.get('pad', '<pad>'))
  assert tok.end_ids >= {ids('<eos>'), ids('<end_of_turn>')}
  tokenizers.same_everywhere(tok, original)
  tokenizers.assert_same_ids(
    tok, original, '<start_of_turn>user\nHi<end_of_turn>'
  )
  # And out again.
  hf_tokenizer_out.write(tmp_path, tok)
  again = hf_tokenizer.read_folder(tmp_path, 400)
  assert (again.eos_id, again.pad_id) == (tok.eos_id, tok.pad_id)


# Refusals.


def _set(*path_and_value):
  *path, value = path_and_value

  def change(content):
    level = content
    for key in path[:-1]:
      level = level[key]
    level[path[-1]] = value

  return change


def _swap_id(content):
  vocab = content['model']['vocab']
  vocab['<bos>x'] = 2


def _hole(content):
  vocab = content['model']['vocab']
  vocab[next(p for p, i in vocab.items() if i == 399)] = 400


def _one_merge_a_piece(content):
  model, found = content['model'], {}
  for pair in model['merges']:
    found.setdefault(''.join(pair), pair)
  model['merges'] = [*found.values()]


_LOWER = {'type': 'Lowercase'}
_BROKEN = {
  'another kind': (_set('model', 'type', 'Unigram'), "'Unigram'"),
  'no model': (_set('model', None), 'no vocabulary'),
  'no vocabulary': (_set('model', 'vocab', None), 'no vocabulary'),
  'an id that is text': (_set('model', 'vocab', 'a', '7'), '0, 1, 2'),
  'a negative id': (_set('model', 'vocab', 'new', -1), '0, 1, 2'),
  'a huge id': (_set('model', 'vocab', 'new', 2**60), '0, 1, 2'),
  'a hole': (_hole, '0, 1, 2'),
  'two pieces of one id': (_swap_id, '0, 1, 2'),
  'a merge of three': (_set('model', 'merges', [['a', 'b', 'c']]), 'merges'),
  'a merge of numbers': (_set('model', 'merges', [1]), 'merges'),
  'one merge a piece': (_one_merge_a_piece, 'no merge makes'),
  'added tokens as text': (_set('added_tokens', 'x'), 'added tokens'),
  'an added token without id': (
    _set('added_tokens', [{'content': 'x'}]),
    'added tokens',
  ),
  'no UTF-8': (_set('added_tokens', 5, 'content', '\ud800'), 'UTF-8'),
  'lower case': (
    _set('normalizer', {'type': 'Sequence', 'normalizers': [_LOWER]}),
    'normalizer is',
  ),
  'no normalizer': (_set('normalizer', None), 'normalizer is None'),
  'split digits': (_set('pre_tokenizer', {'type': 'Digits'}), 'pre_tokenizer'),
  'dropout': (_set('model', 'dropout', 0.1), 'dropout is 0.1'),
  'ignored merges': (_set('model', 'ignore_merges', True), 'ignore_merges'),
  'a suffix': (_set('model', 'end_of_word_suffix', '</w>'), '</w>'),
  'a prefix': (_set('model', 'continuing_subword_prefix', '##'), '##'),
  'bytes unused': (_set('model', 'byte_fallback', False), 'byte_fallback'),
  'white space': (_set('added_tokens', 5, 'lstrip', True), 'lstrip of'),
  'no unknown': (_set('model', 'unk_token', 'nowhere'), 'unknown'),
}


@pytest.mark.parametrize('what', _BROKEN)
def test_a_broken_file_is_refused(tmp_path, written, what):
  change, word = _BROKEN[what]
  content = tokenizers.content_of(written)
  change(content)
  path = tmp_path / 'tokenizer.json'
  refusal(
    lambda: tokenizers.read(path, content), path, word, 'weights.tokenizer'
  )


def test_what_the_published_ones_say_is_read(tmp_path, written, original):
  """Of 2024 and later; their spaces are replaced before they could split."""
  content = tokenizers.content_of(written)
  content['model'] |= {'dropout': None, 'ignore_merges': False}
  content['model'] |= {'continuing_subword_prefix': None}
  content['normalizer'] = {
    'type': 'Sequence',
    'normalizers': [content['normalizer']],
  }
  content['pre_tokenizer'] = {
    'type': 'Split',
    'pattern': {'String': ' '},
    'behavior': 'MergedWithPrevious',
    'invert': False,
  }
  tokenizers.same_everywhere(
    tokenizers.read(tmp_path / 't.json', content), original
  )


def test_bytes_that_are_not_all_there_are_refused(tmp_path, written):
  content = tokenizers.content_of(written)
  vocab = content['model']['vocab']
  content['model']['vocab'] = {
    'x' + p if p == '<0x41>' else p: i for p, i in vocab.items()
  }
  path = tmp_path / 'tokenizer.json'
  refusal(lambda: tokenizers.read(path, content), path, 'SentencePiece')


def test_a_chat_template_is_a_file_or_a_field(tmp_path):
  assert hf_tokenizer.chat_template(tmp_path) == ''
  config = tmp_path / 'tokenizer_config.json'
  for field, text in (None, ''), ('{{ a }}', '{{ a }}'):
    config.write_text(json.dumps({'chat_template': field}))
    assert hf_tokenizer.chat_template(tmp_path) == text
  own = tmp_path / 'chat_template.jinja'
  own.write_text('é', 'utf-8')
  assert hf_tokenizer.chat_template(tmp_path) == 'é'
  own.write_bytes('é'.encode()[:1])  # Cut off.
  refusal(lambda: hf_tokenizer.chat_template(tmp_path), own, 'fetch it again')


# Beside a tokenizer.model.


def _beside(folder, original, added, kind='added_tokens.json'):
  """tokenizer.model, with tokens that only other files list."""
  folder.mkdir()
  (folder / 'tokenizer.model').write_bytes(original.proto)
  content = added
  if kind == 'tokenizer_config.json':
    decoder = {str(i): {'content': text} for text, i in added.items()}
    content = {'added_tokens_decoder': decoder}
  (folder / kind).write_text(json.dumps(content))
  return folder


@pytest.mark.parametrize('kind', ('added_tokens.json', 'tokenizer_config.json'))
def test_tokens_added_beside_a_tokenizer_model_are_read(
  tmp_path, written, original, kind
):
  folder = _beside(tmp_path / 'a', original, {'<|tool|>': 400}, kind)
  refusal(
    lambda: hf_tokenizer.read_folder(folder, 464),
    folder,
    '<|tool|>',
    'tokenizer.json',
  )
  content = tokenizers.content_of(written)
  content['added_tokens'].append({'id': 400, 'content': '<|tool|>'})
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  tok = hf_tokenizer.read_folder(folder, 464)
  assert tok.controls['<|tool|>'] == 400
  tokenizers.same_everywhere(tok, original)


@pytest.mark.parametrize(
  ('change', 'text', 'id_'),
  [
    (lambda c: _add_token(c, '<2fr>', 400), '<2fr>', 400),
    (lambda c: _add_token(c, '<2fr>', 6), '<2fr>', 6),
    (lambda c: _add_token(c, 'the', 399), 'the', 399),
  ],
  ids=('added', 'renamed', 'no longer split'),
)
@pytest.mark.parametrize('listed', (True, False))
def test_tokens_of_tokenizer_json_alone_are_read(
  tmp_path, written, original, change, text, id_, listed
):
  # As transformers does, which takes tokenizer.json.
  folder = _beside(tmp_path / 'a', original, {text: id_} if listed else {})
  content = tokenizers.content_of(written)
  change(content)
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  assert original.encode(text) != [id_]
  tok = hf_tokenizer.read_folder(folder, 464)
  # One in brackets is for templates, not for texts.
  found = [tok.controls[text]] if text == '<2fr>' else tok.encode(text)
  assert found == [id_]


def _add_token(content, text, id_):
  """As add_tokens does, or in the place of the piece that had the number."""
  content['added_tokens'] = [
    t for t in content['added_tokens'] if t['id'] != id_
  ] + [{'id': id_, 'content': text}]
  vocab = content['model']['vocab']
  content['model']['vocab'] = {
    text if i == id_ else p: i for p, i in vocab.items() if p != text
  }
  gone = set(vocab) - set(content['model']['vocab'])
  merges = content['model']['merges']
  content['model']['merges'] = [
    m for m in merges if not gone & {*m, ''.join(m)}
  ]


def test_merges_in_another_order_are_read(tmp_path, written, original):
  # The pieces of tokenizer.model are the same.
  folder = _beside(tmp_path / 'a', original, {})
  content = tokenizers.content_of(written)
  content['model']['merges'].reverse()
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  tok = hf_tokenizer.read_folder(folder, 400)
  alone = tokenizers.read(tmp_path / 't.json', content)
  tokenizers.same_everywhere(tok, alone)
  assert any(tok.encode(x) != original.encode(x) for x in nasty.TEXTS)
  (folder / 'tokenizer.json').write_text(
    json.dumps(tokenizers.content_of(written))
  )
  assert hf_tokenizer.read_folder(folder, 400).proto == original.proto


def test_a_token_that_only_the_config_lists_is_missed(tmp_path, written):
  # transformers would add it to those of tokenizer.json.
  for name in ('tokenizer.json', 'tokenizer.model'):
    (tmp_path / name).write_bytes((written / name).read_bytes())
  decoder = {'added_tokens_decoder': {'400': {'content': '<2fr>'}}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(decoder))
  refusal(lambda: hf_tokenizer.read_folder(tmp_path, 464), tmp_path, '<2fr>')


def test_no_list_of_added_tokens_is_an_empty_one(tmp_path, original):
  (tmp_path / 'tokenizer.model').write_bytes(original.proto)
  path = tmp_path / 'tokenizer_config.json'
  path.write_text(json.dumps({'added_tokens_decoder': None}))
  assert hf_tokenizer.read_folder(tmp_path, 464).proto == original.proto


def test_an_unused_token_with_a_new_name_is_read(tmp_path, original):
  id_ = original.spm.piece_to_id('<unused0>')
  folder = _beside(tmp_path / 'a', original, {'<turn>': id_})
  refusal(lambda: hf_tokenizer.read_folder(folder, 400), '<turn>')


def test_tokens_that_change_nothing_are_none(tmp_path, original):
  # As published: an image has no text, nor always a row; others are pieces.
  added = {'<image_soft_token>': 400, '<unused0>': 6, '  ': 13, '<x>': 500}
  spm = original.spm
  added['<unused0>'] = spm.piece_to_id('<unused0>')
  added['  '] = spm.piece_to_id('\u2581\u2581')
  folder = _beside(tmp_path / 'a', original, added)
  assert hf_tokenizer.read_folder(folder, 464).proto == original.proto
