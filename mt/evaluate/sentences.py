"""Sentences side by side, as HTML: source, reference, before and after."""

from collections.abc import Sequence
import difflib
import html

import chex
import numpy as np
import regex
import sacrebleu

from mt.evaluate import noise

COLUMNS = ('source', 'reference', 'before', 'after')

# Sentences shown of a split: spread over it, and those that lost most.
_SPREAD, _LOST = 40, 10
_WORD = regex.compile(
  # A word, a sign; of writing without spaces a character.
  r'[\p{Han}\p{Hiragana}\p{Katakana}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}])'
  r"\w)+['’]?|\S"
)


def tables(
  sources: Sequence[str],
  references: Sequence[str],
  before: Sequence[str],
  after: Sequence[str],
  source_language: str,
  target_language: str,
) -> str:
  """Sentences spread over a split, and those that lost most, as HTML.

  Args:
    sources, references, before, after: of each pair.
    source_language, target_language: codes, such as en.
  """
  chex.assert_equal(
    [len(sources)] * 3, [len(references), len(before), len(after)]
  )
  texts = sources, references, before, after
  metric = sacrebleu.CHRF()
  ends = [
    [metric.sentence_score(made, [reference]).score for made in column]
    for reference, *column in zip(references, before, after, strict=True)
  ]
  languages, total = (source_language, target_language), len(ends)
  spread = np.unique(np.linspace(0, total - 1, _SPREAD).astype(int)).tolist()
  gains = [after - before for before, after in ends]
  lost = sorted(
    (i for i in range(total) if gains[i] < 0), key=gains.__getitem__
  )
  out = [
    '<p class="dim">Words that the reference has not at that place are '
    '<mark>marked</mark>; <span class="gap">‸</span> stands where it has words '
    'that are not there. Numbers are chrF of the sentence.</p>'
  ]
  for title, chosen in (
    (f'{len(spread):,} of {total:,}, evenly spread', spread),
    ('Those that lost most', lost[:_LOST]),
  ):
    rows = [
      _sentence(i, [t[i] for t in texts], ends[i], *languages) for i in chosen
    ]
    if rows:
      head = ''.join(f'<th>{n}</th>' for n in COLUMNS)
      out.append(
        f'<h3>{title}</h3><table class="sentences"><thead><tr>{head}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table>'
      )
  return ''.join(out)


def _sentence(number, texts, ends, source_language, target_language) -> str:
  source, reference, before, after = texts
  tags = [f'{number + 1}', *noise.classes(source, source_language.lower())]
  tags = ''.join(f'<span class="tag">{_text(tag)}</span>' for tag in tags)
  cells = (
    ('source', source_language, _text(source), tags),
    ('reference', target_language, _text(reference), ''),
    ('before', target_language, marked(reference, before), f'{ends[0]:.1f}'),
    (
      'after',
      target_language,
      marked(reference, after),
      f'{ends[1]:.1f} ({change(*ends)})',
    ),
  )
  return (
    '<tr>'
    + ''.join(
      f'<td data-name="{name}"><p lang="{_text(code)}" dir="auto">{text}</p>'
      f'<small>{note}</small></td>'
      for name, code, text, note in cells
    )
    + '</tr>'
  )


def marked(reference: str, text: str) -> str:
  """A text as HTML, with what the reference has not in <mark>.

  Words are compared, or characters where writing has no spaces (difflib); ’ is
  an apostrophe. A ‸ stands where words of the reference have nothing in their
  place.
  """
  words = list(_WORD.finditer(text))
  matcher = difflib.SequenceMatcher(
    None,
    [w.replace('’', "'") for w in _WORD.findall(reference)],
    [w.group().replace('’', "'") for w in words],
    autojunk=False,
  )
  out, at = [], 0
  for kind, _, _, first, end in matcher.get_opcodes():
    if kind == 'delete':
      out.append('<span class="gap">‸</span>')
      continue
    start, stop = words[first].start(), words[end - 1].end()
    part = _text(text[start:stop])
    out.append(_text(text[at:start]))
    out.append(part if kind == 'equal' else f'<mark>{part}</mark>')
    at = stop
  return ''.join([*out, _text(text[at:])])


def change(before: float, after: float) -> str:
  """A difference of scores, coloured, as HTML."""
  kind = 'up' if after > before else 'down' if after < before else 'dim'
  return f'<span class="{kind}">{after - before:+.2f}</span>'


def _text(value) -> str:
  return html.escape(str(value))
