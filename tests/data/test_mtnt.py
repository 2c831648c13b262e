"""MTNT's download against a real server, archives, and TFDS's way to read."""

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
from mt.base import errors
from mt.data import corpus
from mt.data import mtnt

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
      tar.addfile(member, io.BytesIO(bytes(member.size)))
  return out.getvalue()


ARCHIVE = _archive(noise=400_000)


class Server(http.server.ThreadingHTTPServer):
  """Serves `content`; `plan` names what goes wrong with each request."""

  def __init__(self, content, plan=()):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.content, self.plan, self.requests, self.sent = content, [*plan], [], []
    threading.Thread(target=self.serve_forever, args=[0.01]).start()


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    assert self.headers['Accept-Encoding'] == 'identity'
    server.requests.append(self.headers['Range'])
    what = server.plan.pop(0) if server.plan else ''
    if isinstance(what, int):
      self.send_error(what)
      return
    body, first = server.content, 0
    if self.headers['Range'] and what != 'no range':
      first = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
      if first >= len(body):
        self.send_error(416)
        return
      self.send_response(206)
      total = len(body)
      self.send_header('Content-Range', f'bytes {first}-{total - 1}/{total}')
    else:
      self.send_response(200)
    body = body[first:]
    length = len(body)
    if what == 'cut':
      body = body[: length // 2]
    elif what == 'longer':
      length += 1000
    elif what == 'shorter':
      length -= 1000
      body = body[:length]
    self.send_header('Content-Length', str(length))
    self.end_headers()
    server.sent.append(len(body))  # Before the client can know of it.
    self.wfile.write(body)

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

  def start(content=ARCHIVE, plan=(), md5=None):
    server = Server(content, plan)
    servers.append(server)
    port = server.server_address[1]
    url = f'http://127.0.0.1:{port}/MTNT.1.1.tar.gz'
    monkeypatch.setattr(mtnt, 'URL', url)
    md5 = md5 or hashlib.md5(content).hexdigest()
    monkeypatch.setattr(mtnt, 'MD5', md5)
    return server

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def _error(call, *args):
  with pytest.raises(errors.UserError) as caught:
    call(*args)
  message = str(caught.value)
  assert message.endswith('.') and len(message.splitlines()) == 1
  return message


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
  folder = mtnt.fetch()
  assert folder == cache.parent / 'MTNT.1.1' / 'MTNT'
  path = folder / 'train' / 'train.en-fr.tsv'
  assert path.read_text('utf-8') == LINES
  assert not path.stat().st_mode & 0o6022  # No set-uid, for nobody to write.
  (line,) = capsys.readouterr().out.splitlines()
  assert 'MTNT 1.1' in line and 'fetched' in line and str(folder.parent) in line
  assert _left(cache) == WHOLE
  (cache.parent / 'lock').unlink()
  assert mtnt.fetch() == folder
  assert server.requests == [None]
  assert _left(cache) == WHOLE[:2]  # A cache may be read-only by now.
  assert capsys.readouterr().out == ''


def test_cut_off_and_resumed(cache, serve):
  server = serve(plan=['cut', 'cut'])
  mtnt.fetch()
  first, *rest = server.requests
  assert first is None and len(rest) == 2
  assert all(r.startswith('bytes=') and r != 'bytes=0-' for r in rest)
  twice = sum(server.sent) - len(ARCHIVE)
  assert 0 <= twice <= 2 * mtnt._CHUNK  # Of each cut, at most one chunk.
  assert cache.read_bytes() == ARCHIVE


def test_the_next_run_goes_on(cache, serve):
  server = serve(plan=['cut'] * mtnt._TRIES)
  message = _error(mtnt.fetch)
  assert len(server.requests) == mtnt._TRIES
  assert 'try again later' in message and str(cache) in message
  part = cache.with_name('MTNT.1.1.tar.gz.part')
  have = part.stat().st_size
  assert 0 < have < len(ARCHIVE) and f'{have:,} bytes' in message
  server = serve()
  mtnt.fetch()
  assert server.requests == [f'bytes={have}-']
  assert _left(cache) == WHOLE


def test_a_server_without_ranges(cache, serve):
  server = serve(plan=['cut', 'no range'])
  mtnt.fetch()
  assert len(server.requests) == 2 and server.sent[-1] == len(ARCHIVE)
  assert cache.read_bytes() == ARCHIVE


def test_a_server_that_is_busy(cache, serve):
  server = serve(plan=[503, 429])
  mtnt.fetch()
  assert len(server.requests) == 3


@pytest.mark.parametrize('size', [1000, len(ARCHIVE), len(ARCHIVE) + 1])
def test_a_damaged_part_is_discarded(cache, serve, size):
  server = serve()
  cache.parent.mkdir(parents=True)
  cache.with_name('MTNT.1.1.tar.gz.part').write_bytes(bytes(size))
  mtnt.fetch()
  assert server.requests == [f'bytes={size}-', None]
  assert cache.read_bytes() == ARCHIVE


def test_a_whole_part_is_taken(cache, serve):
  server = serve()
  cache.parent.mkdir(parents=True)
  cache.with_name('MTNT.1.1.tar.gz.part').write_bytes(ARCHIVE)
  mtnt.fetch()
  assert server.sent == [] and _left(cache) == WHOLE


@pytest.mark.parametrize(
  'options, tries, words',
  [
    ({'plan': [404]}, 1, ('404 Not Found',)),
    ({'plan': [403]}, 1, ('403 Forbidden',)),
    ({'md5': '0' * 32}, 1, ('md5', '0' * 32, f'{len(ARCHIVE):,} bytes')),
    ({'plan': ['shorter']}, 1, ('md5', f'{len(ARCHIVE) - 1000:,} bytes')),
    ({'plan': ['longer', 500, 500, 500, 500]}, 5, ('5 tries', '500')),
    ({'plan': [500] * 5}, 5, ('0 bytes', '500 Internal Server Error')),
  ],
)
def test_a_fault_says_where_to_put_the_archive(
  cache, serve, options, tries, words
):
  server = serve(**options)
  message = _error(mtnt.fetch)
  assert len(server.requests) == tries
  assert f'put {mtnt.URL} at {cache} by hand' in message
  for word in words:
    assert word in message
  assert not cache.exists() and not (cache.parent / 'MTNT.1.1').exists()


def test_what_never_ends(cache, serve, monkeypatch):
  monkeypatch.setattr(mtnt, '_LIMIT', 100_000)
  server = serve()
  message = _error(mtnt.fetch)
  assert 'md5' in message and f'{len(ARCHIVE):,}' not in message
  assert len(server.requests) == 1


def test_what_a_killed_run_left(cache, serve):
  serve()
  left = cache.parent / 'MTNT.1.1.part' / 'MTNT' / 'train'
  left.mkdir(parents=True)
  (left / 'train.xx-yy.tsv').touch()
  assert [p.name for p in (mtnt.fetch() / 'train').iterdir()] == [
    'train.en-fr.tsv'
  ]


def test_too_long_a_length_is_whole_at_the_next_try(cache, serve):
  server = serve(plan=['longer'])  # 416 tells that there is no more.
  mtnt.fetch()
  assert len(server.requests) == 2 and cache.read_bytes() == ARCHIVE


def test_offline(cache, monkeypatch):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  monkeypatch.setattr(mtnt, 'URL', f'http://127.0.0.1:{port}/x')
  message = _error(mtnt.fetch)
  assert 'no answer (Connection refused)' in message and str(cache) in message


def test_no_name_server(cache, monkeypatch):
  def fail(*args, **kwargs):
    raise socket.gaierror(-3, 'Temporary failure in name resolution')

  monkeypatch.setattr(socket, 'getaddrinfo', fail)
  message = _error(mtnt.fetch)
  assert 'no answer (Temporary failure in name resolution)' in message
  assert f'put {mtnt.URL} at {cache} by hand' in message


def test_put_there_by_hand(cache, serve):
  server = serve()
  cache.parent.mkdir(parents=True)
  cache.write_bytes(ARCHIVE[:-1])
  message = _error(mtnt.fetch)
  assert message.startswith(f'{cache}: md5 ') and mtnt.MD5 in message
  assert cache.exists()  # It is not ours to delete.
  cache.write_bytes(ARCHIVE)
  assert (mtnt.fetch() / 'train').is_dir()
  assert server.requests == []


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk(cache, serve):
  serve()
  cache.parent.mkdir(parents=True)
  cache.with_name('MTNT.1.1.tar.gz.part').symlink_to('/dev/full')
  message = _error(mtnt.fetch)
  assert 'No space left' in message and str(cache) in message
  assert 'XDG_CACHE_HOME' in message


def test_a_cache_that_cannot_be(cache, serve):
  cache.parent.parent.parent.write_text('a file')
  assert str(cache) in _error(mtnt.fetch)


def test_runs_at_the_same_time_fetch_once(cache, serve):
  server = serve()
  # Each opens the lock for itself, as processes do.
  with futures.ThreadPoolExecutor(3) as pool:
    folders = list(pool.map(lambda _: mtnt.fetch(), range(3)))
  assert len(set(folders)) == 1 and server.requests == [None]
  assert _left(cache) == WHOLE


# Unpacking.


def _member(name, type=tarfile.REGTYPE, link='', size=0):
  member = tarfile.TarInfo(name)
  member.type, member.linkname, member.size = type, link, size
  return member


@pytest.mark.parametrize(
  'evil',
  [
    _member('../x'),
    _member('MTNT/../../x'),
    _member('/tmp/mt-evil-x'),
    _member('MTNT/x', tarfile.SYMTYPE, '/etc'),
    _member('MTNT/x', tarfile.SYMTYPE, 'train'),
    _member('MTNT/x', tarfile.LNKTYPE, 'MTNT/train/train.en-fr.tsv'),
    _member('MTNT/x', tarfile.FIFOTYPE),
    _member('MTNT/x', size=200_000),
  ],
  ids=lambda m: f'{m.name} {m.linkname}',
)
def test_a_dangerous_archive_is_refused(cache, serve, monkeypatch, evil):
  monkeypatch.setattr(mtnt, '_LIMIT', 100_000)
  serve(_archive(extra=[evil]))
  message = _error(mtnt.fetch)
  assert str(cache) in message and repr(evil.name) in message
  assert 'that you trust' in message
  assert _left(cache) == ['MTNT.1.1.tar.gz', 'lock']
  assert not pathlib.Path('/tmp/mt-evil-x').exists()
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
  assert str(path) in _error(_read, path)
  assert _left(cache) == ['lock']


# Folders.


@pytest.mark.parametrize('inner', ['', 'MTNT'])
def test_a_folder(tmp_path, inner):
  folder = tmp_path / inner / 'train'
  folder.mkdir(parents=True)
  (folder / 'train.en-fr.tsv').write_text(LINES, encoding='utf-8')
  splits = _read(tmp_path)
  assert [p.source for p in splits['train']] == ['so "close" lol', '"hi', 'yo']
  (tmp_path / 'MTNT' / 'MTNT' / 'train').mkdir(parents=True)  # Not looked at.
  if inner == '':
    (tmp_path / 'MTNT' / 'train').mkdir()  # The outer one comes first.
  assert _read(tmp_path) == splits


def test_the_source_mtnt(cache, serve):
  server = serve()
  assert len(_read('mtnt')['train']) == 3
  assert server.requests == [None]


def test_a_run_asks_for_the_data_first(cache, debug_config, monkeypatch):
  from mt.train import run as run_lib

  # Nobody listens there, and weights are never opened.
  monkeypatch.setattr(mtnt, 'URL', 'http://127.0.0.1:1/x')
  monkeypatch.setattr(run_lib, 'open_weights', None)
  debug_config.data.source = 'mtnt'
  message = _error(run_lib.run, debug_config, cache.parents[2] / 'w')
  assert str(cache) in message
  folder = cache.parents[2] / 'train'
  folder.mkdir()
  (folder / 'train.en-fr.tsv').write_text('no target\n')
  for quoting, words in ((True, 'no pair'), (False, 'first line: 1,')):
    debug_config.data.source = str(folder.parent)
    debug_config.data.tfds_quoting = quoting
    workdir = folder.parent / f'w{quoting}'
    assert words in _error(run_lib.run, debug_config, workdir)


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
