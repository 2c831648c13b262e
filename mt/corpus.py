"""Parallel text in the file layout of MTNT: one pair a line.

`ROOT/{train,valid,test}/SPLIT.PAIR.tsv` with three tab-separated columns: id,
source, target. No header and no quoting: every line is one pair, and a quote is
just a character (Michel and Neubig 2018, arXiv 1809.00388; MTNT 1.1).

`data.source` is one of
  sample        the bundled pairs
  mtnt          MTNT 1.1, fetched once, see mt/mtnt.py
  path/to.gz    a local archive with ROOT or with MTNT/ at its top
  path/to/DIR   ROOT, or the folder that holds MTNT/
"""

from collections.abc import Sequence
import csv
import dataclasses
import os
import pathlib

from mt import errors
from mt import mtnt

SAMPLE = pathlib.Path(__file__).parent / 'sample'


@dataclasses.dataclass(frozen=True)
class Pair:
  """One line of a parallel corpus."""

  id: str
  source: str
  target: str


def split_path(
  source: str | pathlib.Path, split: str, pair: str
) -> pathlib.Path:
  """The file of one split; `sample` is the bundled one, else a folder."""
  folder = SAMPLE if source == 'sample' else pathlib.Path(source)
  return folder / split / f'{split}.{pair}.tsv'


def read_pairs(path: str | pathlib.Path) -> list[Pair]:
  """Reads every line of a three-column file.

  Lines end with LF or CRLF and with nothing else: U+2028 and form feeds are
  text. White space around a field is kept.

  Raises:
    errors.UserError: unreadable file, not UTF-8, a line with other than three
      columns, an empty source or target, or no line at all.
  """
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
  except OSError as e:
    raise _unreadable(path, e) from None
  pairs = []
  for number, line in enumerate(data.split(b'\n'), 1):
    line = line.removesuffix(b'\r')
    if not line:
      if number <= data.count(b'\n'):
        raise errors.UserError(
          f'{path}:{number}: empty line; id, source and target with tabs '
          'between them expected: remove or complete it.'
        )
      continue
    try:
      columns = line.decode('utf-8').split('\t')
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f'{path}:{number}: not UTF-8 ({e.reason} at byte {e.start} of the '
        'line); convert the file to UTF-8.'
      ) from None
    if len(columns) != 3:
      raise errors.UserError(
        f'{path}:{number}: {len(columns)} columns found, 3 expected (id, '
        'source, target, with tabs between them): mend the line.'
      )
    if not columns[1].strip() or not columns[2].strip():
      raise errors.UserError(
        f'{path}:{number}: empty source or target; remove or complete the line.'
      )
    pairs.append(Pair(*columns))
  if not pairs:
    raise errors.UserError(f'{path}: no pairs in it; a line for each expected.')
  return pairs


def read_pairs_as_tfds(path: str | pathlib.Path) -> list[Pair]:
  """Reads what TFDS's `mtnt` reads: csv.reader with its default quoting.

  A quote at the start of a column makes one text of all up to the next quote,
  tabs and line ends too; rows of less than three columns are skipped; texts may
  be empty (tensorflow_datasets/translate/mtnt/mtnt.py).

  Raises:
    errors.UserError: unreadable file, not UTF-8, a column of more than 131,072
      characters, or no row at all.
  """
  path = pathlib.Path(path)
  try:
    with open(path, encoding='utf-8') as f:
      reader = csv.reader(f, delimiter='\t')
      pairs = [Pair(*row[:3]) for row in reader if len(row) >= 3]
  except OSError as e:
    raise _unreadable(path, e) from None
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f'{path}: not UTF-8 ({e.reason}); convert the file to UTF-8.'
    ) from None
  except csv.Error as e:
    raise errors.UserError(
      f'{path}:{reader.line_num}: csv.reader cannot read this ({e}), nor could '
      'TFDS; mend the line, or take data.tfds_quoting=False.'
    ) from None
  if not pairs:
    raise errors.UserError(f'{path}: no pairs in it; a line for each expected.')
  return pairs


def _unreadable(path, e) -> errors.UserError:
  return errors.UserError(
    f'{path}: cannot read the parallel text ({e.strerror}); set data.source to '
    'a folder with {train,valid,test}/SPLIT.PAIR.tsv and data.pair to its pair.'
  )


def open_source(source: str) -> str | pathlib.Path:
  """What split_path takes; `mtnt` is fetched, an archive is unpacked.

  Raises:
    errors.UserError: see mt/mtnt.py.
  """
  if source == 'sample':
    return source
  if source == 'mtnt':
    return mtnt.fetch()
  path = pathlib.Path(source)
  if os.path.isfile(path):
    return mtnt.open_archive(path)
  return mtnt.split_root(path)


def read_splits(
  source: str, pair: str, splits: Sequence[str], tfds_quoting: bool = False
) -> dict[str, list[Pair]]:
  """The pairs of each split of a corpus.

  Args:
    source: see the module's docstring.
    pair: of languages, such as en-fr.
    splits: names of splits.
    tfds_quoting: read_pairs_as_tfds instead of read_pairs.

  Raises:
    errors.UserError: no such source, split or pair, or a file's own errors.
  """
  folder = open_source(source)
  read = read_pairs_as_tfds if tfds_quoting else read_pairs
  out = {}
  for split in splits:
    path = split_path(folder, split, pair)
    others = [p.name.split('.')[-2] for p in path.parent.glob(f'{split}.*.tsv')]
    if others and pair not in others:
      raise errors.UserError(
        f'{path}: there is no such file; data.pair is {pair!r}, there '
        f'{"is" if len(others) == 1 else "are"} {", ".join(sorted(others))}.'
      )
    out[split] = read(path)
  return out
