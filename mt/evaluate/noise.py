"""What is noisy about a sentence: classes found by rules, to score them apart.

The classes follow the kinds of noise that MTNT was collected for (Michel and
Neubig 2018, arXiv 1809.00388, section 2), as far as rules can see them. They
overlap. A rule finds what is plain and lets the rest go: a sentence without a
class is not thereby clean.

  emoji       an emoji or an emoticon, kaomoji included; any language
  capitals    shouted: half of the words, two words in a row, or one that nobody
              writes in capitals otherwise. Words for en and fr; no rule for ja
  slang       internet slang, abbreviations, stretched words; en, fr, ja
  typos       known misspellings, lost apostrophes, accents and spaces, a word
              twice; en and fr. Others need a dictionary, and are not found
  markup      Markdown, HTML entities, URLs, /r/…, /u/…; any language
  very short  at most 3 words (8 characters in ja and others without spaces)
  very long   40 words or more (100 characters)

What is looked for stands in mt/evaluate/words: CLASS.LANGUAGE.txt, CLASS.txt.
"""

from collections.abc import Sequence
import itertools
import pathlib

import regex

from mt.data import template

CLASSES = (
  *('emoji', 'capitals', 'slang', 'typos', 'markup'),
  *('very short', 'very long'),
)
CHINESE = 'lzh', 'wuu', 'yue', 'zh'
# Burmese, Dzongkha, Khmer, Lao, Shan, Thai, Tibetan: no spaces between words.
UNSPACED = 'bo', 'dz', 'km', 'lo', 'my', 'shn', 'th'
_WITHOUT_SPACES = ('ja', *CHINESE, *UNSPACED)
# What is in there is nobody's spelling.
_NOT_PROSE = regex.compile(r'https?://\S+|www\.\S+|(?<!\w)/?[ru]/\w+|`[^`]*`')
_STRETCHED = regex.compile(
  # III, www and RRR are not; a kana stands three times in some words.
  r'\b(?!(\p{L})\1*\b)\w*(\p{Latin})(?<![IiVvXxWw])\2{2,}|'
  r'(?:ha|ah|he|eh|lo){3,}|([\p{Hiragana}\p{Katakana}])\3{3,}|ー{2,}',
  regex.I,
)

_TYPOS_ANY = regex.compile(
  # "word,word" and "end.Next", of Latin letters.
  r'\b\p{Ll}{2,},\p{L}{2,}\b|\b\p{Ll}{3,}[.!?]\p{Lu}\p{Ll}+\b'
)
_ALPHABET = regex.compile(r"\p{L}[\p{L}'’]*\p{L}")


def _read(path: pathlib.Path) -> tuple[regex.Pattern, ...]:
  """A list of words: each line a word, a phrase, or / and a pattern.

  A word in lower case stands for any case. One with capitals, or behind =, is
  meant as it is written.
  """
  lines = path.read_text(encoding='utf-8').splitlines()
  words = [line for line in lines if line and line[0] not in '#=/']
  exact = [line[1:] for line in lines if line.startswith('=')]
  exact += [word for word in words if word != word.lower()]
  words = [word for word in words if word == word.lower()]
  patterns = [f'(?:{line[1:]})' for line in lines if line.startswith('/')]
  pattern = regex.compile('|'.join(patterns) or r'(?!)')
  return _any_of(words, regex.I), _any_of(exact, 0), pattern


def _any_of(words: Sequence[str], flags: int) -> regex.Pattern:
  """One of these words or phrases, with any space and any apostrophe."""
  escaped = [
    regex.escape(word, literal_spaces=True)
    .replace(' ', r'\s+')
    .replace("'", "['’]")
    for word in sorted(words, key=len, reverse=True)
  ]
  inside = '|'.join(escaped) or r'(?!)'
  return regex.compile(rf"(?<![\w'’\-])(?:{inside})(?!['’\-]?\w|\.\w)", flags)


# Such as emoji and slang.en: what finds it.
_LISTS = {
  path.stem: _read(path)
  for path in pathlib.Path(__file__).with_name('words').glob('*.txt')
}


def has_rule(name: str, language: str) -> bool:
  """Whether a class of CLASSES can be found in a language at all."""
  language = template.base_language(language)
  return {
    'capitals': language not in _WITHOUT_SPACES,
    'slang': f'slang.{language}' in _LISTS,
    'typos': f'typos.{language}' in _LISTS,
  }.get(name, True)


def classes(text: str, language: str) -> tuple[str, ...]:
  """The classes of a sentence, in the order of CLASSES.

  In en, 'idk why u dont LOVE it 😂' has `('emoji', 'capitals', 'slang',
  'typos')`. `language` is a code; for what it has no rules, see has_rule.
  """
  prose = _NOT_PROSE.sub(' ', text)
  language = template.base_language(language)
  size, short, long = len(text.split()), 3, 40
  if language in _WITHOUT_SPACES:
    size, short, long = len(''.join(text.split())), 8, 100
  found = {
    'emoji': _listed('emoji', _NOT_PROSE.sub('', text)),
    'capitals': _shouts(prose, language),
    'slang': _listed(f'slang.{language}', prose) or _STRETCHED.search(prose),
    'typos': _listed(f'typos.{language}', prose) or _TYPOS_ANY.search(prose),
    'markup': _listed('markup', text),
    'very short': size <= short,
    'very long': size >= long,
  }
  return tuple(
    name for name in CLASSES if has_rule(name, language) and found[name]
  )


def _listed(name, text) -> bool:
  """Whether a list of words has something in a text."""
  return any(p.search(text) for p in _LISTS.get(name, ()))


def _shouts(text, language) -> bool:
  words = _ALPHABET.findall(text)
  loud = [w == w.upper() != w.lower() for w in words]
  if sum(loud) >= 2 and 2 * sum(loud) >= len(words) and len(words) > 2:
    return True
  long = [l and len(w) >= 5 for l, w in zip(loud, words, strict=True)]
  if any(a and b for a, b in itertools.pairwise(long)):
    return True
  return _listed(f'capitals.{language}', text)
