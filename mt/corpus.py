"""Parallel text in the file layout of MTNT: one pair a line.

`ROOT/{train,valid,test}/SPLIT.PAIR.tsv` with three tab-separated columns: id,
source, target. No header and no quoting: every line is one pair, and a quote is
just a character (Michel and Neubig 2018, arXiv 1809.00388; MTNT 1.1).
"""

from collections.abc import Sequence
import dataclasses
import pathlib

from mt import errors

SAMPLE = pathlib.Path(__file__).parent / 'sample'


@dataclasses.dataclass(frozen=True)
class Pair:
  """One line of a parallel corpus."""

  id: str
  source: str
  target: str


def split_path(source: str, split: str, pair: str) -> pathlib.Path:
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
    raise errors.UserError(
      f'{path}: cannot read the parallel text ({e.strerror}); set data.source '
      'to a folder with {train,valid,test}/SPLIT.PAIR.tsv and data.pair to its '
      'pair.'
    ) from None
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


def read_splits(
  source: str, pair: str, splits: Sequence[str]
) -> dict[str, list[Pair]]:
  """`read_pairs` for each split of a corpus."""
  return {s: read_pairs(split_path(source, s, pair)) for s in splits}
