"""Signs that are written in several ways, such as ' and ’.

Where the targets that are trained on write them in another way than those that
are scored, a good translation loses points: one of chrF on MTNT2019, whose
French hardly has another than ’ (docs/measurements.md).
"""

from collections import Counter
from collections.abc import Iterable

import regex

_LEAST = 10  # Of a kind on either side; fewer say nothing.
_MOST = 2000  # Texts that are looked at, evenly spread; a shorter start.
_MOVED = 0.25  # Of the signs, that another would have to replace.
_APOSTROPHE = regex.compile(r"(?<=\p{L})['’ʼ`´](?=[\p{L}\p{N}«“\"])")
_KINDS = {
  'apostrophes': _APOSTROPHE,
  'quotes': regex.compile('["“”„«»]'),
  'three dots': regex.compile(r'…|\.\.\.'),
  'spaces before ! and ?': regex.compile(
    r'(?<=[\p{L}\p{N}])[ \xa0\u202f]?(?=[!?])'
  ),
}
_SPELLED = {'': 'none', ' ': 'a space', '\xa0': 'U+00A0', '\u202f': 'U+202F'}


def with_apostrophe(text: str, sign: str) -> str:
  """A text whose apostrophes, those inside words, are all this one."""
  return _APOSTROPHE.sub(sign, text)


def differences(train: Iterable[str], valid: Iterable[str]) -> list[str]:
  """A sentence for each kind of sign that the two write in different ways."""
  train, valid, out = _spread(train), _spread(valid), []
  for name, pattern in _KINDS.items():
    both = [
      Counter(sign for text in texts for sign in pattern.findall(text))
      for texts in (train, valid)
    ]
    sums = [count.total() for count in both]
    if min(sums) < _LEAST:
      continue
    shares = [
      {s: n / t for s, n in c.items()} for c, t in zip(both, sums, strict=True)
    ]
    moved = sum(
      max(0, share - shares[1].get(sign, 0))
      for sign, share in shares[0].items()
    )
    if moved >= _MOVED:
      was, wanted = map(_shares, shares)
      out.append(f'{name} of the targets are {was}; in valid {wanted}')
  return out


def _spread(texts) -> list[str]:
  texts = list(texts)
  return texts[:: max(1, len(texts) // _MOST)]


def _shares(shares) -> str:
  found = sorted(shares.items(), key=lambda item: -item[1])
  return ', '.join(f'{_SPELLED.get(s, s)} {share:.0%}' for s, share in found)
