"""Translations that are there already are not made again."""

import pathlib
import re
import shutil

import pytest

from mt.evaluate import cached

MT = pathlib.Path(__file__).parents[2] / 'mt'
# Whatever may change a translation.
CODE = sorted(
  [
    MT / 'data' / 'template.py',
    MT / 'data' / 'tokenizer.py',
    *MT.glob('gemma/**/*.py'),
    *MT.glob('translate/**/*.py'),
    *MT.glob('weights/**/*.py'),
  ]
)


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
  assert cached.cached(key, make) == texts
  assert cached.cached(key, make) == texts
  assert make.calls == 1
  assert any(p.is_file() for p in cache.rglob('*')), 'kept elsewhere'


def test_another_key_is_another_text(cache):
  make = _Counted(['a'])
  cached.cached([1, 'x'], make)
  for n, key in enumerate([[2, 'x'], [1, 'y'], [[1], 'x'], [1, 'x', None]], 2):
    other = _Counted([str(n)])
    assert cached.cached(key, other) == [str(n)] and other.calls == 1
  assert cached.cached([1, 'x'], make) == ['a'] and make.calls == 1


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """A copy of mt/, to be changed."""
  folder = tmp_path_factory.mktemp('copy') / 'mt'
  ignore = shutil.ignore_patterns('__pycache__')
  return shutil.copytree(MT, folder, ignore=ignore)


def _changed(source):
  """A program with one constant changed, or one added where there is none."""
  found = re.search(r'(?<=[ (=\[])\d+(?=[ ,):\n])', source)
  if not found:
    return source + '\n_NEW = 1\n'
  number = str(int(found[0]) + 1)
  return source[: found.start()] + number + source[found.end() :]


@pytest.mark.parametrize(
  'file', CODE, ids=[str(f.relative_to(MT)) for f in CODE]
)
def test_changed_code_translates_anew(cache, monkeypatch, copy, file):
  monkeypatch.setattr(cached, '_MT', copy)
  assert cached.cached('key', _Counted(['old'])) == ['old']
  path = copy / file.relative_to(MT)
  source = path.read_text('utf-8')
  assert _changed(source) != source
  path.write_text(_changed(source), 'utf-8')
  try:
    assert cached.cached('key', _Counted(['new'])) == ['new']
  finally:
    path.write_text(source, 'utf-8')
  assert cached.cached('key', _Counted(['again'])) == ['old']


def test_other_code_and_another_place_change_nothing(monkeypatch, copy):
  """A clone elsewhere, or a fork of the training loop, has the same key."""
  here = cached.code_digest()
  monkeypatch.setattr(cached, '_MT', copy)
  assert cached.code_digest() == here
  (copy / 'train' / 'new.py').write_text('X = 1')
  assert cached.code_digest() == here
  (copy / 'gemma' / 'new.py').write_text('X = 1')
  assert cached.code_digest() != here
  (copy / 'gemma' / 'new.py').unlink()


def test_a_failure_is_not_remembered(cache):
  def fail():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cached.cached('key', fail)
  assert cached.cached('key', _Counted(['a'])) == ['a']


def test_a_damaged_file_is_made_again(cache):
  cached.cached('key', lambda: ['a'])
  (path,) = (p for p in cache.rglob('*') if p.is_file())
  path.write_text('["a')
  assert cached.cached('key', lambda: ['b']) == ['b']
  assert cached.cached('key', lambda: ['c']) == ['b']
