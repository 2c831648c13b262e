"""Gemma 4: what transformers makes of tiny random models of each shape."""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.data import tokenizer
from mt.gemma import attention
from mt.gemma import model
from mt.gemma import parameters
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.weights import hf
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gemma4
from tests.fixtures.refusal import refusal

SHAPES = {
  name: dataclasses.replace(cfg, vocab_size=400)
  for name, cfg in tiny_gemma4.SHAPES.items()
}
_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / '.venv-transformers' / 'bin' / 'python'
_B, _L = 2, 20


def _write(folder, name):
  cfg, params = SHAPES[name], tiny_gemma4.params(SHAPES[name])
  folder.mkdir()
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  hf.write(folder, cfg, params, tok)
  return cfg, params


def _tokens():
  return np.random.default_rng(0).integers(4, 400, (_B, _L)).astype(np.int32)


def _weights():
  shape = _B, _L, 400
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _logits_and_gradients(cfg, params):
  tokens = _tokens()
  positions = np.arange(_L, dtype=np.int32)[None].repeat(_B, 0)

  def weighted(params):
    x = model.forward(cfg, params, tokens, positions, np.ones_like(tokens))
    logits = attention.softcap(x @ params['embedding'].T, cfg.final_softcap)
    return jnp.sum(logits * _weights()), logits

  grads, logits = jax.jit(jax.grad(weighted, has_aux=True))(params)
  return np.asarray(logits), parameters.flatten(grads)


def _error(found, expected):
  found = np.asarray(found, np.float64)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.transformers
@pytest.mark.skipif(
  not _PYTHON.exists(), reason=f'{_PYTHON} is not there: see the Makefile'
)
def test_values_gradients_and_greedy_tokens_are_transformers(tmp_path):
  given = {'tokens': _tokens(), 'weights': _weights()}
  for name in SHAPES:
    _write(tmp_path / name, name)
    np.savez(tmp_path / f'{name}.npz', **given)
  oracle = _ROOT / 'tests' / 'fixtures' / 'gemma4_oracle.py'
  subprocess.run(
    [_PYTHON, oracle, *(tmp_path / name for name in SHAPES)],
    check=True,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  )
  for name, cfg in SHAPES.items():
    params = tiny_gemma4.params(cfg)
    theirs = dict(np.load(tmp_path / f'{name}.npz'))
    logits, grads = _logits_and_gradients(cfg, params)
    print(name, _error(logits, theirs['logits']), theirs['logits'][0,-1,:8].tolist())
    assert _error(logits, theirs.pop('logits')) < 1e-5, name
    prompt = batching.Prompt(_tokens()[0, : _L // 2].tolist(), limit=24)
    settings = batching.Settings(cfg, search.Search(), (1,), batch_size=1)
    ((best,),) = batching.decode_all(
      settings, decode.unstack(params), [prompt]
    )
    assert best.tokens == [t for t in theirs.pop('made') if t != 1], name
    for place in hf._places(cfg, 'model.'):
      if place.row.name == 'scale':  # A buffer there: it has no gradient.
        continue
      x = grads[place.row.path]
      x = np.asarray(x if place.layer is None else x[place.layer])
      x = x.T if place.row.transposed else x
      assert _error(x, theirs.pop(place.name)) < 1e-5, (name, place.name)
    assert not theirs, name
