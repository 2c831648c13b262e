"""Pairs to tokens: the same before the target in training and translation."""

import dataclasses
import functools
import pathlib

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import default
from mt.data import batches
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.translate import batching
from mt.translate import translator as translator_lib
from tests.fixtures.refusal import refusal

SHARED = pathlib.Path(__file__).parents[3] / 'shared' / 'tokenizers'
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')
CHAT = template_lib.Template('Into French: {source}', chat=True)
TURNS = (template_lib.START_OF_TURN, template_lib.END_OF_TURN)


def _pair(source, target='Salut !'):
  return lines.Pair('1', source, target)


@functools.cache
def _tokenizer():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  pairs = bitext.open_bitext([path], 'en-fr').read()
  return tokenizer.train([t for p in pairs for t in (p.source, p.target)], 400)


@functools.cache
def _gemma3():
  path = SHARED / 'gemma3' / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  return tokenizer.from_file(path)


def _nth(examples, i):
  at = slice(*examples.offsets[i : i + 2])
  return examples.tokens[at].tolist()


def _mask(examples, i, padding=0):
  size = int(examples.sizes[i]) + padding
  return batches.build_row(examples, [i], size)['target_mask'].tolist()


def _config(**template):
  config = default.get_config()
  config.template.update(template)
  return config


# The same before the target.

TEMPLATES = {
  'plain': PLAIN,
  'bare': template_lib.Template('{source}\n'),
  'source first': template_lib.Template('{source} =>', ' '),
  'tutorial': template_lib.Template(
    'Translate this into French:\n{source}\n', target_bos=True
  ),
  'chat': CHAT,
  'languages': template_lib.from_config(default.get_config()),
  'braces': template_lib.Template('{"en": "{source}", {0} {{}} {x}\n%s "', '{'),
}
PAIRS = [
  _pair('Hi!'),
  _pair('  two  spaces ', ' deux  espaces\u00a0!'),
  # Text that looks like a special piece, or like a field, is text.
  _pair('<s> or <bos> </s> {source} {0} %s', '</s><pad> {source}'),
  _pair('{target_language} {source_language}', '{target_language}'),
  _pair('😀 مرحبا', '日本'),
]


def _seen_by_the_decoder(monkeypatch, tok, template, texts):
  """The prompts that translation hands to the decoder."""
  seen = []

  def nothing(settings, params, prompts, on_done):
    seen.extend(p.tokens for p in prompts)
    return [[batching.Hypothesis([], tok.eos_id, 0.0, 0.0)] for _ in prompts]

  monkeypatch.setattr(batching, 'decode_all', nothing)
  settings = batching.Settings(None, None, (), batch_size=4)
  translator = translator_lib.Translator(settings, tok, template, 1.0, 1)
  assert translator({'layers': ()}, texts) == [''] * len(texts)
  return seen


@pytest.mark.parametrize('name', TEMPLATES)
def test_translation_starts_from_what_training_has(name, monkeypatch):
  tok, template = _tokenizer(), TEMPLATES[name]
  examples = store.encode(PAIRS, tok, template)
  prompts = [
    _nth(examples, i)[:start] for i, start in enumerate(examples.target_starts)
  ]
  sources = [p.source for p in PAIRS]
  assert prompts == [
    template_lib.prompt_ids(source, tok, template) for source in sources
  ]
  seen = _seen_by_the_decoder(monkeypatch, tok, template, sources)
  assert seen == prompts


@pytest.mark.parametrize('name', TEMPLATES)
def test_an_example_is_bos_prompt_target_end(name):
  tok, template = _tokenizer(), TEMPLATES[name]
  examples = store.encode(PAIRS, tok, template)
  assert len(examples) == len(PAIRS)
  end = tok.spm.piece_to_id(TURNS[1]) if template.chat else tok.eos_id
  second = [tok.bos_id] if template.target_bos else []
  for i, pair in enumerate(PAIRS):
    before, after = template.prompt.split('{source}')
    if template.chat:
      before = f'<start_of_turn>user\n{before}'
      after = f'{after}<end_of_turn>\n<start_of_turn>model\n'
    prompt = tok.encode(before + pair.source + after)
    target = tok.encode(template.target_prefix + pair.target)
    ids = _nth(examples, i)
    assert ids == [tok.bos_id, *prompt, *second, *target, end]
    assert ids.count(tok.bos_id) == 1 + template.target_bos
    assert ids.count(tok.eos_id) == (not template.chat)
    assert examples.target_starts[i] == 1 + len(prompt)
    # Learned: the target with its own BOS and end, and nothing else.
    want = [False] * (1 + len(prompt))
    want += [True] * len([*second, *target, end])
    assert _mask(examples, i, padding=2) == [*want, False, False]
  assert examples.tokens.dtype == examples.target_starts.dtype == np.int32
  assert examples.offsets.dtype == np.int64


def test_the_example_in_the_docstring():
  """With the tokenizer of Gemma 3; kept true, as readers learn from it."""
  tok = _gemma3()
  shown = {
    words[0]: words[1:]
    for line in template_lib.__doc__.splitlines()
    if (words := line.split()) and words[0] in ('tokens', 'target_mask')
  }
  template = template_lib.from_config(default.get_config())
  examples = store.encode([_pair('Hi!', 'Salut !')], tok, template)
  pieces = [tok.spm.id_to_piece(i) for i in _nth(examples, 0)]
  assert [p.replace('\n', '\\n') for p in pieces] == shown['tokens']
  mask = [str(int(m)) for m in _mask(examples, 0)]
  assert mask == shown['target_mask']
  assert mask[-1] == '1'  # EOS.


# Languages.


def test_the_languages_of_the_pair_are_named():
  config = _config(prompt='{target_language} from {source_language}: {source}')
  assert template_lib.from_config(config).prompt == (
    'French from English: {source}'
  )
  config.data.pair = 'JA-de'
  template = template_lib.from_config(config)
  assert template.prompt == 'German from Japanese: {source}'
  # Fields are filled in once, in the template and not in the text.
  text = '{source_language} {target_language} {source}'
  assert template_lib.prompt_text(text, template) == (
    'German from Japanese: ' + text
  )


def test_a_language_can_be_called_otherwise():
  config = _config(source_language='Scots', target_language='français')
  config.data.pair = 'sco-fr'
  assert template_lib.from_config(config).prompt == 'Scots: {source}\nfrançais:'


@pytest.mark.parametrize(
  ('pair', 'code', 'side'),
  [('sco-fr', 'sco', 'source'), ('en-sco', 'sco', 'target')],
)
def test_an_unknown_language_is_refused(pair, code, side):
  config = default.get_config()
  config.data.pair = pair
  refusal(
    lambda: template_lib.from_config(config),
    f'{{{side}_language}}',
    f"'{code}'",
    f'data.pair={pair!r}',
    f'set template.{side}_language.',
  )
  # The advice works, and who names no language needs none.
  config.template[f'{side}_language'] = 'Scots'
  assert 'Scots:' in template_lib.from_config(config).prompt
  config = _config(prompt='=> {source}\n')
  config.data.pair = pair
  assert template_lib.from_config(config).prompt == '=> {source}\n'


def test_every_knob_of_the_template_counts():
  config = _config(prompt='p {source}', target_prefix='_', target_bos=True)
  assert template_lib.from_config(config) == template_lib.Template(
    'p {source}', '_', target_bos=True, chat=False
  )
  config = _config(prompt='p {source}', target_prefix='', chat=True)
  assert template_lib.from_config(config) == template_lib.Template(
    'p {source}', chat=True
  )


# Chat.


def test_chat_is_the_published_form():
  """Golden: ids of Gemma 3's chat template; 105 and 106 are the turns.

  The form is that of ai.google.dev/gemma/docs, "Gemma formatting and system
  instructions".
  """
  tok = _gemma3()
  prompt = CHAT.prompt.replace('{source}', 'Hi there!')
  examples = store.encode([_pair('Hi there!')], tok, CHAT)
  ids = _nth(examples, 0)
  text = ''.join(tok.spm.id_to_piece(i) for i in ids).replace('\u2581', ' ')
  assert text == (
    f'<bos><start_of_turn>user\n{prompt}<end_of_turn>\n'
    '<start_of_turn>model\nSalut !<end_of_turn>'
  )
  user, model = [2, 105, 2364, 107], [106, 107, 105, 4368, 107]
  assert ids == [
    *user,
    *tok.encode(prompt),
    *model,
    *tok.encode('Salut !'),
    106,
  ]
  # All of the answer is learned, its end too, and nothing of the prompt.
  start = ids.index(4368) + 2
  assert _mask(examples, 0) == [i >= start for i in range(len(ids))]
  assert {1, 106} <= set(translator_lib.stop_ids(tok, CHAT))
  assert 106 not in translator_lib.stop_ids(tok, PLAIN)


def test_the_end_of_a_turn_ends_a_translation():
  tok = _tokenizer()
  end = tok.spm.piece_to_id('<end_of_turn>')
  assert template_lib.end_id(tok, CHAT) == end
  assert template_lib.end_id(tok, PLAIN) == tok.eos_id
  assert {end, tok.eos_id} <= set(translator_lib.stop_ids(tok, CHAT))
  assert end not in translator_lib.stop_ids(tok, PLAIN)


@pytest.mark.parametrize('missing', TURNS)
@pytest.mark.parametrize('how', ['gone', 'control'])
def test_a_tokenizer_without_turns_is_refused(missing, how):
  """A control piece is never found in text, so that it would not help."""
  proto = sp_pb2.ModelProto.FromString(_tokenizer().proto)
  del proto.trainer_spec.user_defined_symbols[:]
  (piece,) = (p for p in proto.pieces if p.piece == missing)
  if how == 'gone':
    piece.piece = '<unused0>'
  else:
    piece.type = sp_pb2.ModelProto.SentencePiece.CONTROL
  tok = tokenizer.from_proto(proto.SerializeToString(), 'no turns')
  words = ('template.chat', *TURNS, 'template.chat=False')
  refusal(lambda: store.encode([_pair('Hi!')], tok, CHAT), *words)
  refusal(lambda: translator_lib.stop_ids(tok, CHAT), *words)
  # Without chat nobody minds.
  bare = dataclasses.replace(CHAT, chat=False)
  assert len(store.encode([_pair('Hi!')], tok, bare)) == 1
