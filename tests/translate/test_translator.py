"""Text in, text out."""

import dataclasses
import functools
import math
import pathlib
import types

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import default
from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.translate import batching
from mt.translate import decode
from mt.translate import loops
from mt.translate import mbr
from mt.translate import search as search_lib
from mt.translate import translator as translator_lib
from mt.weights import pretrained
from tests.translate import tiny

SHARED = pathlib.Path(__file__).parents[3] / 'shared' / 'tokenizers'
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')
BARE = template_lib.Template('{source}\n')


@functools.cache
def _tokenizer():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  pairs = bitext.open_bitext([path], 'en-fr').read()
  texts = [t for p in pairs for t in (p.source, p.target)]
  return tokenizer.train(texts, sizes.SIZES['debug'].vocab_size)


@functools.cache
def _with_newlines():
  """As Gemma's own: runs of newlines are pieces, next to the byte <0x0A>."""
  proto = sp_pb2.ModelProto.FromString(_tokenizer().proto)
  for piece in ('\n', '\n\n', '\n\n\n'):
    proto.pieces.add(piece=piece, score=0.0, type=4)  # User-defined.
  return tokenizer.from_proto(proto.SerializeToString(), 'newlines')


# A model that answers with a given text, whatever the prompt.

_SCRIPT_SIZE = sizes.ModelConfig(
  vocab_size=_tokenizer().vocab_size + 3,
  num_layers=1,
  embed_dim=24,
  hidden_dim=4,
  num_heads=1,
  num_kv_heads=1,
  head_dim=2,
  query_scale=1.0,
)


def _zeros(cfg):
  return jax.tree.map(
    lambda shape: np.zeros(shape, np.float32),
    parameters.unflatten(parameters.shapes(cfg)),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _script(*ids):
  """Parameters by which each of these tokens is followed by the next.

  All layers are zero, so that the logits of token u after t are proportional to
  the product of their embeddings. Token n of the script is 3^n (e[n-1] + e[n]):
  that gives 3^(2n + 1) with its successor, 2 * 3^(2n) with itself, and less
  with all others. The last token is followed by itself, for ever.
  """
  assert len(set(ids)) == len(ids) < _SCRIPT_SIZE.embed_dim
  params = _zeros(_SCRIPT_SIZE)
  for n, i in enumerate(ids):
    params['embedding'][i, max(0, n - 1) : n + 1] = 3.0**n
  return params


def _piece(text):
  return _with_newlines().spm.piece_to_id(text)


def _translator(cfg, tok, template, *limits, search=None, batch_size=4):
  stops = translator_lib.stop_ids(tok, template)
  search = search or search_lib.Search()
  settings = batching.Settings(cfg, search, stops, batch_size)
  return translator_lib.Translator(settings, tok, template, *limits)


def _scripted(template, max_ratio=0.0001, max_extra=12):
  tok = _with_newlines()
  return _translator(_SCRIPT_SIZE, tok, template, max_ratio, max_extra)


def _answer(template, *ids, texts=('Hi!',)):
  """What the translator makes of a model that says `ids`."""
  tok = _with_newlines()
  last = template_lib.prompt_ids('Hi!', tok, template)[-1]
  return _scripted(template)(_script(last, *ids), texts)


def _bonjour():
  return _with_newlines().encode(' Bonj')


def test_eos_ends_a_translation():
  tok = _with_newlines()
  (text,) = _answer(PLAIN, *_bonjour(), tok.eos_id, _piece('x'))
  assert text == 'Bonj'  # Without the space, which is the template's.


@pytest.mark.parametrize('stop', ['<0x0A>', '\n', '\n\n', '\n\n\n'])
def test_a_new_line_ends_a_translation(stop):
  assert _answer(PLAIN, *_bonjour(), _piece(stop), _piece('x')) == ['Bonj']


@pytest.mark.parametrize(
  ('source', 'expected'),
  [('Hi!', 'Bonj'), ('Hi!\n', 'Bonj'), ('a\nb', 'Bonj\nx'), ('a\n\nb', None)],
)
def test_a_translation_has_as_many_lines_as_its_source(source, expected):
  tok = _with_newlines()
  said = [*_bonjour(), _piece('\n'), _piece('x'), _piece('\n\n'), _piece('e')]
  answers = _answer(PLAIN, *said, tok.eos_id, texts=[source, '', 'Hi!'])
  assert answers == [expected or 'Bonj\nx', '', 'Bonj']


def test_a_model_that_stops_at_once():
  assert _answer(PLAIN, _with_newlines().eos_id, _piece('x')) == ['']


def test_a_translation_is_one_line():
  """Other line breaks than LF, which bytes can spell, become spaces."""
  u2028 = [_piece(f'<0x{byte:02X}>') for byte in '\u2028'.encode()]
  tok = _with_newlines()
  said = [_piece('a'), _piece('<0x0D>'), _piece('b'), *u2028, _piece('c')]
  assert _answer(PLAIN, *said, tok.eos_id) == ['a b c']
  # Bytes that are no UTF-8 are shown as such and end nothing.
  (text,) = _answer(PLAIN, _piece('a'), u2028[0], _piece('b'), tok.eos_id)
  assert text == 'a\ufffdb'


def test_the_prefix_is_taken_off_once():
  tok = _with_newlines()
  assert tok.spm.id_to_piece(_bonjour()[0]).startswith('\u2581')
  template = template_lib.Template(PLAIN.prompt, ' B')
  assert _answer(template, *_bonjour(), tok.eos_id) == ['onj']


def test_n_best_translations_with_scores():
  search = search_lib.Search(beam=3, n_best=3, length_penalty=2.0)
  translator = _translator(_CFG, _tokenizer(), BARE, 0.1, 5, search=search)
  params = _random_params()
  one, empty = translator.n_best(params, ['why', ' '])
  assert translator(params, ['why', ' ']) == [one[0].text, '']
  assert empty == [translator_lib.Translation('', 0.0, 0.0)]
  assert len({t.text for t in one}) == 3
  assert [t.score for t in one] == sorted((t.score for t in one), reverse=True)
  for t in one:
    lengths = [(t.log_probability / t.score) ** 0.5]
    np.testing.assert_allclose(lengths, np.round(lengths), rtol=1e-4)
    assert 1 <= lengths[0] < 6.5


def test_length_is_limited_by_the_source():
  """A model that never stops, the symptom of an EOS that was not learned."""
  tok = _with_newlines()
  sources = ['x', 'lol no', 'why would you even do this', '']
  last = template_lib.prompt_ids('x', tok, BARE)[-1]
  texts = _scripted(BARE, 1.5, 3)(_script(last, _piece('e')), sources)
  for source, text in zip(sources[:3], texts[:3], strict=True):
    assert text == 'e' * (math.floor(1.5 * len(tok.encode(source))) + 3)
  assert len(set(map(len, texts))) == 4 and texts[3] == ''


@pytest.mark.parametrize(
  ('source', 'ids', 'number'),
  [
    ('x', ['e', 'a'], 1),  # For ever.
    ('x', ['e', '</s>'], 0),
    ('x', ['e', '\n', 'a'], 0),
    ('a\nb', ['e', '\n', 'a'], 1),
    ('a\nb', ['e', '\n', 'a', '\n\n', 'x'], 0),  # Whole, and goes on.
  ],
)
def test_what_is_cut_off_is_said(source, ids, number):
  tok, said = _with_newlines(), []
  last = template_lib.prompt_ids('x', tok, PLAIN)[-1]
  translator = dataclasses.replace(_scripted(PLAIN), say=said.append)
  params, texts = _script(last, *map(_piece, ids)), [source, '']
  found = translator.n_best(params, texts)
  assert [best.cut_off for best, *_ in found] == [bool(number), False]
  translator(params, texts)
  told = [f'{number} of 2 translations reached'] if number else []
  assert [line[: len(told[0])] for line in said] == told


# Texts through a random model, which answers each differently.

TEXTS = [
  'Hi!',
  '',
  'lol no',
  'someone in the quiet car is watching',
  '   ',
  'THIS IS FINE 🔥🔥',
  'a',
  'مرحبا hello',
  '\u00a0\u2028',
  'the mint has taken over. We live in its garden now, send help ' * 2,
  'Hi!',
  '[link](https://example.com)',
  'why',
]
EMPTY = [i for i, text in enumerate(TEXTS) if not text.strip()]


_CFG = dataclasses.replace(
  tiny.FAMILIES['gemma3'], vocab_size=_tokenizer().vocab_size
)


@functools.cache
def _random_params():
  table = np.random.default_rng(1).normal(size=(_CFG.vocab_size, 24))
  table = table.astype(np.float32) / 5
  return decode.unstack(tiny.stacked() | {'embedding': table})


@functools.cache
def _random():
  return _translator(_CFG, _tokenizer(), BARE, 0.25, 8)


def _translate(texts):
  return _random()(_random_params(), texts)


@functools.cache
def _alone():
  """Each text through the translator without any other."""
  return [_translate([text])[0] for text in TEXTS]


def _buckets(texts):
  prompts = [template_lib.prompt_ids(t, _tokenizer(), BARE) for t in texts]
  return [batching.bucket(len(p)) for p in prompts]


def test_one_line_in_one_line_out_in_order():
  seen = []
  out, _ = _random().translate(_random_params(), TEXTS, seen.append)
  assert out == _alone()
  assert [i for i, text in enumerate(out) if not text] == EMPTY
  assert all(len(text.splitlines()) <= 1 for text in out)
  assert all(text == text.strip() for text in out)
  # Were most of them the same, the order would not show.
  assert len(set(out)) == len(set(TEXTS)) - len({TEXTS[i] for i in EMPTY}) + 1
  assert len(set(_buckets(TEXTS))) == 2
  # Progress counts every one.
  assert seen == sorted(set(seen)) and seen[-1] == len(TEXTS)
  assert len(seen) >= 4 and seen[0] > len(EMPTY)


def test_neighbours_and_order_change_nothing():
  order = np.random.default_rng(0).permutation(len(TEXTS))
  out = _translate([TEXTS[i] for i in order])
  assert out == [_alone()[i] for i in order]
  # A call of its own for each half, and batches of another make-up.
  half = len(TEXTS) // 2
  assert _translate(TEXTS[:half]) + _translate(TEXTS[half:]) == _alone()


def test_the_one_most_like_all_is_taken():
  texts = TEXTS[:4]
  drawn = search_lib.Search(temperature=0.7, n_best=3)
  translator = dataclasses.replace(_random(), sampling=drawn)
  sampler = _translator(_CFG, _tokenizer(), BARE, 0.25, 8, search=drawn).n_best(
    _random_params(), texts
  )
  seen = []
  found = translator.n_best(_random_params(), texts, seen.append)
  for best, samples, greedy in zip(found, sampler, _alone(), strict=False):
    candidates = [greedy, *(s.text for s in samples if samples[0].text)]
    (scores,) = mbr.expected_chrf([''], [candidates])
    chosen = mbr.rank(candidates, scores)[0]
    assert len(best) == 1 and best[0].text == candidates[chosen]
    assert best[0].score == (scores[chosen] if candidates != [''] else 0.0)
  assert [t.text for best in found for t in best] != _alone()[:4]
  assert seen == sorted(seen) and seen[-1] == len(texts)

  # Another metric is given each source and its candidates.
  def shortest(sources, candidates):
    assert sources == [text for text in texts if text.strip()]
    assert [len(c) for c in candidates] == [4] * len(sources)
    return [-np.array([*map(len, c)]) for c in candidates]

  found = dataclasses.replace(translator, expected=shortest)(
    _random_params(), texts
  )
  for text, samples, greedy in zip(found, sampler, _alone(), strict=False):
    assert len(text) == min(
      len(x) for x in (greedy, *(s.text for s in samples))
    )


def test_what_goes_round_is_made_again():
  """The script's last token follows itself for ever."""
  tok, said = _with_newlines(), []
  last = template_lib.prompt_ids('x', tok, BARE)[-1]
  params, piece = _script(last, _piece('e')), _piece('e')
  scripted = dataclasses.replace(_scripted(BARE, 1.5, 40), say=said.append)
  texts = ['x', '', 'x' + 'e' * 60]
  plain = scripted(params, texts)
  assert plain[0] == 'e' * 41 and 'round' not in said.pop()
  found = dataclasses.replace(scripted, retry_ngram=2)(params, texts)
  assert found[1:] == plain[1:]  # The last one's source goes round as well.
  tokens = tok.encode(found[0])
  assert not loops.goes_round('x', found[0]) and piece in tokens
  assert said[0].startswith('1 of 2 translations went round')
  assert said[0].endswith(', 0 still do')


def test_what_is_made_again_is_ranked_as_the_rest_is(monkeypatch):
  """All by expected chrF; and nobody's own no_repeat_ngram is loosened."""
  asked, said, loop = [], [], 'oui ' * 20

  def made(self, settings, search, params, work, on_progress):
    texts = [loop]
    if search.temperature:
      texts = [loop, loop, 'oui, non']
    elif len(asked) % 3 == 2:
      texts = ['oui non']
    asked.append(search.no_repeat_ngram)
    return [[translator_lib.Translation(t, -9.0, -9.0) for t in texts]]

  monkeypatch.setattr(translator_lib.Translator, '_decode', made)
  drawn = search_lib.Search(temperature=1.0, n_best=3)
  for own, used in ((0, 4), (1, 1), (6, 4)):
    search = search_lib.Search(no_repeat_ngram=own, n_best=3)
    translator = dataclasses.replace(
      _translator(_CFG, _tokenizer(), BARE, 1.0, 1, search=search),
      **{'sampling': drawn, 'retry_ngram': 4, 'say': said.append},
    )
    (found,) = translator.n_best({'layers': ()}, ['yes'])
    texts = 'oui non', 'oui, non'
    (expected,) = mbr.expected_chrf([''], [texts])
    assert {t.text: t.score for t in found} == dict(
      zip(texts, expected, strict=True)
    )
    assert asked[-1] == used and f'_ngram={used}, 0 still' in said[-1]


def test_nothing_to_translate(monkeypatch):
  # Nothing may be compiled for it.
  monkeypatch.setattr(batching, 'init', None)
  assert _translate([]) == []
  assert _translate(['', ' \u3000']) == ['', '']


def test_limits_are_of_the_source_alone(monkeypatch):
  """BOS and the newline are no part of it."""
  seen = []
  hypotheses = [[batching.Hypothesis([], 1, 0.0, 0.0)]] * 2
  monkeypatch.setattr(
    batching,
    'decode_all',
    lambda settings, params, prompts, on_done: (
      seen.extend(prompts) or hypotheses
    ),
  )
  translator = _scripted(BARE, 1.5, 2)
  out = translator.n_best(_script(5, 6), ['a', '', 'lol'], first=100)
  assert [[t.text for t in n] for n in out] == [['']] * 3
  for prompt, text, number in zip(seen, ('a', 'lol'), (100, 102), strict=True):
    source = _with_newlines().encode(text)
    ids = template_lib.prompt_ids(text, _with_newlines(), BARE)
    assert len(source) == len(ids) - 2
    assert prompt == batching.Prompt(ids, int(1.5 * len(source)) + 2, number)


def test_stop_ids():
  tok = _with_newlines()
  pieces = ['</s>', '<end_of_turn>', '<0x0A>', '\n', '\n\n', '\n\n\n']
  stops = translator_lib.stop_ids(tok, BARE)
  assert sorted(stops) == sorted(map(_piece, pieces))
  assert _piece('</s>') == tok.eos_id


def test_stop_ids_of_gemma():
  path = SHARED / 'gemma3' / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  tok = tokenizer.from_file(path)
  pieces = [tok.spm.id_to_piece(i) for i in range(tok.vocab_size)]
  stops = set(translator_lib.stop_ids(tok, BARE))
  # EOS, the end of a turn, the byte, and 31 runs of newlines.
  newlines = {i for i, piece in enumerate(pieces) if '\n' in piece}
  turn = pieces.index('<end_of_turn>')
  assert stops == {1, turn, pieces.index('<0x0A>')} | newlines
  chat = template_lib.Template('{source}', chat=True)
  assert set(translator_lib.stop_ids(tok, chat)) == stops
  assert len(newlines) == 31


def test_the_translator_of_a_config():
  config, tok = default.get_config(), _tokenizer()
  config.template.target_bos = True
  config.train.dtype = 'bfloat16'
  config.decode = {
    'batch_size': 5,
    'max_ratio': 1.25,
    'max_extra': 7,
    'beam': 3,
    'length_penalty': 0.5,
    'no_repeat_ngram': 6,
    'repetition_penalty': 1.5,
    'retry_ngram': 4,
    'mbr': 0,
    'mbr_temperature': 0.5,
  }
  source = types.SimpleNamespace(config=_CFG, tokenizer=tok)
  template = template_lib.from_config(config)
  search = search_lib.Search(
    beam=3, length_penalty=0.5, no_repeat_ngram=6, repetition_penalty=1.5
  )
  stops = translator_lib.stop_ids(tok, template)
  settings = batching.Settings(
    _CFG, search, stops, 5, 'bfloat16', 'the mesh', tok.vocab_size
  )
  found = translator_lib.from_config(config, source, 'the mesh')
  limits = template, 1.25, 7
  wanted = translator_lib.Translator(settings, tok, *limits, retry_ngram=4)
  assert found == wanted
  config.decode.mbr = 9
  found = translator_lib.from_config(config, source, 'the mesh')
  drawn = dataclasses.replace(search, beam=1, length_penalty=1.0)
  drawn = dataclasses.replace(drawn, temperature=0.5, n_best=9)
  assert found == dataclasses.replace(wanted, sampling=drawn)


@pytest.mark.parametrize(
  'template',
  [
    PLAIN,
    BARE,
    template_lib.Template('Into French:\n{source}\n', '', target_bos=True),
    template_lib.Template('Into French: {source}', chat=True),
  ],
)
def test_translation_starts_from_what_training_has(monkeypatch, template):
  tok, seen = _tokenizer(), []
  pairs = [lines.Pair('1', s, 'Salut') for s in ('Hi!', ' two  spaces ', '😀')]

  def nothing(settings, params, prompts, on_done):
    seen.extend(p.tokens for p in prompts)
    return [[batching.Hypothesis([], tok.eos_id, 0.0, 0.0)] for _ in prompts]

  monkeypatch.setattr(batching, 'decode_all', nothing)
  settings = batching.Settings(None, search_lib.Search(), (), batch_size=4)
  translator = translator_lib.Translator(settings, tok, template, 1.0, 1)
  translator({'layers': ()}, [p.source for p in pairs])
  examples = template_lib.encode(pairs, tok, template)
  ends = np.cumsum(examples.sizes)
  begins = ends - examples.sizes
  assert seen == [
    examples.tokens[begin : begin + start].tolist()
    for begin, start in zip(begins, examples.target_starts, strict=True)
  ]


@pytest.mark.parametrize(
  'search',
  [
    search_lib.Search(),
    search_lib.Search(beam=3, n_best=3),
    search_lib.Search(n_best=3, temperature=1.0, top_k=500, top_p=0.99),
  ],
  ids=('greedy', 'beam', 'sampled'),
)
def test_a_row_that_is_no_piece_has_probability_0(search):
  """The published multimodal models have 64 such rows, more than pieces.

  Nor is the end of an image chosen, which Gemma 4 12B writes into texts.
  """
  tok, image = _with_newlines(), 5
  tok = dataclasses.replace(tok, controls=tok.controls | {'<image|>': image})
  pieces, cfg = tok.vocab_size, _SCRIPT_SIZE
  cfg = dataclasses.replace(cfg, vocab_size=pieces + 7)
  params = _zeros(cfg)
  # After any token the last rows are by far the most probable.
  params['embedding'][:, 0] = 1.0
  params['embedding'][pieces:, 0] = params['embedding'][image, 0] = 9.0
  config = default.get_config()
  config.train.dtype, config.template.chat = 'float32', False
  source = pretrained.Source(cfg, tok, None)
  settings = translator_lib.from_config(config, source).settings
  settings = dataclasses.replace(settings, search=search)
  prompt = batching.Prompt(tok.encode('Hi!'), 4)

  def answers(settings):
    params_ = decode.unstack(params, settings.dtype)
    (best,) = batching.decode_all(settings, params_, [prompt], lambda done: 0)
    return best

  found = answers(settings)
  assert len(found) == search.n_best
  assert all(i < pieces and i != image for h in found for i in h.tokens)
  # Of the others, which are equally probable.
  for h in found:
    n = len(h.tokens) + (h.end is not None)
    np.testing.assert_allclose(h.logp, -n * math.log(pieces - 1), rtol=1e-5)
  if search.beam == search.n_best == 1:  # Which wants to, if it may.
    (h,) = answers(dataclasses.replace(settings, pieces=None))
    assert min(h.tokens) >= pieces
