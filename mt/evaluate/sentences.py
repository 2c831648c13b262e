"""Sentences to read: source, reference and translations, as text and HTML."""

from collections.abc import Sequence
import difflib
import html
import pathlib

import chex
import numpy as np
import regex

from mt.base import files
from mt.base import journal
from mt.evaluate import noise
from mt.evaluate import scores
from mt.gemma import parameters
from mt.translate import translator as translator_lib

COLUMNS = ('source', 'reference', 'before', 'after')

# Sentences shown of a split: spread over it, and those that lost most.
_SPREAD, _LOST = 40, 10
_WORD = regex.compile(
  # A word, a sign; of writing without spaces a character.
  r'[\p{Han}\p{Hiragana}\p{Katakana}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}])'
  r"\w)+['’]?|\S"
)

# Columns with their names: source, reference, and those of translations.
Texts = Sequence[tuple[str, Sequence[str]]]


def tables(
  texts: Texts,
  languages: tuple[str, str],
  loops: Sequence[int] = (),
  cut_off: Sequence[int] = (),
) -> str:
  """Sentences spread over a split, and those that went wrong, as HTML.

  Args:
    texts: those of COLUMNS.
    languages: codes of source and target, such as en.
    loops: which translations go round and round, see scores.looping.
    cut_off: which are cut off at their limit; some of them are shown.
  """
  references, *made = _check(texts)[1:]
  before, after = (
    np.array(list(map(scores.sentence_chrf, column, references)))
    for column in made
  )
  total, gains = len(references), after - before
  spread = _spread(range(total))
  lost = [i for i in np.argsort(gains, kind='stable').tolist() if gains[i] < 0]
  parts = {
    f'{len(spread):,} of {total:,}, evenly spread': spread,
    'Those that lost most': lost[:_LOST],
    f'{len(loops):,} that go round and round': loops,
    f'{len(cut_off):,} that are cut off at their limit': _spread(
      cut_off, _LOST
    ),
  }
  return (
    '<p class="dim">Words that the reference has not at that place are '
    '<mark>marked</mark>; <span class="gap">‸</span> stands where it has words '
    'that are not there. Numbers are chrF of the sentence.</p>'
  ) + ''.join(
    f'<h3>{title}</h3>{_table(texts, chosen, languages)}'
    for title, chosen in parts.items()
    if chosen
  )


def differing(texts: Texts, languages: tuple[str, str]) -> str:
  """Sentences that runs translate differently, spread over a split, as HTML."""
  sources, _, *made = _check(texts)
  rows = enumerate(zip(*made, strict=True))
  differ = [i for i, of_runs in rows if len({*of_runs}) > 1]
  return (
    f'<p class="dim">{len(differ):,} of {len(sources):,} translations differ. '
    'What the reference has not is <mark>marked</mark>; numbers are chrF of '
    f'the sentence.</p>{_table(texts, _spread(differ), languages)}'
  )


def _check(texts) -> list[Sequence[str]]:
  columns = [column for _, column in texts]
  chex.assert_equal([*map(len, columns)], [len(columns[0])] * len(columns))
  return columns


def _spread(numbers: Sequence[int], most: int = _SPREAD) -> list[int]:
  number = min(len(numbers), most)
  places = np.linspace(0, len(numbers) - 1, number).astype(int)
  return [numbers[i] for i in places]


def _table(texts, chosen, languages) -> str:
  head = ''.join(f'<th>{html.escape(name)}</th>' for name, _ in texts)
  rows = ''.join(_row(texts, i, *languages) for i in chosen)
  return (
    f'<table class="sentences"><thead><tr>{head}</tr></thead>'
    f'<tbody>{rows}</tbody></table>'
  )


def _row(texts, i, source_language, target_language) -> str:
  """Sentence i; numbers are of the translations, tags of the source."""
  source, reference, *_ = (column[i] for _, column in texts)
  tags = [f'{i + 1}', *noise.classes(source, source_language)]
  tags = ''.join(f'<span class="tag">{tag}</span>' for tag in tags)
  cells = [
    _cell('source', source_language, html.escape(source), tags),
    _cell('reference', target_language, html.escape(reference), ''),
  ]
  first = None
  for name, column in texts[2:]:
    score = scores.sentence_chrf(column[i], reference)
    note = '' if first is None else f' ({change(first, score)})'
    first = score if first is None else first
    shown = marked(reference, column[i])
    cells.append(_cell(name, target_language, shown, f'{score:.1f}{note}'))
  return f'<tr>{"".join(cells)}</tr>'


def _cell(name, code, text, note) -> str:
  """`text` and `note` are HTML."""
  return (
    f'<td data-name="{html.escape(name)}"><p lang="{html.escape(code)}" '
    f'dir="auto">{text}</p><small>{note}</small></td>'
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


def samples(
  sources: Sequence[str],
  references: Sequence[str],
  before: Sequence[str],
  after: Sequence[str],
) -> str:
  """Eight sentences, evenly spread over the split, to be read."""
  chex.assert_equal(
    [len(sources)] * 3, [len(references), len(before), len(after)]
  )
  return '\n'.join(
    f'source     {sources[i]}\n'
    f'reference  {references[i]}\n'
    f'before     {before[i]}\n'
    f'after      {after[i]}\n'
    for i in _spread(range(len(sources)), 8)
  )


def show_texts(
  translator: translator_lib.Translator,
  params: parameters.Params,
  texts: Sequence[str],
  workdir: pathlib.Path,
  called: str = 'texts',
) -> None:
  """Translates texts, shows them, leaves them in translations/CALLED.*.txt."""
  made = translator(params, list(texts))
  for name, lines in (('source', texts), ('after', made)):
    path = workdir / 'translations' / f'{called}.{name}.txt'
    files.write_lines(path, lines)
  for source, after in zip(texts, made, strict=True):
    journal.say(f'source     {source}\nafter      {after}')
