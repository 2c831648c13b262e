"""Text in, text out, and the scores of it."""

import functools
import io
import math
import pathlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from configs import default
from mt import bitext
from mt import compiling
from mt import corpus
from mt import decode
from mt import errors
from mt import evaluate
from mt import model
from mt import sizes
from mt import template as template_lib
from mt import tokenizer
from mt import translate

SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'tokenizers'
PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')
BARE = template_lib.Template('{source}\n')


@pytest.fixture(autouse=True, scope='module')
def quick_compilation():
  """Compiling is most of what these tests take: without optimising, less."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


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


def _script(*ids):
  """Parameters by which each of these tokens is followed by the next.

  All layers are zero, so that the logits of token u after t are proportional to
  the product of their embeddings. Token n of the script is 3^n (e[n-1] + e[n]):
  that gives 3^(2n + 1) with its successor, 2 * 3^(2n) with itself, and less
  with all others. The last token is followed by itself, for ever.
  """
  assert len(set(ids)) == len(ids) < _SCRIPT_SIZE.embed_dim
  params = jax.tree.map(
    lambda shape: np.zeros(shape, np.float32),
    model.param_shapes(_SCRIPT_SIZE),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  for n, i in enumerate(ids):
    params['embedding'][i, max(0, n - 1) : n + 1] = 3.0**n
  return params


def _piece(text):
  return _with_newlines().spm.piece_to_id(text)


@functools.cache
def _scripted(template, max_ratio=0.0001, max_extra=12):
  return translate.make_translator(
    _SCRIPT_SIZE,
    _with_newlines(),
    template,
    batch_size=4,
    max_ratio=max_ratio,
    max_extra=max_extra,
  )


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


def test_length_is_limited_by_the_source():
  """A model that never stops, the symptom of an EOS that was not learned."""
  tok = _with_newlines()
  sources = ['x', 'lol no', 'why would you even do this', '']
  last = template_lib.prompt_ids('x', tok, BARE)[-1]
  texts = _scripted(BARE, 1.5, 3)(_script(last, _piece('e')), sources)
  for source, text in zip(sources[:3], texts[:3], strict=True):
    assert text == 'e' * (math.floor(1.5 * len(tok.encode(source))) + 3)
  assert len(set(map(len, texts))) == 4 and texts[3] == ''


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


@functools.cache
def _random_params():
  cfg = sizes.SIZES['debug']
  params = model.init_params(cfg, jax.random.key(1))
  # What the layers add outweighs the embedding of the last token, which a model
  # with tied embeddings would only repeat.
  for name in ('post_attn_norm', 'post_ffw_norm'):
    params['layers'][name] += 8.0
  return params


@functools.cache
def _random(batch_size):
  return translate.make_translator(
    sizes.SIZES['debug'],
    _tokenizer(),
    BARE,
    batch_size=batch_size,
    max_ratio=0.25,
    max_extra=8,
  )


def _translate(texts, batch_size=4):
  return _random(batch_size)(_random_params(), texts)


@functools.cache
def _alone():
  """Each text through the translator without any other."""
  return [_translate([text])[0] for text in TEXTS]


def _buckets(texts):
  prompts = [template_lib.prompt_ids(t, _tokenizer(), BARE) for t in texts]
  return [translate.bucket(len(p)) for p in prompts]


def test_one_line_in_one_line_out_in_order():
  out = _translate(TEXTS)
  assert out == _alone()
  assert [i for i, text in enumerate(out) if not text] == EMPTY
  assert all(len(text.splitlines()) <= 1 for text in out)
  assert all(text == text.strip() for text in out)
  # Were most of them the same, the order would not show.
  assert len(set(out)) == len(set(TEXTS)) - len({TEXTS[i] for i in EMPTY}) + 1
  assert len(set(_buckets(TEXTS))) == 2


def test_neighbours_and_order_change_nothing():
  order = np.random.default_rng(0).permutation(len(TEXTS))
  out = _translate([TEXTS[i] for i in order])
  assert out == [_alone()[i] for i in order]
  # A call of its own for each half, and batches of another make-up.
  half = len(TEXTS) // 2
  assert _translate(TEXTS[:half]) + _translate(TEXTS[half:]) == _alone()
  assert _translate(TEXTS * 3) == _alone() * 3


def test_batch_size_changes_nothing():
  short = [i for i, b in enumerate(_buckets(TEXTS)) if b == 32]
  out = _translate([TEXTS[i] for i in short], batch_size=7)
  assert out == [_alone()[i] for i in short]


def test_a_very_long_text():
  text = 'I KNOW its flat. مرحبا 🤡 ' * 12
  assert _buckets([text]) == [512]
  (out,) = _translate([text])
  assert out and len(out.splitlines()) == 1
  assert _translate(['Hi!', text, ''])[1] == out


def test_nothing_to_translate(monkeypatch):
  monkeypatch.setattr(decode, 'greedy', None)  # Nothing may be compiled for it.
  translator = translate.make_translator(
    sizes.SIZES['debug'],
    _tokenizer(),
    BARE,
    batch_size=3,
    max_ratio=1.0,
    max_extra=1,
  )
  assert translator(_random_params(), []) == []
  assert translator(_random_params(), ['', ' \u3000']) == ['', '']


def test_progress_counts_every_sentence():
  seen = []
  _random(4)(_random_params(), TEXTS, seen.append)
  assert seen == sorted(set(seen)) and seen[-1] == len(TEXTS)
  assert len(seen) == 4  # Batches: 9 sentences of one bucket, 1 of the other.
  assert seen[0] == len(EMPTY) + 4


def test_a_bucket_is_traced_once(monkeypatch):
  traces = []
  real = decode.greedy

  def counted(cfg, params, tokens, *args, **kwargs):
    traces.append(tokens.shape)
    return real(cfg, params, tokens, *args, **kwargs)

  monkeypatch.setattr(decode, 'greedy', counted)
  tok = _with_newlines()
  translator = translate.make_translator(
    _SCRIPT_SIZE, tok, BARE, batch_size=3, max_ratio=0.5, max_extra=2
  )
  params = _script(tok.encode('\n')[-1], _piece('e'), tok.eos_id)
  # Every length that a bucket can have, and every number of rows in a batch.
  lengths = [*range(1, 31), 31, 40, 60]
  texts = ['x' * n for n in lengths]
  assert {len(tok.encode(t)) for t in texts} == set(lengths)
  for _ in range(2):
    assert translator(params, texts) == ['e'] * len(texts)
    assert translator(params, texts[:2]) == ['e'] * 2
  assert traces == [(3, 32), (3, 64)]
  # A trace that should not be is an error and no silent compilation.
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with pytest.raises(AssertionError, match='traced'):
    translator(half, texts[:1])


def test_rows_that_fill_up_a_batch_ask_for_nothing(monkeypatch):
  """The loop ends with the last row, so that one of them would prolong it."""
  seen = []

  def nothing(cfg, params, tokens, lengths, limits, stop_ids, **kwargs):
    jax.debug.callback(lambda *x: seen.append(x), lengths, limits)
    return jnp.zeros((3, kwargs['max_new']), jnp.int32), jnp.zeros(3, int)

  monkeypatch.setattr(decode, 'greedy', nothing)
  translator = translate.make_translator(
    _SCRIPT_SIZE,
    _with_newlines(),
    BARE,
    batch_size=3,
    max_ratio=1.0,
    max_extra=2,
  )
  assert translator(_script(5, 6), ['a', '', 'lol']) == [''] * 3
  jax.effects_barrier()
  ((lengths, limits),) = seen
  # Shortest first; BOS and the newline are no part of the source.
  sources = [len(_with_newlines().encode(text)) for text in ('a', 'lol')]
  assert limits.tolist() == [n + 2 for n in sources] + [0]
  # At least 1, as the decoder wants it of every row.
  assert lengths.tolist() == [n + 2 for n in sources] + [1]


def test_jit_once():
  def double(x):
    return 2 * x

  one, other = compiling.jit_once(double), compiling.jit_once(double)
  assert one(np.ones(3)).tolist() == one(np.zeros(3) + 1).tolist() == [2] * 3
  # Another wrapper of the same function has a trace of its own.
  assert other(np.ones(2)).tolist() == [2, 2]
  for changed in (np.ones(2), np.ones(3, np.int32)):
    with pytest.raises(AssertionError, match='traced'):
      one(changed)
  assert one(np.ones(3)).tolist() == [2] * 3  # It can still be used.


@pytest.mark.parametrize(
  ('length', 'width'),
  [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024)],
)
def test_bucket(length, width):
  assert translate.bucket(length) == width


def test_stop_ids():
  tok = _with_newlines()
  pieces = ['</s>', '<0x0A>', '\n', '\n\n', '\n\n\n']
  stops = translate.stop_ids(tok, BARE)
  assert stops.dtype == np.int32
  assert sorted(stops) == sorted(map(_piece, pieces))
  assert _piece('</s>') == tok.eos_id


def test_stop_ids_of_gemma():
  path = SHARED / 'gemma3' / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  tok = tokenizer.from_file(path)
  pieces = [tok.spm.id_to_piece(i) for i in range(tok.vocab_size)]
  stops = set(translate.stop_ids(tok, BARE).tolist())
  # EOS, the byte, and 31 runs of newlines.
  newlines = {i for i, piece in enumerate(pieces) if '\n' in piece}
  assert stops == {1, pieces.index('<0x0A>')} | newlines
  chat = template_lib.Template('{source}', chat=True)
  turn = pieces.index('<end_of_turn>')
  assert set(translate.stop_ids(tok, chat).tolist()) == stops | {turn}
  assert len(newlines) == 31


def test_the_translator_of_a_config(monkeypatch):
  seen = {}
  monkeypatch.setattr(
    translate, 'make_translator', lambda *args, **kw: seen.update(kw, args=args)
  )
  config = default.get_config()
  config.template.target_bos = True
  config.train.dtype = 'bfloat16'
  config.decode = {'batch_size': 5, 'max_ratio': 1.25, 'max_extra': 7}
  source = types.SimpleNamespace(config='the size', tokenizer='the tokenizer')
  translate.from_config(config, source)
  template = template_lib.Template(
    'English: {source}\nFrench:', config.template.target_prefix, target_bos=True
  )
  assert seen == {
    'args': ('the size', 'the tokenizer', template),
    'batch_size': 5,
    'max_ratio': 1.25,
    'max_extra': 7,
    'dtype': jnp.bfloat16,
  }


# The command.


def _command(monkeypatch, given):
  """Runs main on bytes with a translator that shouts."""
  out, calls = io.BytesIO(), []

  def translator(params, texts):
    calls.append(len(texts))
    return [text.upper() for text in texts]

  for module, name, stand_in in (
    (translate.checkpoint, 'load_finetuned', lambda folder: (None, None, None)),
    (translate, 'from_config', lambda config, source: translator),
    (translate.compiling, 'keep_compiled_programs', lambda: None),
    (translate, 'flags', types.SimpleNamespace(FLAGS=mock.Mock(workdir='w'))),
    (sys, 'stdin', types.SimpleNamespace(buffer=io.BytesIO(given))),
    (sys, 'stdout', types.SimpleNamespace(buffer=out)),
  ):
    monkeypatch.setattr(module, name, stand_in)
  translate.main(['translate.py'])
  return out.getvalue().decode(), calls


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_the_command_keeps_lines_apart(monkeypatch, end):
  monkeypatch.setattr(translate, '_LINES_AT_ONCE', 2)
  lines = ['a\u2028b\x85c\x0c', '', ' é "\t', 'd\re', 'last']
  out, calls = _command(monkeypatch, end.join(lines).encode())
  assert out == ''.join(line.upper() + '\n' for line in lines)
  assert calls == [2, 2, 1]
  assert _command(monkeypatch, b'') == ('', [])
  assert _command(monkeypatch, b'\n\n') == ('\n\n', [2])


def test_the_command_names_a_bad_line(monkeypatch):
  with pytest.raises(errors.UserError, match='line 2: not UTF-8'):
    _command(monkeypatch, 'a\ncafé\n'.encode('latin-1'))


# What the pretrained model said, remembered.


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path


class _Counted:
  def __init__(self, texts):
    self.texts, self.calls = texts, 0

  def __call__(self):
    self.calls += 1
    return self.texts


def test_a_second_run_does_not_translate_again(cache):
  texts = ['Salut 😀', '', 'a\u2028b "c"', '\u00a0!']
  make = _Counted(texts)
  key = [{'fingerprint': 1, 'prompt': 'é'}, ['Hi!']]
  assert evaluate.remember(key, make) == texts
  assert evaluate.remember(key, make) == texts
  assert make.calls == 1
  assert any(p.is_file() for p in cache.rglob('*')), 'kept elsewhere'


def test_whatever_decides_the_texts_makes_another_key(cache, monkeypatch):
  make = _Counted(['a'])
  evaluate.remember([1, 'x'], make)
  for n, key in enumerate([[2, 'x'], [1, 'y'], [[1], 'x'], [1, 'x', None]], 2):
    other = _Counted([str(n)])
    assert evaluate.remember(key, other) == [str(n)] and other.calls == 1
  assert evaluate.remember([1, 'x'], make) == ['a'] and make.calls == 1
  # The code of the decoder, of the model or of the translator.
  for changed in (decode, model, translate):
    real = evaluate.inspect.getsource
    with monkeypatch.context() as m:
      m.setattr(
        evaluate.inspect,
        'getsource',
        lambda x, c=changed, r=real: r(x) + '#' * (x is c),
      )
      other = _Counted(['b'])
      assert evaluate.remember([1, 'x'], other) == ['b'], changed.__name__


def test_a_failure_is_not_remembered(cache):
  def fail():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluate.remember('key', fail)
  assert evaluate.remember('key', _Counted(['a'])) == ['a']


def test_a_damaged_file_is_made_again(cache):
  evaluate.remember('key', lambda: ['a'])
  (path,) = (p for p in cache.rglob('*') if p.is_file())
  path.write_text('["a')
  assert evaluate.remember('key', lambda: ['b']) == ['b']
  assert evaluate.remember('key', lambda: ['c']) == ['b']


def test_samples_are_spread_over_the_split():
  columns = [[f'{name}{i}' for i in range(100)] for name in 'srba']
  text = evaluate.samples(*columns)
  blocks = text.split('\n\n')
  assert len(blocks) == 8
  assert blocks[0].split() == (
    ['source', 's0', 'reference', 'r0', 'before', 'b0', 'after', 'a0']
  )
  assert 's99' in blocks[-1] and 's50' not in blocks[-1]
  # Fewer sentences than asked for: each once.
  text = evaluate.samples(*(c[:3] for c in columns))
  assert text.count('source') == 3
