"""Translations that go round and round: found by what stands in them twice."""

import re

# A piece of text that follows itself: twice if it is long, else four times.
_REPEATED = re.compile(r'(.{8,200}?)\1{2,}|(.{1,7}?)\2{4,}', re.DOTALL)
_ALLOWED = 20  # Characters, and twice as many as the source repeats.


def goes_round(source: str, text: str) -> bool:
  """Whether a translation repeats itself where its source does not.

  Noisy text has its "!!!!!!" and "hahahaha"; what repeats far more than that is
  a model that does not find its end.
  """
  return _repeated(text) > _ALLOWED + 2 * _repeated(source)


def _repeated(text):
  """Characters in the longest repetition."""
  return max((len(m[0]) for m in _REPEATED.finditer(text.lower())), default=0)
