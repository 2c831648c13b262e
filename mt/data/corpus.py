"""Which files a run learns from: `data.source` and its splits.

A source is one of
  sample        the bundled pairs
  mtnt          MTNT 1.1, fetched once, see mt/data/mtnt.py
  path/to/DIR   a folder in MTNT's layout: {train,valid,test}/SPLIT.PAIR.tsv
                (Michel and Neubig 2018, arXiv 1809.00388), or with MTNT/ inside
  path.tar.gz   an archive of such a folder
  path/to/file  a file of pairs, see mt/data/bitext.py; `{split}` in the path
                becomes train, valid or test, and `{lang}` makes it two aligned
                files, one for each language of data.pair

`python -m mt.data --config=…` shows what training will see.
"""

from collections.abc import Sequence
import os
import pathlib

import ml_collections

from mt.base import errors
from mt.data import bitext
from mt.data import mtnt

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
  """The parallel texts of each split: of `train` one for each source.

  Args:
    data: `config.data`.
    splits: of train, valid, test.

  Raises:
    errors.UserError: no such source, split or pair, or a file's own errors.
  """
  first = sources(data)[0]
  named = {'valid': data.valid or first, 'test': data.test or first}
  return {
    split: [
      _open_split(source, split, data)
      for source in (sources(data) if split == 'train' else [named[split]])
    ]
    for split in splits
  }


def some_texts(text: bitext.Bitext, most: int = 4000) -> list[str]:
  """Both sides of the first pairs, to train a tokenizer on."""
  pairs = text.read(range(min(len(text), most)))
  return [side for p in pairs for side in (p.source, p.target)]


def _open_split(source, split, data) -> bitext.Bitext:
  paths, turned = _find(source, split, data)
  if data.tfds_quoting:
    return mtnt.read_as_tfds(paths[0], turned)
  return bitext.open_bitext(
    paths,
    data.pair,
    data.columns,
    turned=turned,
    max_bad_fraction=data.max_bad_fraction,
  )


def _find(source, split, data) -> tuple[list[pathlib.Path], bool]:
  """The files of a split, and whether they hold the pair the other way."""
  if '{split}' in source or '{lang}' in source or _is_text_file(source):
    given = data.valid if split == 'valid' else data.test
    if split != 'train' and '{split}' not in source and not given:
      raise errors.UserError(
        f'data.source is {source!r} and data.{split} is empty: the same text '
        f'would be trained on and scored; name the text of the {split} split '
        f'in data.{split}, or write {{split}} in the path.'
      )
    path = source.replace('{split}', split)
    languages = data.pair.split('-') if '{lang}' in path else ['']
    return [pathlib.Path(path.replace('{lang}', x)) for x in languages], False
  folder = _open_folder(source) / split
  path = folder / f'{split}.{data.pair}.tsv'
  other = '-'.join(reversed(data.pair.split('-')))
  # glob raises for a name that is too long; isdir says False.
  found = folder.glob(f'{split}.*.tsv') if os.path.isdir(folder) else ()
  pairs = [p.name.split('.')[-2] for p in found]
  if data.pair in pairs or not pairs:
    return [path], False
  if other in pairs:
    return [folder / f'{split}.{other}.tsv'], True
  raise errors.UserError(
    f'{path}: there is no such file; data.pair is {data.pair!r}, there '
    f'{"is" if len(pairs) == 1 else "are"} {", ".join(sorted(pairs))}.'
  )


def _is_text_file(source) -> bool:
  return os.path.isfile(source) and not source.endswith(('.tar.gz', '.tgz'))


def _open_folder(source) -> pathlib.Path:
  if source == 'sample':
    return SAMPLE
  if source == 'mtnt':
    return mtnt.fetch()
  path = pathlib.Path(source)
  if os.path.isfile(path):
    return mtnt.open_archive(path)
  return mtnt.split_root(path)
