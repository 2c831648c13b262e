"""MTNT's download against a real server, and archives of its layout."""

from concurrent import futures
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import random
import socket
import tarfile
import threading

import pytest

from configs import default
from mt.data import corpus
from mt.data import mtnt
from tests.fixtures.refusal import refusal

LINES = '1\tso "close" lol\tsi près\n2\t"hi\tsalut\n3\tyo\t"yo\n'


def _archive(top='MTNT/', extra=(), noise=0):
  """A .tar.gz in the layout of MTNT; `extra` are more members' headers."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as tar:
    files = {f'{s}/{s}.en-fr.tsv': LINES.encode() for s in ('train', 'valid')}
    files['monolingual/noise'] = random.Random(0).randbytes(noise)
    for name, content in files.items():
      member = tarfile.TarInfo(top + name)
      member.size, member.mode = len(content), 0o6777
      tar.addfile(member, io.BytesIO(content))
    for member in extra:
      tar.addfile(member)
  return out.getvalue()


ARCHIVE = _archive(noise=400_000)


class Server(http.server.ThreadingHTTPServer):
  """Serves `content`; `plan` names what goes wrong with each request."""

  def __init__(self, content, plan=()):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.content, self.plan, self.requests = content, [*plan], 0
    threading.Thread(target=self.serve_forever, args=[0.01]).start()


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    server.requests += 1
    what = server.plan.pop(0) if server.plan else ''
    if isinstance(what, int):
      self.send_error(what)
      return
    body = server.content
    self.send_response(200)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body[: len(body) // 2] if what == 'cut' else body)

  def log_message(self, *args):
    pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache; the archive's place in it."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('NO_PROXY', '*')
  monkeypatch.setattr(mtnt, '_PAUSE', 0.0)
  return tmp_path / 'cache' / 'mt' / 'mtnt' / 'MTNT.1.1.tar.gz'


@pytest.fixture
def serve(cache, monkeypatch):
  """(content, plan) -> Server, which mtnt.URL points to."""
  servers = []

  def start(content=ARCHIVE, plan=(), sha256=None):
    server = Server(content, plan)
    servers.append(server)
    port = server.server_address[1]
    url = f'http://127.0.0.1:{port}/MTNT.1.1.tar.gz'
    monkeypatch.setattr(mtnt, 'URL', url)
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(mtnt, 'SHA256', sha256)
    return server

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def _read(source, *splits, **knobs):
  """Split -> the pairs of its one text."""
  data = default.get_config().data
  data.update(source=str(source), **knobs)
  texts = corpus.read_splits(data, splits or ('train',))
  return {split: text.read() for split, (text,) in texts.items()}


def _left(cache):
  return sorted(p.name for p in cache.parent.iterdir())


WHOLE = ['MTNT.1.1', 'MTNT.1.1.tar.gz', 'lock']

# The download.


def test_fetched_once(cache, serve, capsys):
  server = serve()
  assert len(_read('mtnt')['train']) == 3
  folder = mtnt.fetch()
  assert folder == cache.parent / 'MTNT.1.1' / 'MTNT'
  path = folder / 'train' / 'train.en-fr.tsv'
  assert path.read_text('utf-8') == LINES
  assert not path.stat().st_mode & 0o6022  # No set-uid, for nobody to write.
  (line,) = capsys.readouterr().out.splitlines()
  assert str(cache) in line and str(folder.parent) in line
  assert server.requests == 1 and _left(cache) == WHOLE
  (cache.parent / 'lock').unlink()
  assert mtnt.fetch() == folder
  assert _left(cache) == WHOLE[:2]  # A cache may be read-only by now.


def test_a_server_that_is_busy_is_asked_again(cache, serve):
  server = serve(plan=[503, 429])
  mtnt.fetch()
  assert server.requests == 3


@pytest.mark.parametrize(
  ('options', 'tries', 'words'),
  [
    ({'plan': [404]}, 1, ['404']),
    ({'plan': [500] * 5}, 5, ['too many 500']),
    ({'plan': ['cut']}, 1, ['bytes read', 'more expected']),
    ({'sha256': '0' * 64}, 1, ['sha256 ', f'in {len(ARCHIVE):,} bytes, 0000']),
  ],
)
def test_a_fault_says_where_to_put_the_archive(
  cache, serve, options, tries, words
):
  server = serve(**options)
  refusal(mtnt.fetch, cache, f'put {mtnt.URL} there by hand', *words)
  assert server.requests == tries
  assert _left(cache) == ['lock']


def test_offline(cache, monkeypatch):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  monkeypatch.setattr(mtnt, 'URL', f'http://127.0.0.1:{port}/x')
  refusal(mtnt.fetch, cache, 'Connection refused', 'by hand')

  def fail(*args, **kwargs):
    raise socket.gaierror(-3, 'Temporary failure in name resolution')

  monkeypatch.setattr(socket, 'getaddrinfo', fail)
  refusal(mtnt.fetch, cache, 'name resolution', 'by hand')


def test_put_there_by_hand(cache, serve):
  server = serve()
  cache.parent.mkdir(parents=True)
  cache.write_bytes(ARCHIVE[:-1])
  refusal(mtnt.fetch, cache, 'sha256 ', mtnt.SHA256, 'delete it')
  assert cache.exists()  # It is not ours to delete.
  cache.write_bytes(ARCHIVE)
  assert (mtnt.fetch() / 'train').is_dir()
  assert server.requests == 0


def test_a_cache_that_cannot_be(cache, serve):
  cache.parent.parent.parent.write_text('a file')
  refusal(mtnt.fetch, cache.parent, 'Not a directory', 'XDG_CACHE_HOME')


def test_runs_at_the_same_time_fetch_once(cache, serve):
  server = serve()
  # Each opens the lock for itself, as processes do.
  with futures.ThreadPoolExecutor(3) as pool:
    folders = list(pool.map(lambda _: mtnt.fetch(), range(3)))
  assert len(set(folders)) == 1 and server.requests == 1
  assert _left(cache) == WHOLE


# Unpacking.


def _member(name, type=tarfile.REGTYPE, link=''):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = type, link
  return member


@pytest.mark.parametrize(
  'evil',
  [
    _member('../x'),
    _member('MTNT/../../x'),
    _member('MTNT/x', tarfile.SYMTYPE, '/etc'),
    _member('MTNT/x', tarfile.SYMTYPE, '../../../x'),
    _member('MTNT/x', tarfile.FIFOTYPE),
  ],
  ids=lambda m: f'{m.name} {m.linkname}',
)
def test_a_dangerous_archive_is_refused(cache, serve, evil):
  serve(_archive(extra=[evil]))
  refusal(mtnt.fetch, cache, evil.name, 'that you trust')
  assert _left(cache) == ['MTNT.1.1.tar.gz', 'lock']
  assert not list(cache.parents[2].rglob('x'))


@pytest.mark.parametrize('top', ['', './', 'MTNT/'])
def test_a_local_archive(cache, tmp_path, top, capsys):
  path = tmp_path / 'mine.tar.gz'
  path.write_bytes(_archive(top))
  splits = _read(path, 'train', 'valid')
  assert [len(v) for v in splits.values()] == [3, 3]
  assert capsys.readouterr().out.count('\n') == 1
  folders = [n for n in _left(cache) if n != 'lock']
  assert folders == [hashlib.sha256(path.read_bytes()).hexdigest()[:16]]
  # Unpacked once; another content has another folder.
  _read(path)
  assert capsys.readouterr().out == ''
  path.write_bytes(_archive(top, noise=1))
  _read(path)
  assert len(_left(cache)) == 3


def _damaged_archives():
  whole = _archive()
  yield 'cut', whole[: len(whole) // 2]
  yield 'one byte less', whole[:-1]
  yield 'a bit', whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
  yield 'text', b'1\ta\tb\n'
  yield 'empty', b''
  yield 'no tar', gzip.compress(b'x' * 2000, mtime=0)
  yield 'other files', _archive('other/place/')


@pytest.mark.parametrize('name, content', [*_damaged_archives()])
def test_a_damaged_local_archive(cache, tmp_path, name, content):
  path = tmp_path / 'mine.tar.gz'
  path.write_bytes(content)
  refusal(lambda: _read(path), path)
  assert _left(cache) == ['lock']


def test_a_folder_may_have_mtnt_inside(tmp_path):
  for inner in ('MTNT/MTNT', 'MTNT', ''):  # The outer one comes first.
    folder = tmp_path / inner / 'train'
    folder.mkdir(parents=True)
    (folder / 'train.en-fr.tsv').write_text(f'{inner or "top"}\tx\n')
    if inner != 'MTNT/MTNT':
      assert _read(tmp_path)['train'][0].source == (inner or 'top')


@pytest.mark.parametrize(
  'quoting, counts', [(False, [36058, 852, 1020]), (True, [35692, 811, 1020])]
)
def test_official_counts(monkeypatch, quoting, counts):
  """On a machine that has fetched MTNT; nothing is fetched for it."""
  home = pathlib.Path.home() / '.cache'
  if not os.path.exists(home / 'mt' / 'mtnt' / 'MTNT.1.1'):
    pytest.skip('MTNT 1.1 is not in ~/.cache/mt/mtnt; data.source=mtnt gets it')
  monkeypatch.setenv('XDG_CACHE_HOME', str(home))
  read = _read('mtnt', 'train', 'valid', 'test', tfds_quoting=quoting)
  assert [len(pairs) for pairs in read.values()] == counts
