"""MTNT 1.1 out of its GitHub release, and archives of the same layout.

Everything stays in `cache.cache_dir()/mtnt`: the archive, and a folder for each
archive unpacked. What has its final name there is whole. One process at a time
works there; others wait.
"""

import gzip
import hashlib
import os
import pathlib
import tarfile
import zlib

import urllib3

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.data import bitext

URL = (
  'https://github.com/pmichel31415/mtnt/releases/download/v1.1/MTNT.1.1.tar.gz'
)
# As in TFDS's checksums of `mtnt`.
SHA256 = '9c9d22fd71def6f70fc68f3a86bb87f6d7e58f63e6dc85e2acd2c9d828dca6b4'

_TRIES = 5
_PAUSE = 1.0  # Seconds after the first try; twice as many after each other.
_TIMEOUT = 30.0  # Seconds without a byte.
_CHUNK = 1 << 16


def fetch() -> pathlib.Path:
  """The folder with MTNT 1.1's {train,valid,test}; fetched at the first call.

  An archive put into the cache by hand is taken.

  Raises:
    errors.UserError: no network, no such file, wrong checksum, full disk.
  """
  folder = _root() / 'MTNT.1.1'
  archive = folder.with_name('MTNT.1.1.tar.gz')
  if not folder.is_dir():
    with files.locked(_root() / 'lock'):
      if archive.exists():
        _check(archive, archive)
      else:
        _download(archive)
      _unpack(archive, folder)
  return split_root(folder)


def open_archive(archive: pathlib.Path) -> pathlib.Path:
  """The folder with {train,valid,test} of a .tar.gz, unpacked once.

  Raises:
    errors.UserError: unreadable, damaged or dangerous archive, full disk.
  """
  try:
    folder = _root() / _sha256(archive)[:16]
  except OSError as e:
    raise bitext.unreadable(str(archive), e) from e
  if not folder.is_dir():
    with files.locked(_root() / 'lock'):
      _unpack(archive, folder)
  return split_root(folder)


def split_root(folder: pathlib.Path) -> pathlib.Path:
  """`folder`, or the MTNT/ inside it if only that has a train/."""
  inner = folder / 'MTNT'
  if os.path.isdir(inner / 'train') and not os.path.isdir(folder / 'train'):
    return inner
  return folder


def _root() -> pathlib.Path:
  return cache.cache_dir() / 'mtnt'


def _sha256(path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _check(path, archive) -> None:
  if (found := _sha256(path)) != SHA256:
    found += f' in {os.path.getsize(path):,} bytes'
    raise _failed(f'sha256 {found}, {SHA256} expected', archive)


def _failed(what, archive) -> errors.UserError:
  return errors.UserError(
    f'{archive}: {" ".join(str(what).split())}; delete it, if it is there, '
    f'and try again later, or put {URL} there by hand.'
  )


def _download(archive: pathlib.Path) -> None:
  """Fetches the archive; a server that is busy or away is asked again."""
  import requests  # Here: most runs fetch nothing.
  from requests import adapters

  retry = urllib3.Retry(
    total=_TRIES - 1,
    backoff_factor=_PAUSE,
    status_forcelist=(429, 500, 502, 503, 504),
  )
  with files.new_file(archive) as f, requests.Session() as session:
    for scheme in ('https://', 'http://'):
      session.mount(scheme, adapters.HTTPAdapter(max_retries=retry))
    try:
      answer = session.get(URL, stream=True, timeout=_TIMEOUT)
      answer.raise_for_status()
      total = int(answer.headers.get('Content-Length', 0))
      progress = journal.Progress('MTNT, kB', total // 1000)
      for chunk in answer.iter_content(_CHUNK):
        f.write(chunk)
        progress.update(f.tell() // 1000)
      progress.close()
    except requests.RequestException as e:
      raise _failed(e, archive) from e
    f.flush()
    _check(f.name, archive)


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
  """Unpacks plain files and folders that stay inside `folder`; else refuses."""
  if folder.is_dir():  # Another process has made it meanwhile.
    return
  with files.new_folder(folder) as part:
    try:
      with gzip.open(archive) as f, tarfile.open(fileobj=f, mode='r:') as tar:
        tar.extractall(part, filter='data')
        while f.read(_CHUNK):  # To its end, where the checksum of gzip is.
          pass
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as e:
      raise errors.UserError(
        f'{archive}: not unpacked ({" ".join(str(e).split())}); get a whole '
        '.tar.gz from a source that you trust.'
      ) from e
    if not os.path.isdir(split_root(part) / 'train'):
      raise errors.UserError(
        f'{archive}: neither train/ nor MTNT/train/ in it; pack '
        '{train,valid,test}/SPLIT.PAIR.tsv.'
      )
  journal.say(f'data: {archive} unpacked: {folder}')
