"""What spoils a result: counted, shown, left out; leaks of the test refused."""

import pathlib
import re

import pytest

from configs import debug
from mt.data import __main__ as card
from mt.data import bitext
from mt.data import corpus
from mt.data import faults
from mt.data import lines
from mt.data import splits
from mt.data import template
from tests.fixtures import numbered_rows
from tests.fixtures.bitext_files import write
from tests.fixtures.refusal import refusal

LONG = 'a sentence that is long enough to be compared'
# Each has the faults that its id names.
PAIRS = [
  ('plain', LONG, LONG.replace('a', 'o')),
  ('leaks', 'The  TEST source', 'la source'),
  ('copies', 'OK then', 'ok  then'),
  ('script', 'Привет мир', 'salut le monde'),
  ('entities', 'Q&A; AT&amp;T', 'Q&R chez AT&T'),
  ('lengths', LONG, 'une phrase'),
  ('not_nfc', 'cafe\u0301', 'café noir'),
  ('plain', 'https://ok', '🔥 été ☃'),
  ('duplicates', LONG, LONG.replace('a', 'o')),
]


@pytest.fixture
def config(tmp_path):
  config = debug.get_config()
  for split, pairs in (
    ('train', PAIRS),
    ('valid', [('x', 'valid only', 'là')]),
    ('test', [('x', 'the test source', 'ici')]),
  ):
    rows = [f'{name}{n}\t{s}\t{t}' for n, (name, s, t) in enumerate(pairs)]
    write(tmp_path / f'{split}.tsv', '\n'.join(rows))
  config.data.source = str(tmp_path / '{split}.tsv')
  config.data.allow_leaks = True
  return config


def _train(config):
  (text,) = corpus.read_splits(config.data, ['train'])['train']
  return text


def _names(pairs):
  return [p.id[:-1] for p in pairs]


def test_each_fault_is_found_where_it_is(config):
  text = _train(config)
  for pair in text.read():
    name = pair.id[:-1]
    expected = [] if name in ('plain', 'duplicates') else [name]
    assert text.rules.find(pair) == expected, pair
  found = faults.count(text, range(len(text)))
  assert {name: (n, p.id[:-1]) for name, (n, p) in found.items()} == {
    name: (1, name) for name in faults.NAMES
  }


@pytest.mark.parametrize(
  ('languages', 'source', 'target', 'wrong'),
  [
    ('ru-ja', 'Привет, Gemma', '今日は Gemma です', False),
    ('ja-en', 'ただの日本語', 'plain, 日本', False),
    ('rus-jpn', 'Привет, Gemma', '今日は Gemma です', False),
    ('ko-zh', '한국어 문장', '한국어 문장', True),
    ('sr-en', 'Добро jutro', 'good', False),
    ('en-el', 'good', 'kalimera', True),
    ('en-kn', 'good', 'shubhodaya', True),
    ('eng-kan_Knda', 'good', 'shubhodaya', True),
  ],
)
def test_scripts(languages, source, target, wrong):
  rules = faults.Rules(languages, 0.0)
  assert ('script' in rules.find(lines.Pair('1', source, target))) == wrong


def test_a_language_in_its_own_letters_is_no_fault():
  names = """am አማርኛ, as অসমীয়া, ba башҡорт, bo བོད་སྐད, ce нохчийн, cv чӑваш,
    dv ދިވެހި, dz རྫོང་ཁ, ii ꆈꌠꉙ, iu ᐃᓄᒃᑎᑐᑦ, km ភាសាខ្មែរ, kn ಕನ್ನಡ, ks کٲشُر,
    ku کوردی, ky кыргызча, lo ພາສາລາວ, ml മലയാളം, my မြန်မာဘာသာ, or ଓଡ଼ିଆ,
    os ирон, pa ਪੰਜਾਬੀ, ps پښتو, sa संस्कृतम्, sd سنڌي, si සිංහල, tg тоҷикӣ,
    ti ትግርኛ, tt татар, ug ئۇيغۇرچە, yi ייִדיש, ab аԥсуа, ru русский"""
  for code, name in (x.split() for x in names.split(',')):
    pair = lines.Pair('1', 'good', name * 2)
    assert not faults.Rules(f'en-{code}', 0.0).find(pair, ['script']), code


@pytest.mark.parametrize(
  ('names', 'other'), [('script', True), ('copies', False)]
)
def test_another_table_of_scripts_leaves_out_other_lines(
  config, monkeypatch, names, other
):
  """So what a cache has of a text is not taken, where the rule is asked for."""
  config.data.pair, config.data.filter = 'en-ja', names
  rows = 'good day\tとても良い\n'
  write(pathlib.Path(config.data.source.format(split='train')), rows)
  before = _train(config).digest
  scripts = [*template.SCRIPTS['ja'], 'Latin']
  monkeypatch.setitem(template.SCRIPTS, 'ja', scripts)
  assert (_train(config).digest != before) == other


@pytest.mark.parametrize('name', faults.NAMES)
def test_the_filter_leaves_out_what_it_names(config, name):
  before = _train(config)
  config.data.filter = name
  text = _train(config)
  assert _names(text.read()) == [n for n, *_ in PAIRS if n != name]
  number = [n for n, *_ in PAIRS].index(name) + 1
  assert text.sample.unusable == {name: (1, number)}  # No bad line, though.
  assert f'1 {name} (the first in line {number})' in bitext.describe(text)
  assert text.digest not in (
    before.digest,
    bitext.open_bitext([before.where], 'en-fr').digest,
  )
  # All of them leave the plain ones.
  config.data.filter = ', '.join(faults.NAMES)
  assert {*_names(_train(config).read())} == {'plain'}


def test_leaks_of_the_test_are_refused(config, monkeypatch):
  config.data.allow_leaks = False
  refusal(
    lambda: _train(config),
    '1 of its sources',
    "'The  TEST source'",
    '0 to the letter',
    "data.filter='leaks'",
    'data.allow_leaks',
  )
  config.data.filter = 'leaks'
  assert 'leaks' not in _names(_train(config).read())
  config.data.filter = ''
  # Of a large text only a sample is looked at; the rest is left out.
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 8)
  monkeypatch.setattr(bitext, '_SAMPLE', 2)
  text = _train(config)
  assert 'leaks' not in _names(text.read()) and len(text.read()) == 8
  # What stands in validation is noted alone; without a test there is none.
  config.data.test = '/nowhere'
  config.data.filter = ''
  assert len(_train(config).read()) == 9


def test_a_run_says_them_in_a_line_and_the_card_shows_each(config, capsys):
  texts = corpus.read_splits(config.data, ['train', 'valid'])
  splits.read(config, numbered_rows.sample_tokenizer(), texts)
  (said,) = (x for x in capsys.readouterr().out.splitlines() if 'of these' in x)
  assert sorted(faults.NAMES) == sorted(re.findall(r' 1 (\w+)', said))
  shown = card.show(config)
  for name in faults.NAMES:
    assert f'(data.filter={name} leaves them out)' in shown
  assert "entities           1  entities4: 'Q&A; AT&amp;T' -> " in shown


def test_duplicates_of_a_large_text_are_kept(config, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(faults, '_LINES_IN_MEMORY', 2)
  monkeypatch.setattr(faults, '_CHUNK', 2)
  text = _train(config)
  want = [False] * 8 + [True]
  assert faults.duplicates(text).tolist() == want
  monkeypatch.setattr(faults, '_hash', None)
  assert faults.duplicates(text).tolist() == want
