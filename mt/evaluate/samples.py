"""Sentences to read."""

from collections.abc import Sequence
import pathlib

import chex
import numpy as np

from mt.base import files
from mt.base import journal
from mt.gemma import parameters
from mt.translate import translator as translator_lib


def samples(
  sources: Sequence[str],
  references: Sequence[str],
  before: Sequence[str],
  after: Sequence[str],
  number: int = 8,
) -> str:
  """`number` sentences, evenly spread over the split, to be read."""
  chex.assert_equal(
    [len(sources)] * 3, [len(references), len(before), len(after)]
  )
  chosen = np.unique(np.linspace(0, len(sources) - 1, number).astype(int))
  return '\n'.join(
    f'source     {sources[i]}\n'
    f'reference  {references[i]}\n'
    f'before     {before[i]}\n'
    f'after      {after[i]}\n'
    for i in chosen.tolist()
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
