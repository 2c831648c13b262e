"""A tokenizer, and the files of it that transformers reads."""

import pytest

from mt.data import tokenizer
from mt.weights import hf_tokenizer_out
from tests.fixtures import gguf_fixture


@pytest.fixture(scope='module')
def original():
  return tokenizer.from_proto(gguf_fixture.train_proto(), 'x')


@pytest.fixture(scope='module')
def written(original, tmp_path_factory):
  """The folder of the files that transformers reads."""
  folder = tmp_path_factory.mktemp('tokenizer')
  hf_tokenizer_out.write(folder, original)
  return folder
