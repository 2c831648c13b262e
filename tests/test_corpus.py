"""The file layout of MTNT, its errors, and the bundled sample."""

import functools
import pathlib
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from mt import corpus
from mt import errors
from mt import workdir

# What str.splitlines() takes for the end of a line, besides LF and CR; MTNT is
# full of text copied from the web, where such characters do occur.
OTHER_BREAKS = '\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'


def _read(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return corpus.read_pairs(path)


def _columns(pairs):
  return [(p.id, p.source, p.target) for p in pairs]


# Layout.


@pytest.mark.parametrize('last', ['', 'ending'])
@pytest.mark.parametrize('ending', ['\n', '\r\n'])
def test_three_columns(tmp_path, ending, last):
  content = f'1\tHi!\tSalut !{ending}7b\tlol no\tmdr non'
  pairs = _read(tmp_path / 'x.tsv', content + (ending if last else ''))
  assert _columns(pairs) == [
    ('1', 'Hi!', 'Salut !'),
    ('7b', 'lol no', 'mdr non'),
  ]


def test_line_endings_may_be_mixed(tmp_path):
  pairs = _read(tmp_path / 'x.tsv', '1\ta\tb\r\n2\tc\td\n3\te\tf\r\n')
  assert [p.target for p in pairs] == ['b', 'd', 'f']


def test_a_quote_is_a_character(tmp_path):
  # csv.reader with its defaults, which TFDS uses, makes two pairs of this.
  content = '1\t"so close\t"si près\n2\t"lol" he said\t"mdr"\n3\ta "b" c\t""d\n'
  assert _columns(_read(tmp_path / 'x.tsv', content)) == [
    ('1', '"so close', '"si près'),
    ('2', '"lol" he said', '"mdr"'),
    ('3', 'a "b" c', '""d'),
  ]


@pytest.mark.parametrize('char', [*OTHER_BREAKS, '\r', '\x00', '\ufeff'])
def test_nothing_but_lf_and_crlf_ends_a_line(tmp_path, char):
  content = f'1\tone{char}line\t{char}une{char} ligne\n2\ta\tb\n'
  pairs = _read(tmp_path / 'x.tsv', content)
  assert _columns(pairs) == [
    ('1', f'one{char}line', f'{char}une{char} ligne'),
    ('2', 'a', 'b'),
  ]


def test_white_space_is_kept(tmp_path):
  pairs = _read(tmp_path / 'x.tsv', ' 1 \t  two  spaces \t\u00a0fine !\u202f\n')
  assert _columns(pairs) == [(' 1 ', '  two  spaces ', '\u00a0fine !\u202f')]


# Surrogates have no UTF-8; the other three would be layout.
_field = st.text(
  st.characters(exclude_categories=['Cs'], exclude_characters='\t\n\r')
)
_text = _field.filter(str.strip)


@given(
  rows=st.lists(st.tuples(_field, _text, _text), min_size=1),
  ending=st.sampled_from(['\n', '\r\n']),
)
def test_what_is_written_is_read_back(tmp_path_factory, rows, ending):
  path = tmp_path_factory.getbasetemp() / 'round_trip.tsv'
  content = ''.join('\t'.join(row) + ending for row in rows)
  assert _columns(_read(path, content)) == rows


def test_a_folder_has_a_file_for_each_split():
  path = corpus.split_path('data/MTNT', 'valid', 'en-fr')
  assert path == pathlib.Path('data/MTNT/valid/valid.en-fr.tsv')


def test_a_newline_in_a_text_is_a_space_in_a_workdir(tmp_path):
  workdir.write_lines(tmp_path / 'x.txt', ['a\nb', 'c'])  # See tfds_quoting.
  assert workdir.read_lines(tmp_path / 'x.txt') == ['a b', 'c']


# Errors.


def _error(path):
  with pytest.raises(errors.UserError) as caught:
    corpus.read_pairs(path)
  message = str(caught.value)
  # One sentence, shown after `error: ` as one line.
  assert message == message.strip() and message.endswith('.')
  assert len(message.splitlines()) == 1
  assert '. ' not in message.replace(str(path), '')
  return message


@pytest.mark.parametrize(
  ('content', 'line', 'found'),
  [
    ('1\ta\tb\n2\tno target\n', 2, '2 columns found, 3 expected'),
    ('just text\n', 1, '1 columns found, 3 expected'),
    ('1\ta\tb\n2\tc\td\te\n', 2, '4 columns found, 3 expected'),
    ('1\ta\tb\t\n', 1, '4 columns found, 3 expected'),
    ('1\ta\tb\n2\t\td\n', 2, 'empty source'),
    ('1\t \u00a0\tb\n', 1, 'empty source'),
    ('1\ta\t\n', 1, 'empty source or target'),
    ('1\ta\t\r\n', 1, 'empty source or target'),
    ('1\ta\tb\n\n3\te\tf\n', 2, 'empty line'),
    ('1\ta\tb\r\n\r\n3\te\tf\r\n', 2, 'empty line'),
    ('\n1\ta\tb\n', 1, 'empty line'),
    ('1\ta\tb\n\n', 2, 'empty line'),
    # The other breaks do not count as lines.
    ('1\ta\u2028\x85b\tc\n2\td\n', 2, '2 columns found'),
    ('1\ta\tb\n2\tcafé\td\n'.encode('latin-1'), 2, 'not UTF-8'),
    ('1\ta\tb\n'.encode('utf-16'), 1, 'not UTF-8'),
    (b'1\ta\tb\n2\t\xf0\x9f\x98\td\n', 2, 'not UTF-8'),  # Half an emoji.
  ],
)
def test_an_error_names_file_and_line(tmp_path, content, line, found):
  path = tmp_path / 'train.en-fr.tsv'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  message = _error(path)
  assert message.startswith(f'{path}:{line}: ')
  assert found in message


def test_a_bad_byte_is_located(tmp_path):
  path = tmp_path / 'x.tsv'
  path.write_bytes('1\ta\tb\n2\tcafé\td\n'.encode('latin-1'))
  assert 'at byte 5 of the line' in _error(path)  # 2, tab, c, a, f.


@pytest.mark.parametrize('content', ['', '\r'])
def test_a_file_without_pairs(tmp_path, content):
  path = tmp_path / 'x.tsv'
  path.write_text(content, newline='')
  assert _error(path).startswith(f'{path}: ')


@pytest.mark.parametrize('kind', ['missing', 'folder'])
def test_a_file_that_cannot_be_read(tmp_path, kind):
  path = tmp_path if kind == 'folder' else tmp_path / 'train.en-fr.tsv'
  message = _error(path)
  assert message.startswith(f'{path}: cannot read')
  reason = 'Is a directory' if kind == 'folder' else 'No such file'
  assert reason in message
  # Where the path came from.
  assert 'data.source' in message and 'data.pair' in message


# The bundled sample.


@functools.cache
def _sample(split):
  return corpus.read_pairs(corpus.split_path('sample', split, 'en-fr'))


def _sample_sources():
  splits = ('train', 'valid', 'test')
  return [p.source for split in splits for p in _sample(split)]


@pytest.mark.parametrize(
  ('split', 'least'), [('train', 600), ('valid', 80), ('test', 80)]
)
def test_sample_is_large_enough(split, least):
  assert len(_sample(split)) >= least


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


def test_sample_translations_are_french():
  targets = [p.target for p in _sample('train')]
  accents = re.compile('[àâçéèêëîïôùûü]', re.I)
  assert sum(bool(accents.search(t)) for t in targets) > 0.7 * len(targets)
  # A target as long as its source, within reason: no line is half translated.
  for p in _sample('train'):
    if len(p.source.split()) >= 20:
      assert 0.6 < len(p.target) / len(p.source) < 2, p.id
