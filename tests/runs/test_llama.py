"""What llama.cpp makes of a GGUF file: `make bench` compiles it.

It is in an environment of its own, .venv-bench, whose Python answers for it.
"""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import pytest

from mt.data import template
from mt.data import tokenizer
from mt.export import __main__ as export
from mt.translate import translator
from mt.weights import gguf_out
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import nasty
from tests.runs import test_transformers

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / '.venv-bench' / 'bin' / 'python'
_LLAMA = list(_ROOT.glob('.venv-bench/lib/python*/site-packages/llama_cpp'))

pytestmark = [
  pytest.mark.transformers,
  pytest.mark.skipif(
    not _LLAMA, reason='llama.cpp is not in .venv-bench: see the Makefile'
  ),
]

_CODE = """
import json, sys
import llama_cpp
path, prompt, limit, texts = json.loads(sys.argv[1])
F32 = 0  # Of ggml's types.
model = llama_cpp.Llama(path, n_ctx=512, verbose=False, type_k=F32, type_v=F32)
made = []
for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
  made.append(token)
  ended = llama_cpp.llama_vocab_is_eog(model._model.vocab, token)
  if ended or len(made) == limit:
    break
ids = [model.tokenize(t.encode(), special=False) for t in texts]
print(json.dumps([made, ids]))
"""


def _ask(path, prompt, limit=24, texts=()):
  """(greedy tokens with the one that ends them, ids of texts)."""
  job = json.dumps([str(path), prompt, limit, texts])
  done = subprocess.run(
    [_PYTHON, '-c', _CODE, job], capture_output=True, check=True, text=True
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize('arch', ('gemma', 'gemma2', 'gemma3'))
def test_the_same_greedy_tokens(tmp_path, arch):
  cfg = hf_fixture.seven_layers(arch)
  params = gguf_fixture.tiny_params(cfg)
  params['embedding'] *= 0.02
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  path, texts = tmp_path / 'a.gguf', list(nasty.TEXTS)
  gguf_out.write(path, cfg, params, tok)
  prompt = list(range(10, 66))  # More tokens than the window of 24.
  made, ids = _ask(path, prompt, texts=texts)
  params = jax.tree.map(jnp.asarray, params)
  ends = tuple(tok.end_ids)
  expected = test_transformers.greedy(cfg, params, prompt, 24, ends)
  assert [i for i in made if i not in ends] == expected
  assert len(set(made)) > 4
  different = [
    text
    for text, found in zip(texts, ids, strict=True)
    # It takes what stands for a space inside for one.
    if found != [tok.bos_id, *tok.encode(text)] and '\u2581' not in text
  ]
  assert not different


def test_a_chat_is_served_as_the_run_translates(tmp_path):
  cfg, params, proto = test_transformers.ending_model()
  path = gguf_fixture.write_gguf(tmp_path / 'a.gguf', cfg, params, proto)
  t = test_transformers.chat_run(tmp_path / 'run', path, proto)
  out, text = tmp_path / 'out', 'Hello!'
  export.from_run('gguf', tmp_path / 'run', out, 'float32', base=True)
  tok = tokenizer.from_proto(proto, 'x')
  ids = template.prompt_ids(text, tok, t)
  made, _ = _ask(out / 'model-F32.gguf', ids, limit=48)
  params, ends = jax.tree.map(jnp.asarray, params), translator.end_ids(tok, t)
  expected = test_transformers.greedy(cfg, params, ids, 48, ends)
  assert [i for i in made if i not in ends] == expected
  assert made[-1] == template.end_id(tok, t)
  card = test_transformers.three_lines(out, _PYTHON)
  assert card == tok.decode(expected) + '\n'
