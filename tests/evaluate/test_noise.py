"""Classes of noise, on sentences made up for this file."""

import time

import pytest

from mt.evaluate import noise

FOUND = {
  ('emoji', 'en'): (
    'see you tonight 😂',
    'Belgium won 🇧🇪',
    'press 1️⃣ now',
    'thanks :)',
    'oh no :-(',
    'well ;)',
    'too funny XD',
    'love you <3',
    'here we go ^^',
    'that hurt T_T',
    '今日は楽しかった（´∀｀）',
  ),
  ('capitals', 'en'): (
    'WHY IS MY PHONE DEAD',
    'this is SO good',
    'I DON’T care',
    'he is AMAZING TODAY my friends',
  ),
  ('capitals', 'fr'): (
    'je ne viens PAS demain',
    'c’est TRÈS bon',
  ),
  ('capitals', 'de'): ('DAS IST NICHT GUT',),
  ('slang', 'en'): (
    'idk what to say',
    'LMAO no',
    'we’re gonna be late',
    'c u at 8',
    'I was just talkin’ to him',
    'what a great idea /s',
    'nooooo way',
    'hahahahaha',
  ),
  ('slang', 'fr'): (
    'mdr c trop drole',
    'Ouais, bof',
    'je sais pas pq',
    "T'as vu ça ?",
  ),
  ('slang', 'ja'): (
    'それはひどいｗｗｗ',
    'まじでやばい',
    'ググれ',
    '面白すぎる（笑）',
    'それは草',
    'あああああ',
    'すごーーい',
  ),
  ('typos', 'en'): (
    'I definately saw it',
    'that dont work',
    'You should of told me',
    'so i told him',
    "i'm late",
    'I went to the the shop',
    'your welcome',
    'nice one,thanks',
    'It broke.Then it burned',
    'it;s fine',
  ),
  ('typos', 'fr'): (
    'ca va etre long',
    'jai pas compris',
    'si j’aurais su',
    'malgrés tout',
  ),
  ('markup', 'en'): (
    'see https://example.com/a?b=c',
    'it is at example.org now',
    '[here](page)',
    'this is **very** good',
    'this is *very* good',
    '> quoted text',
    'first  > then a quote',
    '- one thing',
    '# Title',
    '`code`',
    '~~gone~~',
    'ask /r/france or u/someone',
    'fish &amp; chips',
    'as if^/s',
    '#nofilter',
    'thanks @someone',
  ),
  ('emoji', 'de'): ('Danke 😂',),
}
NOT_FOUND = {
  ('emoji', 'en'): (
    'the ratio is 1:3',
    'https://example.com/:)',
    'It costs 3 # or * each',
    'Acme™ and Co. © 2020',
    'go left → then right',
    'two (very) small (!) words',
    '5 < 30 and x = 8)',
    'level up for XP',
    'a^^^b is not funny',
  ),
  ('capitals', 'en'): (
    'NASA and the FBI signed it',
    'I got a new USB cable from the US',
    'I am here',
    'A B C',
    'OK',
    'it is so good',
    '1234 5678',
  ),
  ('capitals', 'fr'): ('la SNCF est en grève',),
  ('capitals', 'ja'): ('これはNHKとJRとTBSです',),
  ('slang', 'en'): (
    'I do not know what to say.',
    'He lives in the U.S. now',
    'Vitamin U and the R language',
    'World War III and www.example.com',
    'a lollipop',
    'The RRR has an AAA rating',
    'see r/lol',
  ),
  ('slang', 'fr'): (
    'Ben est au PQ',
    'Le chat dort sur le canapé.',
  ),
  ('slang', 'ja'): (
    '庭の雑草を抜く。',
    'マジックショーを見た。',
    'スイッチを押してください。',
  ),
  ('typos', 'en'): (
    "I don't know, and I can't say.",
    'I know that that is odd',
    'They had had enough',
    'i.e. this one',
    'see https://i.example.com/the,the',
    '10,000 people',
    'r/dont is full',
  ),
  ('typos', 'fr'): (
    'Ça va être long',
    'Nous nous lavons, vous vous levez',
    'J’ai compris',
  ),
  ('markup', 'en'): (
    'plain text, with commas; and (brackets)',
    '2 * 3 * 4 = 24',
    'and/or, his/her',
    'what the f**k is that s**t',
    'AT&T and R&D',
    'mail me @ home',
    'number #1 again',
    'a well-known part - really',
    '2 > 1',
  ),
}


def _cases(table):
  return [(*key, text) for key, texts in table.items() for text in texts]


@pytest.mark.parametrize('name, language, text', _cases(FOUND))
def test_found(name, language, text):
  assert name in noise.classes(text, language)


@pytest.mark.parametrize('name, language, text', _cases(NOT_FOUND))
def test_not_found(name, language, text):
  assert name not in noise.classes(text, language)


@pytest.mark.parametrize(
  'size, language, name',
  [
    (1, 'en', 'very short'),
    (3, 'fr', 'very short'),
    (4, 'en', None),
    (39, 'en', None),
    (40, 'de', 'very long'),
  ],
)
def test_length_in_words(size, language, name):
  found = noise.classes(' '.join(['mot'] * size), language)
  assert [c for c in found if c.startswith('very')] == ([name] if name else [])


@pytest.mark.parametrize(
  'size, name', [(8, 'very short'), (9, None), (99, None), (100, 'very long')]
)
def test_length_in_characters(size, name):
  for code in ('ja', 'jpn', 'cmn', 'yue', 'km', 'lo', 'tha'):
    found = noise.classes(' ' + '語' * size + '\n', code)
    assert found == ((name,) if name else ()), code
    assert not noise.has_rule('capitals', code)


def test_classes_overlap_and_keep_their_order():
  found = noise.classes('idk why u dont LOVE it 😂', 'en')
  assert found == ('emoji', 'capitals', 'slang', 'typos')
  assert noise.classes('This is an ordinary sentence.', 'en') == ()


@pytest.mark.parametrize('short, code', [('en', 'eng'), ('fr', 'FRA')])
def test_a_language_by_its_long_code(short, code):
  for (_, language), texts in FOUND.items():
    for text in texts if language == short else ():
      assert noise.classes(text, code) == noise.classes(text, short)
  assert all(noise.has_rule(name, code) for name in noise.CLASSES)


def test_what_has_no_rule_is_not_found():
  text = 'lol i dont know'
  assert noise.classes(text, 'en') == ('slang', 'typos')
  assert noise.classes(text, 'de') == ()
  assert not noise.has_rule('slang', 'de') and noise.has_rule('emoji', 'de')
  assert not noise.has_rule('typos', 'ja') and noise.has_rule('slang', 'ja')
  assert not noise.has_rule('capitals', 'ja')
  for name in noise.CLASSES:
    assert noise.has_rule(name, 'en') and noise.has_rule(name, 'fr')


def test_a_long_text_takes_no_time():
  """No rule may go through a text again and again."""
  for piece in ('a', '*a ', '(^', ':-', '_a', 'é,', 'ww', '> '):
    start = time.monotonic()
    noise.classes(piece * 20_000, 'en')
    noise.classes(piece * 20_000, 'ja')
    assert time.monotonic() - start < 5, piece
