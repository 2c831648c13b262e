"""Which files a run learns from, and the bundled sample."""

import functools
import json
import re

import pytest

from configs import default
from mt.data import bitext
from mt.data import corpus
from tests.fixtures.refusal import refusal


def _data(source='sample', **knobs):
  """`config.data` of the default config, with some knobs changed."""
  data = default.get_config().data
  data.update(source=str(source), **knobs)
  return data


def _texts(splits):
  """Split -> the pairs of each text, as tuples of source and target."""
  return {
    split: [[(p.source, p.target) for p in text.read()] for text in texts]
    for split, texts in splits.items()
  }


def _read(source, *splits, **knobs):
  splits = splits or ('train',)
  return _texts(corpus.read_splits(_data(source, **knobs), splits))


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content, encoding='utf-8', newline='')
  return path


def _mtnt(folder, pair='en-fr', splits=('train', 'valid', 'test')):
  """A folder in the layout of MTNT; the texts name split and language."""
  source, target = pair.split('-')
  for split in splits:
    path = folder / split / f'{split}.{pair}.tsv'
    _write(path, f'1\t{split} {source}\t{split} {target}\n')
  return folder


# Folders.


@pytest.mark.parametrize('inner', ['', 'MTNT'])
def test_a_folder_has_a_file_for_each_split(tmp_path, inner):
  folder = _mtnt(tmp_path / inner)
  splits = ('valid', 'train', 'test')
  texts = corpus.read_splits(_data(tmp_path), splits)
  assert _texts(texts) == {s: [[(f'{s} en', f'{s} fr')]] for s in splits}
  (train,) = texts['train']
  assert train.where == str(folder / 'train' / 'train.en-fr.tsv')


def test_the_other_direction_is_read_reversed(tmp_path):
  _mtnt(tmp_path, 'fr-en')
  assert _read(tmp_path) == {'train': [[('train en', 'train fr')]]}
  one, other = (
    corpus.read_splits(_data(tmp_path, pair=p), ['train'])['train'][0].digest
    for p in ('en-fr', 'fr-en')
  )
  assert one != other
  # Each split for itself; what is there as asked for comes first.
  _mtnt(tmp_path, 'en-fr', ['valid'])
  _write(tmp_path / 'valid' / 'valid.en-fr.tsv', '1\tx\ty\n')
  assert _read(tmp_path, 'train', 'valid') == {
    'train': [[('train en', 'train fr')]],
    'valid': [[('x', 'y')]],
  }


def test_the_sample_has_its_own_columns(tmp_path):
  """Whatever those of the text that is trained on."""
  source = _write(tmp_path / 'x.tsv', 'a\tb\tother\nc\td\tother\n')
  want = _read('sample', 'valid')
  for columns in ((1, 2), (2, 1)):
    knobs = {'valid': 'sample', 'quotes': 'csv', 'columns': columns}
    assert _read(source, 'valid', **knobs) == want


def test_a_pair_that_is_not_there(tmp_path):
  _mtnt(tmp_path, 'ja-en')
  path = tmp_path / 'train' / 'train.en-fr.tsv'
  words = (
    path,
    'no such file',
    "data.pair is 'en-fr'",
    'train.ja-en.tsv.',
  )
  refusal(lambda: _read(tmp_path), *words)
  _mtnt(tmp_path, 'en-ja')
  refusal(lambda: _read(tmp_path), path, 'n.en-ja.tsv, ', 'n.ja-en.tsv.')


def test_a_folder_without_splits(tmp_path):
  path = tmp_path / 'train' / 'train.en-fr.tsv'
  words = (f'{path}: cannot read', 'No such file', 'data.source')
  refusal(lambda: _read(tmp_path), *words)
  for name in ('nowhere.tsv', 'nowhere.tar.gz', 'nowhere'):
    nowhere = tmp_path / name
    words = f'{nowhere}: cannot read', *words[1:]
    refusal(lambda n=nowhere: _read(n), *words)
  path.mkdir(parents=True)
  refusal(lambda: _read(tmp_path), f'{path}: cannot read', 'Is a directory')


def test_a_name_that_no_file_can_have(tmp_path):
  # As when a text is given instead of its path.
  for name in ('x' * 5000, str(tmp_path / ('x' * 300) / 'y.tsv')):
    refusal(lambda n=name: _read(n), 'cannot read', 'File name too long')


# Files.


@pytest.mark.parametrize('name', ['x.tsv', 'x', 'x.tar.gz.tsv'])
def test_columns(tmp_path, name):
  path = _write(tmp_path / name, 'de1\ten\tfr1\nx1\ta\tb\n')
  assert _read(path) == {'train': [[('en', 'fr1'), ('a', 'b')]]}
  assert _read(path, columns=(3, 1)) == {
    'train': [[('fr1', 'de1'), ('b', 'x1')]]
  }
  _write(path, 'de\ten\tfr\nx\ta\tb\n')
  assert _read(path, columns=('fr', 'de')) == {'train': [[('b', 'x')]]}


def test_json_lines(tmp_path):
  line = {'en': 'a', 'fr': 'b', 'translation': {'en': 'c', 'fr': 'd'}}
  path = _write(tmp_path / 'x.jsonl', json.dumps(line) + '\n')
  assert _read(path) == {'train': [[('a', 'b')]]}
  assert _read(path, pair='fr-en') == {'train': [[('b', 'a')]]}
  columns = ('translation.en', 'fr')
  assert _read(path, columns=columns) == {'train': [[('c', 'b')]]}


def test_aligned_files(tmp_path):
  _write(tmp_path / 'x.en', 'a\nc\n')
  _write(tmp_path / 'x.fr', 'b\nd\n')
  source = tmp_path / 'x.{lang}'
  assert _read(source) == {'train': [[('a', 'b'), ('c', 'd')]]}
  assert _read(source, pair='fr-en') == {'train': [[('b', 'a'), ('d', 'c')]]}
  missing = tmp_path / 'x.de'
  refusal(lambda: _read(source, pair='en-de'), f'{missing}: cannot read')


def test_split_stands_for_train_valid_and_test(tmp_path):
  for split in ('train', 'valid', 'test'):
    _write(tmp_path / split / f'{split}.tsv', f'{split}\tx\n')
    for language in ('en', 'fr'):
      _write(tmp_path / f'{language}.{split}', f'{split} {language}\n')
  splits = ('train', 'valid', 'test')
  source = tmp_path / '{split}' / '{split}.tsv'
  assert _read(source, *splits) == {s: [[(s, 'x')]] for s in splits}
  source = tmp_path / '{lang}.{split}'
  assert _read(source, *splits) == {
    s: [[(f'{s} en', f'{s} fr')]] for s in splits
  }


def test_valid_and_test_have_files_of_their_own(tmp_path):
  source = _write(tmp_path / 'x.tsv', 'a\tb\n')
  valid = _write(tmp_path / 'v.jsonl', '{"en": "v", "fr": "w"}\n')
  _write(tmp_path / 't.en', 't\n')
  _write(tmp_path / 't.fr', 'u\n')
  test = str(tmp_path / 't.{lang}')
  knobs = {'valid': str(valid), 'test': test}
  assert _read(source, 'train', 'valid', 'test', **knobs) == {
    'train': [[('a', 'b')]],
    'valid': [[('v', 'w')]],
    'test': [[('t', 'u')]],
  }
  # A folder, or a name with {split}, knows its splits.
  folder = str(_mtnt(tmp_path / 'folder'))
  read = _read(source, 'valid', 'test', valid=folder, test=folder)
  assert read['valid'] == [[('valid en', 'valid fr')]]
  assert read['test'] == [[('test en', 'test fr')]]
  name = folder + '/{split}/{split}.en-fr.tsv'
  assert _read(source, 'valid', valid=name)['valid'] == read['valid']
  # Someone who names the text trained on is taken at their word.
  assert _read(source, 'valid', valid=str(source))['valid'] == [[('a', 'b')]]


@pytest.mark.parametrize('split', ['valid', 'test'])
@pytest.mark.parametrize('name', ['x.tsv', 'x.{lang}', 'x.tsv,sample'])
def test_a_text_trained_on_is_not_scored(tmp_path, split, name):
  for suffix in ('tsv', 'en', 'fr'):
    _write(tmp_path / f'x.{suffix}', 'a\tb\n')
  source = tmp_path / name
  other = {'valid': 'test', 'test': 'valid'}[split]
  refusal(
    lambda: _read(source, split, **{other: 'sample'}),
    f"{tmp_path}/{name.split(',')[0]}' and data.{split} is empty",
    f'in data.{split}',
    '{split}',
  )
  # Before anything is read.
  refusal(lambda: _read(tmp_path / 'no.{lang}', 'train', split), 'is empty')
  assert len(_read(source, split, **{split: 'sample'})[split][0]) > 50
  assert len(_read(source)['train'][0]) == 1


# Several sources.


def test_sources_are_read_one_by_one(tmp_path):
  x = _write(tmp_path / 'x.tsv', 'a\tb\n')
  y = _write(tmp_path / 'y.jsonl', '{"en": "c", "fr": "d"}\n')
  folder = _mtnt(tmp_path / 'folder')
  data = _data(f'{folder}, {x} ,{y}')
  assert corpus.sources(data) == [str(folder), str(x), str(y)]
  texts = corpus.read_splits(data, ['train', 'valid', 'test'])
  assert _texts(texts) == {
    'train': [[('train en', 'train fr')], [('a', 'b')], [('c', 'd')]],
    'valid': [[('valid en', 'valid fr')]],
    'test': [[('test en', 'test fr')]],
  }


def test_bad_lines_are_looked_at_for_each_file(tmp_path):
  good = _write(tmp_path / 'x.tsv', 'a\tb\n' * 98 + '\n\n')
  bad = _write(tmp_path / 'y.tsv', 'a\tb\n' * 97 + '\n\n\n')
  (text,) = corpus.read_splits(_data(good, max_bad_fraction=0.02), ['train'])[
    'train'
  ]
  assert text.sample.unusable == {'an empty line': (2, 99)}
  refusal(
    lambda: _read(f'{good},{bad}', max_bad_fraction=0.02),
    bad,
    '3 of its 100 lines',
    'data.max_bad_fraction=0.02',
  )


def test_a_text_that_is_filtered_away(tmp_path):
  path = _write(tmp_path / 'x.tsv', 'a\ta\n' * 20)
  words = path, 'no pair in it (20 copies', 'data.filter'
  refusal(lambda: _read(path, filter='copies'), *words)


def test_some_texts_are_those_of_pairs(tmp_path):
  path = _write(tmp_path / 'x.tsv', 'a\ta\n' * 20 + 'b\tc\n' * 20)
  (text,) = corpus.read_splits(_data(path, filter='copies'), ['train'])['train']
  assert corpus.some_texts(text, 22) == ['b', 'c'] * 2
  assert corpus.some_texts(text, 15) == ['b', 'c'] * 10


def test_some_texts_where_the_sample_has_none(tmp_path, monkeypatch):
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 8)
  monkeypatch.setattr(bitext, '_SAMPLE', 2)
  for pair in ('b\tc\n', 'a\ta\n'):
    path = _write(tmp_path / 'x.tsv', 'a\ta\n' * 9 + pair + 'a\ta\n')
    data = _data(path, filter='copies')
    (text,) = corpus.read_splits(data, ['train'])['train']
    assert not text.sample.pairs
    if pair == 'b\tc\n':
      assert corpus.some_texts(text) == ['b', 'c']
  refusal(lambda: corpus.some_texts(text), path, 'no pair in it', '2 copies')


# The bundled sample.


@functools.cache
def _sample(split):
  (text,) = corpus.read_splits(_data(max_bad_fraction=0.0), [split])[split]
  return text.read()


def _sample_sources():
  splits = ('train', 'valid', 'test')
  return [p.source for split in splits for p in _sample(split)]


def test_sample_has_no_text_twice():
  # In two splits it would be a leak, in one a waste.
  plain = [re.sub(r'\W+', ' ', s.casefold()).strip() for s in _sample_sources()]
  # Of a reply without a word, such as an emoji, nothing is left.
  plain = [p or s for p, s in zip(plain, _sample_sources(), strict=True)]
  assert sorted(plain) == sorted(set(plain))


@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_sample_is_tidy(split):
  pairs = _sample(split)
  assert [p.id for p in pairs] == [str(n + 1) for n in range(len(pairs))]
  for p in pairs:
    for text in (p.source, p.target):
      assert text == text.strip() and len(text.splitlines()) == 1
      assert '\t' not in text
  same = [p.source for p in pairs if p.source == p.target]
  assert len(same) < 0.02 * len(pairs), same


def test_sample_is_noisy():
  """What MTNT is about, in numbers that a few edits do not break."""
  sources = _sample_sources()

  def count(test):
    return sum(bool(test(s)) for s in sources)

  assert count(re.compile('[\U0001f300-\U0001faff\u2600-\u27bf]').search) >= 20
  assert count(re.compile(r'\[[^]]+\]\([^)]+\)').search) >= 5  # Markdown links.
  assert count(lambda s: s.isupper() and len(s.split()) >= 3) >= 8
  assert count(lambda s: len(s.split()) == 1) >= 5
  assert count(lambda s: len(s.split()) >= 40) >= 20
  # Texts without a capital in front or a full stop at the end: most of them.
  loose = count(lambda s: not s[0].isupper() or s[-1] not in '.!?')
  assert loose > 0.5 * len(sources)


# Several directions.


def test_a_text_for_each_direction(tmp_path):
  """What is not there as asked for is read turned round."""
  _mtnt(tmp_path)
  _mtnt(tmp_path, 'en-ja')
  for pair in ('en-fr', 'en-ja'):
    source, target = pair.split('-')
    _write(tmp_path / f'x.{pair}.tsv', f'x {source}\tx {target}\n')
  several = ' en-fr,fr-en, ja-en'
  assert _read(f'{tmp_path},{tmp_path}//x.{{pair}}.tsv', pair=several) == {
    'train': [
      *([('train en', 'train fr')], [('train fr', 'train en')]),
      *([('train ja', 'train en')], [('x en', 'x fr')]),
      *([('x fr', 'x en')], [('x ja', 'x en')]),
    ]
  }


def test_one_file_of_several_directions(tmp_path):
  path = _write(tmp_path / 'x.tsv', 'a\tb\tother\nc\td\tother\n')
  knobs = {'columns': (1, 2), 'pair': 'en-fr,fr-en'}
  both = [[('a', 'b'), ('c', 'd')], [('b', 'a'), ('d', 'c')]]
  assert _read(path, **knobs) == {'train': both}
  words = (path, 'en-fr', 'en-ja', '{pair}')
  refusal(lambda: _read(path, columns=(1, 2), pair='en-fr,en-ja'), *words)
  line = {'en': 'a', 'fr': 'b', 'ja': 'c'}
  path = _write(tmp_path / 'x.jsonl', json.dumps(line) + '\n')
  assert _read(path, pair='en-fr,ja-en,fr-ja') == {
    'train': [[('a', 'b')], [('c', 'a')], [('b', 'c')]]
  }
  columns = ('en', 'fr')
  assert _read(path, pair='en-fr,fr-en', columns=columns) == {
    'train': [[('a', 'b')], [('b', 'a')]]
  }
  refusal(lambda: _read(path, pair='en-fr,en-ja', columns=columns), 'en-ja')


def test_a_tested_pair_is_not_trained_on_turned_round(tmp_path):
  _mtnt(tmp_path)
  _mtnt(tmp_path, 'fr-en')
  _write(tmp_path / 'train' / 'train.fr-en.tsv', '1\ttest fr\ttest en\n')
  _write(tmp_path / 'test' / 'test.fr-en.tsv', '1\tx\ty\n')
  pair = 'en-fr,fr-en'
  refusal(lambda: _read(tmp_path, pair=pair), 'train.fr-en.tsv', 'test fr')
  # Where French is no source, what its tests have says nothing.
  _mtnt(tmp_path, 'en-ja')
  _write(tmp_path / 'train' / 'train.en-fr.tsv', '1\ttest fr\ttrain fr\n')
  assert _read(tmp_path, pair='en-fr,en-ja')['train'][0][0][0] == 'test fr'
