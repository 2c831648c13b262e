"""Test sets by name, such as sacrebleu:wmt24, through sacreBLEU's own loader.

It fetches a set once, into ~/.sacrebleu or the folder that SACREBLEU names, and
checks the MD5 sum that it has of it.
"""

import difflib
import http.client
import pathlib
import shutil
import socket
import tarfile
import zipfile
import zlib

from mt.base import errors

PREFIX = 'sacrebleu:'
_TIMEOUT = 60  # Seconds of a silent server; sacreBLEU would wait for ever.


def find(name: str, pair: str) -> list[pathlib.Path]:
  """The files of a set's sources and of its first references, line by line.

  Args:
    name: as sacreBLEU has it: mtnt1.1/test, mtnt2019, wmt24.
    pair: of languages, such as en-fr.

  Raises:
    errors.UserError: no such set or pair; not fetched, or damaged.
  """
  import portalocker  # Here: whoever needs no set waits for none of these.
  from sacrebleu import dataset
  from sacrebleu import utils

  if name not in dataset.DATASETS:
    near = difflib.get_close_matches(name, dataset.DATASETS)
    raise errors.UserError(
      f'{PREFIX}{name}: sacreBLEU has no such set; '
      f'{"near it: " + ", ".join(near) + "; " if near else ""}'
      '`sacrebleu --list` has all of them.'
    )
  chosen = dataset.DATASETS[name]
  if pair not in chosen.langpairs:
    raise errors.UserError(
      f'{PREFIX}{name}: not of {pair} (data.pair); expected one of '
      f'{", ".join(sorted(chosen.langpairs))}.'
    )
  folder = pathlib.Path(utils.SACREBLEU_DIR, name)
  timeout = socket.getdefaulttimeout()
  socket.setdefaulttimeout(_TIMEOUT)
  try:
    source = chosen.get_source_file(pair)
    reference, *_ = chosen.get_reference_files(pair)
  except (
    *(OSError, SystemExit, EOFError, SyntaxError, ValueError, LookupError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
    *(http.client.HTTPException, portalocker.LockException),
  ) as e:
    if not isinstance(e, portalocker.LockException):
      # sacreBLEU checks the sum of what it fetches, not of what is there.
      shutil.rmtree(folder / 'raw', ignore_errors=True)
    raise errors.UserError(
      f'{PREFIX}{name}: sacreBLEU cannot fetch or read it '
      f'({" ".join(str(e).split())[:200]}); start again with a network, or '
      f'copy {folder} from a machine that has it.'
    ) from e
  finally:
    socket.setdefaulttimeout(timeout)
  return [pathlib.Path(source), pathlib.Path(reference)]
