"""Sentences side by side, as HTML: source, reference, before and after."""

from collections.abc import Sequence
import difflib
import html

import chex
import numpy as np
import regex

from mt.evaluate import noise
from mt.evaluate import scores

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

  The languages are codes, such as en.
  """
  chex.assert_equal(
    [len(sources)] * 3, [len(references), len(before), len(after)]
  )
  texts = list(zip(sources, references, before, after, strict=True))
  ends = [
    [scores.sentence_chrf(text, reference) for text in made]
    for _, reference, *made in texts
  ]
  languages, total = (source_language, target_language), len(ends)
  spread = np.unique(np.linspace(0, total - 1, _SPREAD).astype(int)).tolist()
  gains = [after - before for before, after in ends]
  lost = [i for i in np.argsort(gains, kind='stable').tolist() if gains[i] < 0]
  out = [
    '<p class="dim">Words that the reference has not at that place are '
    '<mark>marked</mark>; <span class="gap">‸</span> stands where it has words '
    'that are not there. Numbers are chrF of the sentence.</p>'
  ]
  for title, chosen in (
    (f'{len(spread):,} of {total:,}, evenly spread', spread),
    ('Those that lost most', lost[:_LOST]),
  ):
    rows = [_sentence(i, texts[i], ends[i], *languages) for i in chosen]
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
  tags = ''.join(f'<span class="tag">{tag}</span>' for tag in tags)
  first, last = f'{ends[0]:.1f}', f'{ends[1]:.1f} ({change(*ends)})'
  cells = (
    ('source', source_language, html.escape(source), tags),
    ('reference', target_language, html.escape(reference), ''),
    ('before', target_language, marked(reference, before), first),
    ('after', target_language, marked(reference, after), last),
  )
  return _row(cells)


def _row(cells) -> str:
  """Of (column, language, HTML of the text, note) each."""
  row = ''.join(
    f'<td data-name="{html.escape(name)}"><p lang="{html.escape(code)}" '
    f'dir="auto">{text}</p><small>{note}</small></td>'
    for name, code, text, note in cells
  )
  return f'<tr>{row}</tr>'


def differing(
  sources: Sequence[str],
  references: Sequence[str],
  made: dict[str, Sequence[str]],
  source_language: str,
  target_language: str,
) -> str:
  """Sentences that runs translate differently, spread over a split, as HTML.

  `made` has the translations of each run under its name.
  """
  chex.assert_equal(
    [len(sources)] * (1 + len(made)),
    [len(references), *map(len, made.values())],
  )
  differ = [
    i
    for i, texts in enumerate(zip(*made.values(), strict=True))
    if len(set(texts)) > 1
  ]
  spread = np.linspace(0, len(differ) - 1, min(len(differ), _SPREAD)).astype(
    int
  )
  rows = []
  for i in (differ[j] for j in spread.tolist()):
    reference = references[i]
    cells = [
      ('source', source_language, html.escape(sources[i]), f'{i + 1}'),
      ('reference', target_language, html.escape(reference), ''),
    ]
    for name, texts in made.items():
      score = scores.sentence_chrf(texts[i], reference)
      text = marked(reference, texts[i])
      cells.append((name, target_language, text, f'{score:.1f}'))
    rows.append(_row(cells))
  head = ('source', 'reference', *map(html.escape, made))
  return (
    f'<p class="dim">{len(differ):,} of {len(sources):,} translations differ. '
    'What the reference has not is <mark>marked</mark>; numbers are chrF of '
    'the sentence.</p><table class="sentences"><thead><tr>'
    f'{"".join(f"<th>{n}</th>" for n in head)}</tr></thead><tbody>'
    f'{"".join(rows)}</tbody></table>'
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
    part = html.escape(text[start:stop])
    out.append(html.escape(text[at:start]))
    out.append(part if kind == 'equal' else f'<mark>{part}</mark>')
    at = stop
  return ''.join([*out, html.escape(text[at:])])


def change(before: float, after: float) -> str:
  """A difference of scores, coloured, as HTML."""
  kind = 'up' if after > before else 'down' if after < before else 'dim'
  return f'<span class="{kind}">{after - before:+.2f}</span>'
