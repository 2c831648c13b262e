"""Parameters as a folder of Hugging Face's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mt.data import tokenizer
from mt.weights import hf
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture


@pytest.fixture(scope='module')
def tok():
  return tokenizer.from_proto(gguf_fixture.train_proto(), 'x')


@pytest.mark.parametrize(
  ('arch', 'dtype'),
  [
    ('gemma', 'float32'),
    ('gemma2', 'float32'),
    ('gemma3', 'float32'),
    ('gemma3', 'bfloat16'),
  ],
)
def test_what_is_written_has_the_published_names(tmp_path, tok, arch, dtype):
  cfg = hf_fixture.seven_layers(arch)
  params = gguf_fixture.tiny_params(cfg)
  hf.write(tmp_path, cfg, jax.tree.map(jnp.asarray, params), tok, dtype)
  found = load_file(tmp_path / 'model.safetensors')
  expected = hf_fixture.tensors(arch, params, dtype)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, err_msg=name)
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['torch_dtype'] == dtype
  config, again = hf_fixture.load(tmp_path)
  assert config == cfg
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  hf_fixture.assert_same(again, rounded)


def test_large_models_are_several_files(tmp_path, tok, monkeypatch):
  cfg = gguf_fixture.tiny_config('gemma2', 400)
  params = gguf_fixture.tiny_params(cfg)
  monkeypatch.setattr(hf, '_SHARD_BYTES', 20_000)
  hf.write(tmp_path, cfg, params, tok)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  whole = hf_fixture.tensors('gemma2', params)
  total = sum(x.nbytes for x in whole.values())
  assert index['metadata']['total_size'] == total
  assert index['weight_map'].keys() == whole.keys()
  files = sorted(p.name for p in tmp_path.glob('*.safetensors'))
  n = len(files)
  assert n > 3
  assert files == [
    f'model-{i:05}-of-{n:05}.safetensors' for i in range(1, n + 1)
  ]
  for file in files:
    part = load_file(tmp_path / file)
    assert {index['weight_map'][k] for k in part} == {file}
    # One that is larger than a file may be has a file of its own.
    assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 20_000
  assert list(load_file(tmp_path / files[0])) == ['model.embed_tokens.weight']
  hf_fixture.assert_same(hf_fixture.load(tmp_path)[1], params)


def test_a_file_has_the_modes_of_any_other(tmp_path):
  (tmp_path / 'any').write_text('')
  hf.save(tmp_path / 'a.safetensors', {'x': np.zeros(3, np.float32)})
  modes = {
    (tmp_path / name).stat().st_mode for name in ('any', 'a.safetensors')
  }
  assert len(modes) == 1


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path):
  (tmp_path / 'a.safetensors').mkdir()
  with pytest.raises(OSError, match='safetensors'):
    hf.save(tmp_path / 'a.safetensors', {'x': np.zeros(3, np.float32)})
