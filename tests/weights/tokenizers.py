"""Tokenizers compared, and read out of a changed tokenizer.json."""

import json

from mt.weights import hf_tokenizer
from tests.fixtures import nasty


def content_of(written):
  return json.loads((written / 'tokenizer.json').read_text('utf-8'))


def read(path, content, rows=400):
  path.write_text(json.dumps(content))
  return hf_tokenizer.read(path, rows)


def assert_same_ids(rebuilt, original, text):
  ids = original.encode(text)
  assert rebuilt.encode(text) == ids
  assert rebuilt.decode(ids) == original.decode(ids)


def same_everywhere(rebuilt, original):
  for text in nasty.TEXTS:
    assert_same_ids(rebuilt, original, text)
