"""A line of each format becomes a pair, or the reason why it is none."""

import json

import pytest

from mt.data import lines

# What str.splitlines() takes for the end of a line, besides LF and CR; text
# copied from the web, such as MTNT's, does contain them.
OTHER_BREAKS = '\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'


THREE = lines.Columns(3, 1, 2, id=0)
KEYS = lines.Keys('en', 'fr')
ALIGNED = lines.Aligned()

# Columns.


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('7\tHi!\tSalut !', lines.Pair('7', 'Hi!', 'Salut !')),
    (' 7 \t  a  b \t\u00a0c !\u202f', (' 7 ', '  a  b ', '\u00a0c !\u202f')),
    ('\ta\tb', ('', 'a', 'b')),
    # A quote is a character: csv.reader would go on to the next line.
    ('1\t"so close\t""d', ('1', '"so close', '""d')),
    ('1\ta', 'fewer than 3 columns'),
    ('1\ta\tb\t', 'more than 3 columns'),
    ('1\t\tb', 'an empty source'),
    ('1\t \u00a0\u2028\tb', 'an empty source'),
    ('1\ta\t', 'an empty target'),
    ('1\ta\t\u3000', 'an empty target'),
    ('\t\t', 'an empty line'),
    ('1\ta\tb\0', 'a NUL character'),
  ],
)
def test_a_line_of_columns(line, expected):
  assert lines.parse_line(THREE, 5, [line.encode()]) == expected


def test_a_line_without_an_id_has_its_number():
  pair = lines.parse_line(lines.Columns(2, 1, 0), 5, [b'a\tb'])
  assert pair == lines.Pair('5', 'b', 'a')


# JSON.


HUGE = '9' * 5000  # More digits than Python makes an int of.


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"en": "a", "fr": "b"}', ('5', 'a', 'b')),
    (' {"x": [{}], "fr": "é\\u00e9", "en": " a\\t"} ', ('5', ' a\t', 'éé')),
    ('{"en": "\\ud83d\\ude00", "fr": "\U0001f600"}', ('5', '😀', '😀')),
    ('{"en": "a\\u2028\\r\\u0085b", "fr": "c"}', ('5', 'a\u2028\r\x85b', 'c')),
    ('{"en": "a", "fr": "b", "n": 1e999}', ('5', 'a', 'b')),
    ('{"en": "a", "fr": "b"', 'not JSON'),
    ('{"en": "a\tb", "fr": "c"}', 'not JSON'),
    ('\ufeff{"en": "a", "fr": "b"}', 'not JSON'),
    ('a\tb', 'not JSON'),
    ('[' * 100_000, 'not JSON'),
    ('{"en": "a", "fr": "b", "n": ' + HUGE + '}', 'not JSON'),
    ('"en"', "no text under 'en'"),
    ('["en", "fr"]', "no text under 'en'"),
    ('{"en": "a"}', "no text under 'fr'"),
    ('{"en": 3, "fr": "b"}', "no text under 'en'"),
    ('{"en": null, "fr": "b"}', "no text under 'en'"),
    ('{"en": "a\\nb", "fr": "c"}', ('5', 'a\nb', 'c')),
    ('{"en": "a", "fr": "b\\r\\nc"}', ('5', 'a', 'b\r\nc')),
    ('{"en": "a", "fr": "b\\u0000"}', 'a NUL character'),
    ('{"en": "\\ud83d", "fr": "b"}', 'half a surrogate pair'),
    ('{"en": "a", "fr": "\\ude00\\ud83d"}', 'half a surrogate pair'),
    ('{"en": "", "fr": "b"}', 'an empty source'),
    ('{"en": "a", "fr": " \\u2003"}', 'an empty target'),
    (' ', 'an empty line'),
    ('{"en": "a", "fr": "b", "fr": "b"}', "more than one value for 'fr'"),
    ('{"en": "a", "fr": "b", "n": 1, "n": 2}', ('5', 'a', 'b')),
  ],
)
def test_a_line_of_json(line, expected):
  assert lines.parse_line(KEYS, 5, [line.encode()]) == expected


def test_a_dot_goes_into_an_object():
  keys = lines.Keys('translation.en', 'a.b.c')

  def parse(value):
    return lines.parse_line(keys, 1, [json.dumps(value).encode()])

  good = {'translation': {'en': 'x', 'fr': 'z'}, 'a': {'b': {'c': 'y'}}}
  assert parse(good) == ('1', 'x', 'y')
  # A key with a dot in it comes before.
  assert parse({**good, 'translation.en': 'w'}) == ('1', 'w', 'y')
  assert parse({**good, 'a': {'b.c': 'v'}}) == ('1', 'x', 'v')
  for translation in ('en', ['en'], None, {'en': 3}, {'de': 'x'}):
    bad = {**good, 'translation': translation}
    assert parse(bad) == "no text under 'translation.en'"
  for twice in ('"translation": 0, ', '', '"translation": {"en": "x"}, '):
    inner = '"en": "v", ' * (not twice) + '"en": "w"'
    line = f'{{{twice}"translation": {{{inner}}}, "a": {{"b": {{"c": "y"}}}}}}'
    found = lines.parse_line(keys, 1, [line.encode()])
    assert found == "more than one value for 'translation.en'"


# Aligned files.


@pytest.mark.parametrize(
  ('source', 'target', 'expected'),
  [
    (' "a\t b', 'c\t', ('5', ' "a\t b', 'c\t')),
    ('', ' \t\u2028', 'an empty line'),
    ('', 'b', 'an empty source'),
    ('a', ' ', 'an empty target'),
    ('a', 'b\0', 'a NUL character'),
    ('a', b'\xe9', 'not UTF-8'),
    (b'\xe9', '', 'not UTF-8'),
  ],
)
def test_aligned_lines(source, target, expected):
  raws = [x if isinstance(x, bytes) else x.encode() for x in (source, target)]
  assert lines.parse_line(ALIGNED, 5, raws) == expected


# Bytes.


@pytest.mark.parametrize(
  ('raw', 'text'),
  [
    (b'a\n', b'a'),
    (b'a\r\n', b'a'),
    (b'a', b'a'),
    (b'a\r', b'a'),  # The last line of a file whose end was cut.
    (b'a\r\r\n', b'a\r'),
    (b'a\n\n', b'a\n'),
    (b'\r\n', b''),
    (b'a \t\x0b\n', b'a \t\x0b'),
    (b'', b''),
  ],
)
def test_a_line_ends_with_lf_or_crlf(raw, text):
  assert lines.strip_end(raw) == text


@pytest.mark.parametrize('char', [*OTHER_BREAKS, '\r', '\ufeff', '\x01'])
def test_other_characters_are_text(char):
  raw = f'1\tone{char}line\t{char}une{char} ligne'.encode()
  assert lines.parse_line(THREE, 1, [raw]) == lines.Pair(
    '1', f'one{char}line', f'{char}une{char} ligne'
  )


@pytest.mark.parametrize(
  'raw',
  [
    '2\tcafé\td'.encode('latin-1'),
    b'2\t\xf0\x9f\x98\td',  # Half an emoji.
    b'2\t\xc0\x80\td',  # NUL, longer than need be.
    b'2\t\xed\xa0\x80\td',  # A surrogate.
    b'2\t\xf4\x90\x80\x80\td',  # Beyond the last character.
  ],
)
def test_not_utf8(raw):
  assert lines.parse_line(THREE, 1, [raw]) == 'not UTF-8'
