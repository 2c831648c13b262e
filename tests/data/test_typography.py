"""Signs that are written in several ways: found, said, and made the same."""

import dataclasses

import pytest

from configs import debug
from mt.data import __main__ as card
from mt.data import corpus
from mt.data import splits
from mt.data import typography
from tests.fixtures.bitext_files import write

FRENCH = "L'été, c'est l'heure d'un thé. Aujourd'hui ? D'accord !"


@pytest.mark.parametrize(
  'text, expected',
  [
    (FRENCH, FRENCH.replace("'", '’')),
    ('l´été, l`heure, lʼan, l’eau', 'l’été, l’heure, l’an, l’eau'),
    ("l'« autre », d'1 euro", 'l’« autre », d’1 euro'),
    # A quotation, feet, and what ends a word are no apostrophes inside one.
    ("'oui' ou 'non', 5'3, les amis'", "'oui' ou 'non', 5'3, les amis'"),
    ('', ''),
  ],
)
def test_what_is_an_apostrophe(text, expected):
  assert typography.with_apostrophe(text, '’') == expected
  assert typography.with_apostrophe(expected, '’') == expected


def test_a_difference_is_said_with_its_shares():
  straight, curly = ["l'eau"] * 30 + ['l’eau'] * 10, ['l’eau'] * 10
  (found,) = typography.differences(straight, curly)
  assert found == "apostrophes of the targets are ' 75%, ’ 25%; in valid ’ 100%"
  assert not typography.differences(curly, curly)
  # Too few, and too little of a difference.
  assert not typography.differences(straight, curly[:9])
  assert not typography.differences(straight[27:], curly)


@pytest.mark.parametrize(
  'train, valid, words',
  [
    ('Oui ! Non\xa0?', 'Oui! Non?', 'a space 50%, U+00A0 50%; in valid none'),
    ('Oui\u202f!', 'Oui !', 'are U+202F 100%; in valid a space 100%'),
    ('« oui »', '"oui"', 'quotes of the targets are « 50%, » 50%; in valid "'),
    ('Oui...', 'Oui…', 'three dots of the targets are ... 100%; in valid …'),
  ],
)  # fmt: skip
def test_each_kind_of_sign(train, valid, words):
  (found,) = typography.differences([train] * 10, [valid] * 10)
  assert words in found


@pytest.fixture
def config(tmp_path):
  config = debug.get_config()
  for split, target in ('train', "l'eau 'x'"), ('valid', 'l’eau'):
    rows = [f"{split}{i}\tit's water {i}\t{target} {i}" for i in range(12)]
    write(tmp_path / f'{split}.tsv', '\n'.join(rows))
  config.data.source = str(tmp_path / '{split}.tsv')
  return config


def test_training_targets_get_it_and_nothing_else_does(config):
  before = corpus.read_splits(config.data, ['train', 'valid'])
  config.data.apostrophe = '’'
  after = corpus.read_splits(config.data, ['train', 'valid'])
  pairs = (texts['train'][0].read() for texts in (before, after))
  for old, new in zip(*pairs, strict=True):
    assert new == old._replace(target=old.target.replace("l'", 'l’'))
    assert "it's" in new.source and " 'x' " in new.target
  assert after['valid'][0].read() == before['valid'][0].read()
  # Kept tokens, positions and resumes know them apart.
  digests = {text['train'][0].digest for text in (before, after)}
  assert len(digests) == 2
  config.data.filter = 'duplicates'
  digests.add(corpus.read_splits(config.data, ['train'])['train'][0].digest)
  assert len(digests) == 3


def test_a_start_and_the_card_say_it(config, capsys):
  config.data.length = 128
  said = "apostrophes of the targets are ' 100%; in valid ’ 100%"
  assert f'  {said}' in card.show(config)
  texts = corpus.read_splits(config.data, ['train', 'valid'])
  splits._say_found('en-fr', texts)
  assert f'train: {said}' in capsys.readouterr().out
  config.data.apostrophe = '’'
  assert 'apostrophes' not in card.show(config)
  train = texts['train'][0]
  other = [dataclasses.replace(texts['valid'][0], pair='en-ja')]
  assert not splits.other_signs(train, texts | {'valid': other})
  # The knob is named where it is not refused.
  hint = ' (data.apostrophe changes them)'
  assert splits.other_signs(train, texts) == [said + hint]
  texts['train'].append(dataclasses.replace(train, pair='en-it'))
  assert splits.other_signs(train, texts) == [said]
