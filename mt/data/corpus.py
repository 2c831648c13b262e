"""Which files a run learns from: `data.source` and its splits.

A source is one of
  sample        the bundled pairs
  mtnt          MTNT 1.1, fetched once, see mt/data/mtnt.py
  path/to/DIR   a folder in MTNT's layout: {train,valid,test}/SPLIT.PAIR.tsv
                (Michel and Neubig 2018, arXiv 1809.00388), or with MTNT/ inside
  path.tar.gz   an archive of such a folder
  path/to/file  a file of pairs, see mt/data/formats.py; `{split}` in the path
                becomes train, valid or test, {pair} the direction, and `{lang}`
                makes it two aligned files, one for each language
  sacrebleu:NAME  a test set, see mt/data/sacrebleu_sets.py

`python -m mt.data --config=…` shows what training will see.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import glob
import os
import pathlib
from typing import NamedTuple

import ml_collections

from mt.base import errors
from mt.data import bitext
from mt.data import directions
from mt.data import faults
from mt.data import lines
from mt.data import mtnt
from mt.data import sacrebleu_sets

SAMPLE = pathlib.Path(__file__).parent / 'sample'


def splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """What a run reads."""
  return ('train', 'valid', 'test') if config.eval.test else ('train', 'valid')


def sources(data: ml_collections.ConfigDict) -> list[str]:
  """The training sources of `config.data`."""
  return [s.strip() for s in data.source.split(',')]


def read_splits(
  data: ml_collections.ConfigDict, splits: Sequence[str]
) -> dict[str, list[bitext.Bitext]]:
  """The parallel texts of each split, in the order of the directions.

  There is one for each direction; of `train` for each of each source.

  Raises:
    errors.UserError: no such source, split or pair, or a file's own errors.
  """
  found = {}  # All of them, before the first one is read.
  for split in splits:
    source = split_source(data, split)
    if source is None:
      raise errors.UserError(
        f'data.source is {sources(data)[0]!r} and data.{split} is empty: the '
        'same text would be trained on and scored; name the text of the '
        f'{split} split in data.{split} (of mt.evaluate, in --data), or write '
        '{split} in the path.'
      )
    names = sources(data) if split == 'train' else [source]
    found[split] = [
      (_find(name, split, pair, data), pair)
      for name in names
      for pair in directions.each(data.pair)
    ]
  texts = {
    split: [_open(*files, data) for files in of_split]
    for split, of_split in found.items()
  }
  if 'train' in texts:
    held_out = _held_out(data, texts)
    texts['train'] = [_cleaned(x, data, held_out) for x in texts['train']]
  return texts


def _held_out(data, texts) -> dict[str, tuple[str, str]]:
  """Sources of validation and test, for faults.Rules.

  Of those too that are not read now, if they are there: a run that does not
  score the test split must not train on it either. Of a direction that is also
  learned the other way the targets too: a pair turned round is the same pair.
  """
  out, pairs = {}, directions.each(data.pair)
  for split in ('valid', 'test'):
    opened, source = [*texts.get(split, [])], split_source(data, split)
    if not opened and source is not None:
      for pair in pairs:
        with contextlib.suppress(errors.UserError):
          files = _find(source, split, pair, data)
          opened.append(_open(files, pair, data))
    for text in opened:
      both_ways = directions.turned(text.pair) in pairs
      for p in text.read():
        for side in p[1:] if both_ways else [p.source]:
          out[faults.fold(side)] = split, side
  return out


def _cleaned(text, data, held_out) -> bitext.Bitext:
  """A training text with data.apostrophe, without what data.filter names.

  Raises:
    errors.UserError: it has sources of the test split, and nobody allows that;
      or nothing is left of it.
  """
  if sign := data.apostrophe:
    digest = bitext.digest_of(text.digest, sign)
    text = dataclasses.replace(text, apostrophe=sign, digest=digest)
  names = {name.strip() for name in data.filter.split(',')} - {''}
  ratio = faults.median_ratio(text.sample.pairs)
  rules = faults.Rules(text.pair, ratio, held_out)
  if not data.allow_leaks and 'leaks' not in names:
    faults.refuse_leaks(text.where, text.sample.pairs, rules)
    if held_out and text.sample.number < len(text):
      names.add('leaks')  # Of which the sample has none, but the rest may.
  if not names:
    return dataclasses.replace(text, rules=rules)
  again = faults.duplicates(text) if 'duplicates' in names else None
  left_out = frozenset(names)
  rules = dataclasses.replace(rules, left_out=left_out, again=again)
  sources = sorted(held_out) if 'leaks' in names else []
  parts = [text.digest, sorted(names), text.pair, sources]
  if 'script' in names:
    parts += faults.scripts(text.pair)  # A rule of today's tables.
  digest = bitext.digest_of(*parts)
  text = dataclasses.replace(text, rules=rules, digest=digest)
  text.check(text.sample.unusable, text.sample.number)
  return text


def split_source(data: ml_collections.ConfigDict, split: str) -> str | None:
  """The source of a split (of train the first one), or None.

  None where it would be the text that is trained on, and nobody said so.
  """
  first = sources(data)[0]
  named = {'valid': data.valid, 'test': data.test}.get(split, first)
  if not named and _is_text(first) and '{split}' not in first:
    return None
  return named or first


def some_texts(text: bitext.Bitext, most: int = 4000) -> list[str]:
  """Both sides of pairs in as many lines, to train a tokenizer on.

  They are the first lines, or the next ones where these have no pair.

  Raises:
    errors.UserError: no lines have.
  """
  for at in range(0, len(text), most):
    if pairs := text.read(range(at, min(at + most, len(text)))):
      return [side for p in pairs for side in p[1:]]
  raise bitext.no_pair(text.where, text.sample.unusable, text.unit)


class _Files(NamedTuple):
  """The files of a direction of a split."""

  paths: Sequence[str | pathlib.Path]
  reversed_pair: bool = False  # They hold the pair the other way.
  shared: bool = False  # With all other directions.
  known: bool = False  # MTNT's columns, whatever the others have.


def _open(files, pair, data) -> bitext.Bitext:
  paths, other_way, shared, known = files
  first, *more = directions.each(data.pair)
  columns, quotes = ((), '') if known else (data.columns, data.quotes)
  turn = more and other_way  # What data.columns says is of the file.
  text = bitext.open_bitext(
    paths,
    pair,
    columns[::-1] if turn else columns,
    quotes='tfds' if data.tfds_quoting else quotes,
    reversed_pair=other_way,
    # TFDS passes over short rows, however many there are.
    max_bad_fraction=1 if data.tfds_quoting else data.max_bad_fraction,
  )
  by_language = isinstance(text.parse, lines.Keys) and not columns
  both_ways = first, directions.turned(first)
  if shared and not by_language and pair not in both_ways:
    raise errors.UserError(
      f'{text.where}: taken for {first}, the first of data.pair, but {pair} is '
      'asked of it, too; a name with {pair} or {lang} in it expected, or a '
      '.jsonl with the languages as keys.'
    )
  return text


def _find(source, split, pair, data) -> _Files:
  known = source in ('sample', 'mtnt')
  if not _is_text(source):
    source = f'{_open_folder(source)}/{{split}}/{{split}}.{{pair}}.tsv'
  path = source.replace('{split}', split)
  if path.startswith(sacrebleu_sets.PREFIX):
    name = path.removeprefix(sacrebleu_sets.PREFIX)
    return _Files(sacrebleu_sets.find(name, pair))
  if '{lang}' in path:
    path = path.replace('{pair}', pair)
    return _Files([path.replace('{lang}', x) for x in pair.split('-')])
  if '{pair}' in path:
    own = path.replace('{pair}', pair)
    other = path.replace('{pair}', directions.turned(pair))
    turn = not os.path.exists(own) and os.path.exists(other)
    there = glob.glob(glob.escape(path).replace('{pair}', '*'))
    if there and not turn and not os.path.exists(own):
      raise errors.UserError(
        f'{own}: there is no such file; data.pair is {pair!r}, expected that '
        f'of one that is there: {", ".join(sorted(there))}.'
      )
    return _Files([other if turn else own], turn, known=known)
  first = directions.each(data.pair)[0]
  turn = pair != first and pair == directions.turned(first)
  return _Files([path], turn, shared=True)


def _is_text(source) -> bool:
  """Whether it names files of pairs, not a folder or an archive of them."""
  fields = '{split}', '{lang}', '{pair}'
  if source.startswith(sacrebleu_sets.PREFIX) or any(
    x in source for x in fields
  ):
    return True
  return os.path.isfile(source) and not source.endswith(('.tar.gz', '.tgz'))


def _open_folder(source) -> pathlib.Path:
  if source == 'sample':
    return SAMPLE
  if source == 'mtnt':
    return mtnt.fetch()
  path = pathlib.Path(source)
  try:
    path.stat()
  except OSError as e:
    raise bitext.unreadable(source, e) from e
  return (mtnt.open_archive if os.path.isfile(path) else mtnt.split_root)(path)
