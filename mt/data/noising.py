"""Noise on purpose: sources made noisy in MTNT's ways (arXiv 1809.00388).

  a word      two letters swapped, one lost or doubled, or the key beside it;
              accents and apostrophes lost; an abbreviation in its place (en,
              fr); a letter repeated; in capitals
  a sentence  an emoji or a word of slang at its end; all in capitals, or none

The kinds are those that mt/evaluate/noise.py finds. What stands in a URL, a
subreddit or a name of a user is left as it is.
"""

from collections.abc import Sequence
import pathlib
import random
import unicodedata

import regex

VERSION = 3  # To be raised when the noise of a text becomes other.

# Language -> [a word, its short form], or ['', what ends a sentence]. All of it
# is in the lists of mt/evaluate/words, too.
_SLANG = {
  path.stem: [
    line.split('\t')
    for line in path.read_text('utf-8').splitlines()
    if line[:1] != '#'
  ]
  for path in pathlib.Path(__file__).with_name('slang').glob('*.tsv')
}
_EMOJI = ('😂', '😭', '🔥', '🙄', '👍', '😍', ':)', ':D', ':/', '<3')
_KEYS = {
  'fr': ('azertyuiop', 'qsdfghjklm', 'wxcvbn'),
  '': ('qwertyuiop', 'asdfghjkl', 'zxcvbnm'),
}
# What is left alone, or a word with its apostrophes.
_words = regex.compile(r"\S*[/@#]\S*|[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*")
_latin = regex.compile(r"[\p{Latin}\p{M}'’]+").fullmatch
_stretchable = regex.compile('[aeouy](?=[^aeouy]*$)', regex.I)


def noised(text: str, share: float, seed: Sequence[int], language: str) -> str:
  """A text of which this share of words is noisy; all of it as often.

  In en, 'I love it because you are right' becomes 'I luv it becuase u are
  right 😂'.

  Args:
    share: how likely each word is changed, and the sentence; 0 to 1.
    seed: whole numbers that decide all draws.
    language: a code without a region.
  """
  rng = random.Random(repr(tuple(map(int, seed))))
  rows = _SLANG.get(language, ())
  slang, last = dict(rows), tuple(short for word, short in rows if not word)

  def change(match):
    word = match[0]
    if rng.random() >= share or not word[0].isalpha() or _is_left(word):
      return word
    # Typing errors are most frequent where nobody makes noise on purpose.
    kinds = [_mistyped(word, rng, language)] * 4 + [_bare(word)] * 2
    kinds += [slang.get(word.lower(), '')] * 2
    kinds += [_stretched(word, rng), word.upper()]
    return _pick([x for x in kinds if x and x != word] or [word], rng)

  text = _words.sub(change, text)
  if rng.random() >= share:
    return text
  added = f'{text} {_pick(_EMOJI + last, rng)}'
  cased = [_cased(text, x) for x in (str.upper, str.lower)]
  return _pick([added, added, *cased], rng)


def _is_left(word):
  """Whether it is a match of _words that is no word."""
  return {*word} & {*'/@#'}


def _cased(text, change) -> str:
  return _words.sub(lambda m: m[0] if _is_left(m[0]) else change(m[0]), text)


def _pick(options, rng):
  # Only random() is promised to give the same numbers for ever.
  return options[int(rng.random() * len(options))]


def _mistyped(word, rng, language) -> str:
  """A word as it is often typed."""
  at = int(rng.random() * len(word))
  before, letter, after = word[:at], word[at], word[at + 1 :]
  kinds = [before + letter + word[at:]]
  if len(word) > 2:
    kinds += [before + after, before + after[:1] + letter + after[1:]]
  for row in _KEYS.get(language, _KEYS['']):
    place = row.find(letter.lower())
    if place >= 0:
      beside = _pick(row[max(0, place - 1) : place] + row[place + 1 :][:1], rng)
      kinds.append(before + (beside.upper() if letter.isupper() else beside))
      kinds[-1] += after
  return _pick(kinds, rng)


def _stretched(word, rng) -> str:
  """With its last vowel three to six times, in Latin letters."""
  times = 3 + int(rng.random() * 4)
  if len(word) < 2 or not _latin(word):
    return ''
  return _stretchable.sub(lambda m: m[0] * times, word, count=1)


def _bare(word) -> str:
  """Without accents and apostrophes, in Latin letters."""
  if not _latin(word):
    return ''
  parts = unicodedata.normalize('NFD', word)
  return ''.join(c for c in parts if c.isalpha())
