"""Translations that are there already are not made again."""

import pathlib
import re
import shutil

import ml_collections
import pytest

from mt.evaluate import cached

MT = pathlib.Path(__file__).parents[2] / 'mt'
# Whatever may change a translation.
CODE = [
  'data/chat.py',
  'data/template.py',
  'data/tokenizer.py',
  *(
    str(path.relative_to(MT))
    for room in ('gemma', 'translate', 'weights')
    for path in sorted((MT / room).rglob('*.py'))
  ),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path


@pytest.fixture
def copy(tmp_path, monkeypatch):
  """A copy of mt/, to be changed."""
  ignore = shutil.ignore_patterns('__pycache__')
  folder = shutil.copytree(MT, tmp_path / 'mt', ignore=ignore)
  monkeypatch.setattr(cached, '_MT', folder)
  return folder


def _not_called():
  raise AssertionError('translated again')


def test_a_second_run_does_not_translate_again(cache):
  texts = ['Salut 😀', '', 'a\u2028b "c"', '\u00a0!']
  key = [{'fingerprint': 1, 'prompt': 'é'}, ['Hi!']]
  assert cached.cached(key, lambda: texts) == texts
  assert cached.cached(key, _not_called) == texts
  assert any(p.is_file() for p in cache.rglob('*')), 'kept elsewhere'


def test_another_key_is_another_text(cache):
  keys = [1, 'x'], [2, 'x'], [1, 'y'], [[1], 'x'], [1, 'x', None]
  for n, key in enumerate(keys):
    assert cached.cached(key, lambda n=n: [str(n)]) == [str(n)]
  assert cached.cached(keys[0], _not_called) == ['0']


def _changed(source):
  """A program with one constant changed, or one added where there is none."""
  found = re.search(r'(?<=[ (=\[])\d+(?=[ ,):\n])', source)
  if not found:
    return source + '\n_NEW = 1\n'
  number = str(int(found[0]) + 1)
  return source[: found.start()] + number + source[found.end() :]


def test_changed_code_translates_anew(cache, copy):
  assert cached.cached('key', lambda: ['old']) == ['old']
  for file in CODE:
    source = (copy / file).read_text('utf-8')
    (copy / file).write_text(_changed(source), 'utf-8')
    assert cached.cached('key', lambda f=file: [f]) == [file]
    (copy / file).write_text(source, 'utf-8')
  assert cached.cached('key', _not_called) == ['old']


def test_other_code_and_another_place_change_nothing(copy, monkeypatch):
  """A clone elsewhere, or a fork of the training loop, has the same key."""
  there = cached.code_digest()
  (copy / 'train' / 'new.py').write_text('X = 1')
  assert cached.code_digest() == there
  made = cached.provenance(1, ml_collections.ConfigDict(), ['a'])
  (copy / 'gemma' / 'new.py').write_text('X = 1')
  assert cached.code_digest() != there
  other = cached.provenance(1, ml_collections.ConfigDict(), ['a'])
  assert other != made
  monkeypatch.undo()
  assert cached.code_digest() == there


def test_a_failure_is_not_remembered(cache):
  with pytest.raises(AssertionError):
    cached.cached('key', _not_called)
  assert cached.cached('key', lambda: ['a']) == ['a']


def test_a_damaged_file_is_made_again(cache):
  cached.cached('key', lambda: ['a'])
  (path,) = (p for p in cache.rglob('*') if p.is_file())
  path.write_text('["a')
  assert cached.cached('key', lambda: ['b']) == ['b']
  assert cached.cached('key', _not_called) == ['b']


def test_half_written_or_edited_texts_are_made_again(tmp_path, monkeypatch):
  path, texts = tmp_path / 'valid.after.txt', ['a\nb', '', 'c']
  cached.write(path, {'step': 1}, (texts, [2]))
  found = cached.read_if_current(path, {'step': 1})
  assert found == (['a b', '', 'c'], [2])
  assert cached.read_if_current(path, {'step': 2}) is None
  for text in ('a b\n', 'a b\n\nd\n', '\xff'):
    path.write_text(text, 'latin-1')
    assert cached.read_if_current(path, {'step': 1}) is None
  cached.write(path, {'step': 1}, (texts, []))
  path.with_suffix('.json').write_text('[]')
  assert cached.read_if_current(path, {'step': 1}) is None
  cached.write(path, {'step': 1}, (texts, []))
  with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
    m.setattr(cached.files, 'write_json', lambda *_: 1 / 0)
    cached.write(path, {'step': 2}, (['of', 'step', '2'], []))
  assert cached.read_if_current(path, {'step': 1}) is None
