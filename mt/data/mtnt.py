"""MTNT 1.1 out of its GitHub release, and archives of the same layout.

Everything stays in `cache.cache_dir()/mtnt`: the archive, while it comes its
`.part`, and a folder for each archive unpacked. A folder or archive of a final
name is always whole. One process at a time works there; others wait.
"""

from collections.abc import Callable
import contextlib
import csv
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import tarfile
import time
import zlib

import numpy as np
import requests

from mt.base import cache
from mt.base import errors
from mt.base import journal
from mt.data import bitext
from mt.data import lines

URL = (
  'https://github.com/pmichel31415/mtnt/releases/download/v1.1/MTNT.1.1.tar.gz'
)
MD5 = '8ce1831ac584979ba8cdcd9d4be43e1d'  # sacreBLEU has the same.

_TRIES = 5
_PAUSE = 1.0  # Seconds, times the tries so far.
_TIMEOUT = 30.0  # Seconds without a byte.
_SHORT = 'fewer than 3 columns'
_CHUNK = 1 << 16
_LIMIT = 2 << 30  # Bytes, fetched or unpacked; MTNT has 37 MB as an archive.


def fetch() -> pathlib.Path:
  """The folder with MTNT 1.1's {train,valid,test}; fetched at the first call.

  An archive put into the cache by hand is taken as it is.

  Raises:
    errors.UserError: no network, no such file, cut off again and again, wrong
      checksum, full disk.
  """
  archive = _root() / 'MTNT.1.1.tar.gz'
  folder = _root() / 'MTNT.1.1'

  def make():
    start = time.monotonic()
    fetched = not archive.exists()
    if fetched:
      _download(archive)
    elif (found := _digest(archive, 'md5')) != MD5:
      raise errors.UserError(
        f'{archive}: md5 {found} in {archive.stat().st_size:,} bytes, {MD5} '
        f'expected; delete it and start again, or {_by_hand(archive)}.'
      )
    _unpack(archive, folder)
    how = f'fetched in {time.monotonic() - start:.0f} s' if fetched else 'found'
    size = archive.stat().st_size / 1e6
    journal.say(f'data: MTNT 1.1, {size:.1f} MB {how}, unpacked: {folder}')

  _once(folder, make, _by_hand(archive))
  return split_root(folder)


def open_archive(archive: pathlib.Path) -> pathlib.Path:
  """The folder with {train,valid,test} of a .tar.gz, unpacked once.

  Raises:
    errors.UserError: unreadable, damaged or dangerous archive, full disk.
  """
  try:
    folder = _root() / _digest(archive, 'sha256')[:16]
  except OSError as e:
    raise errors.UserError(
      f'{archive}: cannot read the archive ({e.strerror}); set data.source to '
      'a .tar.gz in the layout of MTNT.'
    ) from None

  def make():
    _unpack(archive, folder)
    journal.say(f'data: {archive} unpacked: {folder}')

  _once(folder, make, f'unpack {archive} and name its folder in data.source')
  return split_root(folder)


def split_root(folder: pathlib.Path) -> pathlib.Path:
  """`folder`, or the MTNT/ inside it if only that has a train/."""
  inner = folder / 'MTNT'
  if os.path.isdir(inner / 'train') and not os.path.isdir(folder / 'train'):
    return inner
  return folder


def read_as_tfds(
  path: str | pathlib.Path, turned: bool = False
) -> bitext.Bitext:
  """Reads what TFDS's `mtnt` reads: csv.reader with its default quoting.

  A quote at the start of a column makes one text of all up to the next quote,
  tabs and line ends too; rows of less than three columns are skipped; texts may
  be empty (tensorflow_datasets/translate/mtnt/mtnt.py).

  Raises:
    errors.UserError: unreadable file, not UTF-8, a column of more than 131,072
      characters, or no row at all.
  """
  path = str(path)
  pairs, unusable = [], {}
  try:
    with open(path, encoding='utf-8') as f:
      reader = csv.reader(f, delimiter='\t')
      rows = 0
      for row in reader:
        rows += 1
        if len(row) >= 3:
          name, source, target = row[:3]
          if turned:
            source, target = target, source
          pairs.append(lines.Pair(name, source, target))
        else:
          count, first = unusable.get(_SHORT, (0, reader.line_num))
          unusable[_SHORT] = count + 1, first
  except OSError as e:
    raise bitext.unreadable(path, e) from None
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
    raise lines.no_pair(path)
  empty = np.zeros((0, 1), np.int64)
  return bitext.Bitext(
    paths=(path,),
    stats=(),
    parse=lines.Columns(3, 1, 2, 0),
    starts=empty,
    sizes=empty,
    numbers=empty[:, 0],
    num_lines=rows,
    unusable=unusable,
    notes=('rows as TFDS counts them',),
    digest=hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
    pairs=tuple(pairs),
  )


def _root() -> pathlib.Path:
  return cache.cache_dir() / 'mtnt'


def _by_hand(archive) -> str:
  return f'put {URL} at {archive} by hand'


def _digest(path, name) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(
      f, lambda: hashlib.new(name, usedforsecurity=False)
    ).hexdigest()


def _once(folder: pathlib.Path, make: Callable[[], None], otherwise: str):
  """Calls `make`, which makes `folder`, in one process and only if need be."""
  try:
    if folder.is_dir():
      return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not folder.is_dir():  # Another process may have made it meanwhile.
        make()
  except OSError as e:
    raise errors.UserError(
      f'{e.filename or folder}: cannot prepare the data ({e.strerror or e}); '
      f'make room for 500 MB, set XDG_CACHE_HOME elsewhere, or {otherwise}.'
    ) from None


def _download(archive: pathlib.Path) -> None:
  """Fetches the archive, going on from what is in its .part."""
  part = archive.with_name(archive.name + '.part')
  reason = ''
  for attempt in range(_TRIES):
    time.sleep(_PAUSE * attempt)
    have = part.stat().st_size if part.exists() else 0
    try:
      headers = {'Accept-Encoding': 'identity'}
      if have:
        headers['Range'] = f'bytes={have}-'
      answer = requests.get(URL, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.RequestException as e:
      reason = _reason(e)
      if not attempt:
        raise _failed(f'no answer ({reason})', archive) from None
      continue
    with answer:
      status = f'{answer.status_code} {answer.reason}'
      if answer.status_code == 429 or answer.status_code >= 500:
        reason = status
        continue
      if answer.status_code not in (200, 206, 416):
        raise _failed(f'the server answers {status}', archive)
      if answer.status_code == 200:
        have = 0  # The server sends all of it, range or not.
      if answer.status_code != 416:  # 416: there is no more than we have.
        try:
          _receive(answer, part, have)
        except requests.RequestException as e:
          reason = f'cut off: {_reason(e)}'
          continue
    found, size = _digest(part, 'md5'), part.stat().st_size
    if found == MD5:
      os.replace(part, archive)
      return
    part.unlink()
    reason = f'md5 {found} in {size:,} bytes, {MD5} expected'
    if not have:  # Else the fault may be in what an earlier try left.
      raise _failed(reason, archive)
  have = part.stat().st_size if part.exists() else 0
  raise _failed(
    f'{have:,} bytes are here after {_TRIES} tries ({reason})', archive
  )


def _failed(what, archive) -> errors.UserError:
  return errors.UserError(
    f'data.source=mtnt: {what}; try again later, or {_by_hand(archive)}.'
  )


def _receive(answer, part, have) -> None:
  rest = answer.headers.get('Content-Length', '')
  rest = int(rest) if rest.isdigit() else 0
  progress = journal.Progress('MTNT, kB', (have + rest) // 1000, have // 1000)
  with (
    contextlib.closing(progress),
    open(part, 'ab' if have else 'wb') as f,
  ):
    for chunk in answer.iter_content(_CHUNK):
      f.write(chunk)
      have += len(chunk)
      progress.update(have // 1000)
      if have > _LIMIT:
        return  # The checksum will tell.


def _reason(e: BaseException) -> str:
  """What the operating system said, under the layers of HTTP."""
  while e.__context__:
    e = e.__context__
  text = getattr(e, 'strerror', None) or str(e) or type(e).__name__
  return ' '.join(text.split())


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
  """Unpacks plain files and folders that stay inside `folder`; else refuses."""
  part = folder.with_name(folder.name + '.part')
  shutil.rmtree(part, ignore_errors=True)  # Of a process that was killed.
  try:
    with gzip.open(archive) as f, tarfile.open(fileobj=f, mode='r:') as tar:
      size = 0
      for member in tar:
        size += member.size
        path = pathlib.PurePosixPath(member.name)
        if (
          not (member.isreg() or member.isdir())
          or path.is_absolute()
          or '..' in path.parts
          or size > _LIMIT
        ):
          raise errors.UserError(
            f'{archive}: not unpacked into {folder}, for {member.name!r} is a '
            'link, a device, too large or outside of the folder; get the '
            'archive from a source that you trust.'
          )
        tar.extract(member, part, filter='data')
      while f.read(_CHUNK):  # To its end, where the checksum of gzip is.
        pass
    if not os.path.isdir(split_root(part) / 'train'):
      raise errors.UserError(
        f'{archive}: not unpacked into {folder}, for there is neither train/ '
        'nor MTNT/train/ in it; pack {train,valid,test}/SPLIT.PAIR.tsv.'
      )
    os.rename(part, folder)
  except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as e:
    raise errors.UserError(
      f'{archive}: not unpacked into {folder}, for it is not a whole .tar.gz '
      f'({" ".join(str(e).split())}); get it again.'
    ) from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
