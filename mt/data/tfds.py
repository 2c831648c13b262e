"""MTNT as TFDS counts it, to compare with results from there."""

import csv
import hashlib
import json
import pathlib

import numpy as np

from mt.base import errors
from mt.data import bitext
from mt.data import lines

_SHORT = 'fewer than 3 columns'


def read_as_tfds(
  path: str | pathlib.Path, reversed_pair: bool = False
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
  pairs, unusable, num_rows = [], {}, 0
  try:
    with open(path, encoding='utf-8') as f:
      reader = csv.reader(f, delimiter='\t')
      for row in reader:
        num_rows += 1
        if len(row) < 3:
          count, first = unusable.get(_SHORT, (0, reader.line_num))
          unusable[_SHORT] = count + 1, first
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
    raise lines.no_pair(path)
  none = np.zeros((0, 1), np.int64)
  return bitext.Bitext(
    paths=(path,),
    stats=(),
    parse=lines.Columns(3, 1, 2, 0),
    starts=none,
    sizes=none,
    numbers=none[:, 0],
    num_lines=num_rows,
    unusable=unusable,
    notes=('rows as TFDS counts them',),
    digest=hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
    pairs=tuple(pairs),
  )
