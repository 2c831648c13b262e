"""What a knob is, and the rules that its value may have to keep.

A rule has no say about types: ml_collections refuses a text for a number.
"""

from collections.abc import Callable
import math
import re
from typing import Any
from typing import NamedTuple


class Rule(NamedTuple):
  """(test, what is expected): the second completes `… expected.`"""

  test: Callable[[Any], bool]
  expected: str


class Knob(NamedTuple):
  """One line of configs/default.py.

  Attributes:
    path: GROUP.NAME, as on the command line after `--config.`.
    default: its value where nothing else is said; decides its type.
    rule: what its value must be.
    doc: what it does, with its unit; one paragraph.
    resume: whether the config of a run may change it between two starts:
      'same', never; 'free', as a step computes the same but for rounding;
      'same_if_scored', only where checkpoints are not compared by chrF, which
      would be of other sentences or of another search.
  """

  path: str
  default: Any
  rule: Rule
  doc: str
  resume: str


def knob(
  path: str, default: Any, rule: Rule, doc: str, resume: str = 'same'
) -> Knob:
  """A Knob whose doc may be indented over several lines."""
  return Knob(path, default, rule, ' '.join(doc.split()), resume)


def at_least(low: float) -> Rule:
  return Rule(lambda v: low <= v < math.inf, f'{low} or more')


def between(low: float, high: float) -> Rule:
  return Rule(lambda v: low <= v <= high, f'from {low} to {high}')


def fraction() -> Rule:
  return Rule(lambda v: 0 <= v < 1, 'from 0 to below 1')


def one_of(*names: str) -> Rule:
  return Rule(lambda v: v in names, 'one of ' + ', '.join(names))


def each(test: Callable[[Any], bool], expected: str) -> Rule:
  return Rule(lambda values: all(map(test, values)), expected)


def _is_prompt(v: str) -> bool:
  words = re.findall(r'{(\w[\w -]+)}', v)
  return v == 'translategemma' or (
    words.count('source') == 1 and {*words} <= {'source', *FIELDS}
  )


def _is_column(v: Any) -> bool:
  return (isinstance(v, int) and v >= 1) or (isinstance(v, str) and bool(v))


_is_pair = re.compile(
  '[A-Za-z]{2,}(_[A-Za-z]+)*-[A-Za-z]{2,}(_[A-Za-z]+)*'
).fullmatch


def _are_pairs(v: str) -> bool:
  pairs = [pair.strip().lower() for pair in v.split(',')]
  return all(map(_is_pair, pairs)) and len({*pairs}) == len(pairs)


ANY = Rule(lambda v: True, 'any value')
TEXT = Rule(bool, 'some text')
POSITIVE = Rule(lambda v: 0 < v < math.inf, 'more than 0')
AXIS = Rule(lambda v: v == -1 or v >= 1, '1 or more, or -1 for what is left')
FORMAT = Rule(
  lambda v: v in ('auto', 'float32', 'bfloat16'),
  "auto, float32 or bfloat16 (float16 overflows in Gemma's activations)",
)
FROZEN = one_of('auto', 'float32', 'bfloat16', 'int8', 'int4')
LANGUAGES = Rule(
  _are_pairs,
  'two languages such as en-fr or en-pt_BR, or several such pairs with commas '
  'between them, each once',
)
COLUMNS = Rule(
  lambda v: (
    len(v) in (0, 2)
    and all(map(_is_column, v))
    and len({*map(type, v)}) < 2
    and len({*v}) == len(v)
  ),
  'two numbers from 1 up, two names, or ()',
)
IN_LINE = Rule(
  lambda v: '\n' not in v,
  'a text without a line break, which ends a translation',
)
FIELDS = 'source_language', 'target_language', 'source_code', 'target_code'
PROMPT = Rule(
  _is_prompt,
  'a text with {source} in it once and no other word in braces than '
  f'{", ".join(FIELDS)}, or translategemma',
)
