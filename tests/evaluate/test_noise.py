"""Classes of noise, on sentences made up for this file."""

import time

import pytest

from mt.evaluate import noise


def _found(name, text, language):
  return name in noise.classes(text, language)


@pytest.mark.parametrize(
  'text',
  [
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
  ],
)
def test_emoji(text):
  assert _found('emoji', text, 'en')
  assert _found('emoji', text, 'de')


@pytest.mark.parametrize(
  'text',
  [
    'the ratio is 1:3',
    'https://example.com/:)',
    'It costs 3 # or * each',
    'Acme™ and Co. © 2020',
    'go left → then right',
    'two (very) small (!) words',
    '5 < 30 and x = 8)',
    'level up for XP',
    'a^^^b is not funny',
  ],
)
def test_no_emoji(text):
  assert not _found('emoji', text, 'en')


@pytest.mark.parametrize(
  'text, language',
  [
    ('WHY IS MY PHONE DEAD', 'en'),
    ('this is SO good', 'en'),
    ('I DON’T care', 'en'),
    ('he is AMAZING TODAY my friends', 'en'),
    ('je ne viens PAS demain', 'fr'),
    ('c’est TRÈS bon', 'fr'),
    ('DAS IST NICHT GUT', 'de'),
  ],
)
def test_capitals(text, language):
  assert _found('capitals', text, language)


@pytest.mark.parametrize(
  'text, language',
  [
    ('NASA and the FBI signed it', 'en'),
    ('I got a new USB cable from the US', 'en'),
    ('I am here', 'en'),
    ('A B C', 'en'),
    ('OK', 'en'),
    ('la SNCF est en grève', 'fr'),
    ('it is so good', 'en'),
    ('これはNHKとJRとTBSです', 'ja'),
    ('1234 5678', 'en'),
  ],
)
def test_no_capitals(text, language):
  assert not _found('capitals', text, language)


@pytest.mark.parametrize(
  'text, language',
  [
    ('idk what to say', 'en'),
    ('LMAO no', 'en'),
    ('we’re gonna be late', 'en'),
    ('c u at 8', 'en'),
    ('I was just talkin’ to him', 'en'),
    ('what a great idea /s', 'en'),
    ('nooooo way', 'en'),
    ('hahahahaha', 'en'),
    ('mdr c trop drole', 'fr'),
    ('Ouais, bof', 'fr'),
    ('je sais pas pq', 'fr'),
    ("T'as vu ça ?", 'fr'),
    ('それはひどいｗｗｗ', 'ja'),
    ('まじでやばい', 'ja'),
    ('ググれ', 'ja'),
    ('面白すぎる（笑）', 'ja'),
    ('それは草', 'ja'),
    ('あああああ', 'ja'),
    ('すごーーい', 'ja'),
  ],
)
def test_slang(text, language):
  assert _found('slang', text, language)


@pytest.mark.parametrize(
  'text, language',
  [
    ('I do not know what to say.', 'en'),
    ('He lives in the U.S. now', 'en'),
    ('Vitamin U and the R language', 'en'),
    ('World War III and www.example.com', 'en'),
    ('a lollipop', 'en'),
    ('The RRR has an AAA rating', 'en'),
    ('see r/lol', 'en'),
    ('Ben est au PQ', 'fr'),
    ('Le chat dort sur le canapé.', 'fr'),
    ('庭の雑草を抜く。', 'ja'),
    ('マジックショーを見た。', 'ja'),
    ('スイッチを押してください。', 'ja'),
  ],
)
def test_no_slang(text, language):
  assert not _found('slang', text, language)


@pytest.mark.parametrize(
  'text, language',
  [
    ('I definately saw it', 'en'),
    ('that dont work', 'en'),
    ('You should of told me', 'en'),
    ('so i told him', 'en'),
    ("i'm late", 'en'),
    ('I went to the the shop', 'en'),
    ('your welcome', 'en'),
    ('nice one,thanks', 'en'),
    ('It broke.Then it burned', 'en'),
    ('it;s fine', 'en'),
    ('ca va etre long', 'fr'),
    ('jai pas compris', 'fr'),
    ('si j’aurais su', 'fr'),
    ('malgrés tout', 'fr'),
  ],
)
def test_typos(text, language):
  assert _found('typos', text, language)


@pytest.mark.parametrize(
  'text, language',
  [
    ("I don't know, and I can't say.", 'en'),
    ('I know that that is odd', 'en'),
    ('They had had enough', 'en'),
    ('i.e. this one', 'en'),
    ('see https://i.example.com/the,the', 'en'),
    ('10,000 people', 'en'),
    ('r/dont is full', 'en'),
    ('Ça va être long', 'fr'),
    ('Nous nous lavons, vous vous levez', 'fr'),
    ('J’ai compris', 'fr'),
  ],
)
def test_no_typos(text, language):
  assert not _found('typos', text, language)


@pytest.mark.parametrize(
  'text',
  [
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
  ],
)
def test_markup(text):
  assert _found('markup', text, 'en')


@pytest.mark.parametrize(
  'text',
  [
    'plain text, with commas; and (brackets)',
    '2 * 3 * 4 = 24',
    'and/or, his/her',
    'what the f**k is that s**t',
    'AT&T and R&D',
    'mail me @ home',
    'number #1 again',
    'a well-known part - really',
    '2 > 1',
  ],
)
def test_no_markup(text):
  assert not _found('markup', text, 'en')


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
  found = noise.classes(' ' + '語' * size + '\n', 'ja')
  assert found == ((name,) if name else ())


def test_classes_overlap_and_keep_their_order():
  found = noise.classes('idk why u dont LOVE it 😂', 'en')
  assert found == ('emoji', 'capitals', 'slang', 'typos')
  assert noise.classes('This is an ordinary sentence.', 'en') == ()


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
