"""MTNT as TFDS counts it, to compare with results from there."""

import csv
import hashlib
import json
import pathlib

from mt.base import errors
from mt.data import bitext
from mt.data import formats
from mt.data import lines


def read_as_tfds(
  path: str | pathlib.Path, reversed_pair: bool = False, pair: str = 'en-fr'
) -> bitext.Bitext:
  """Reads what TFDS's `mtnt` reads: csv.reader with its default quoting.

  A quote at the start of a column makes one text of all up to the next quote,
  tabs and line ends too; rows of less than three columns are skipped; texts may
  be empty (tensorflow_datasets/translate/mtnt/mtnt.py).

  Raises:
    errors.UserError: unreadable, not UTF-8, no row at all, or a column of more
      than 131,072 characters.
  """
  path = str(path)
  pairs, short = [], []
  try:
    with open(path, encoding='utf-8') as f:
      reader = csv.reader(f, delimiter='\t')
      for row in reader:
        if len(row) < 3:
          short.append(reader.line_num)
          continue
        name, source, target = row[:3]
        if reversed_pair:
          source, target = target, source
        pairs.append(lines.Pair(name, source, target))
  except OSError as e:
    raise bitext.unreadable(path, e) from e
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f'{path}: not UTF-8 ({e.reason}); convert the file to UTF-8.'
    ) from e
  except csv.Error as e:
    raise errors.UserError(
      f'{path}:{reader.line_num}: csv.reader cannot read this ({e}), nor could '
      'TFDS; mend the line, or take data.tfds_quoting=False.'
    ) from e
  if not pairs:
    raise bitext.no_pair(path)
  note = 'rows as TFDS counts them'
  if short:
    note += (
      f', {len(short):,} of fewer than 3 columns (the first in line {short[0]})'
    )
  return bitext.Bitext(
    files=(formats.Plain(path, path, 'text'),),
    stats=(),
    parse=lines.Columns(3, 1, 2, 0),
    starts=(),
    header=0,
    max_bad_fraction=1.0,
    notes=(note,),
    digest=hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
    pair=pair,
    pairs=tuple(pairs),
  )
