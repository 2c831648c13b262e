"""Kaggle's own client against a server on 127.0.0.1."""

import errno
import os
import pathlib
import random
import shutil
import socket

import pytest

from configs import default
from mt.base import errors
from mt.base import run_folder
from mt.gemma import sizes
from mt.train import run as run_lib
from mt.weights import kaggle
from mt.weights import pretrained
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal

HANDLE = 'google/gemma/flax/2b-it'
CFG = flax_fixture.FAMILIES['gemma1_multi_query']


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A folder as Kaggle has it: tokenizer.model beside the checkpoint."""
  folder = tmp_path_factory.mktemp('published')
  params = flax_fixture.tiny_params(CFG)
  flax_fixture.save(folder / '2b-it', CFG, params, dtype='bfloat16')
  (folder / 'tokenizer.model').write_bytes(gguf_fixture.train_proto())
  return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
  """Kaggle, its client told of it, and nobody's credentials but its own."""
  server = flax_fixture.Kaggle(published)
  for name in [k for k in os.environ if k.startswith('KAGGLE')]:
    monkeypatch.delenv(name)
  for name, value in server.environment(tmp_path / 'cache').items():
    monkeypatch.setenv(name, value)
  from kagglehub import config

  folder = str(tmp_path / 'credentials')
  monkeypatch.setattr(config, 'DEFAULT_KAGGLE_CREDENTIALS_FOLDER', folder)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  yield server
  server.close()


def _same(a, b):
  return {p: p.read_bytes() for p in sorted(a.rglob('*')) if p.is_file()} == {
    a / p.relative_to(b): p.read_bytes()
    for p in sorted(b.rglob('*'))
    if p.is_file()
  }


def _names(server):
  return [name for name, _ in server.requests]


def test_files_are_fetched_once(server, published, tmp_path, capfd):
  folder = kaggle.download(HANDLE)
  assert folder == tmp_path / 'cache' / 'models' / HANDLE / '2'
  assert _same(folder, published)
  assert (
    f'Downloading {len(server.files)} files: 100%' in capfd.readouterr().err
  )
  asked = [p for name, p in server.requests if name.startswith('Download')]
  assert sorted(asked) == sorted(server.files)
  server.requests.clear()
  assert kaggle.download(HANDLE) == folder
  assert _names(server) == ['GetModelInstance']
  server.requests.clear()
  assert kaggle.download(f'{HANDLE}/2') == folder
  assert server.requests == []


def test_many_files_come_as_an_archive(server, published, tmp_path):
  for i in range(30):
    server.files[f'2b-it/d/{i}'] = b'x'
  folder = kaggle.download(HANDLE)
  assert (folder / '2b-it' / 'd' / '29').read_bytes() == b'x'
  for name in list(server.files):
    assert (folder / name).read_bytes() == server.files[name]
  assert ('DownloadModelInstanceVersion', None) in server.requests
  assert len(server.requests) == 3


def test_force_fetches_again(server):
  folder = kaggle.download(HANDLE)
  (folder / 'tokenizer.model').write_bytes(b'spoilt')
  kaggle.download(HANDLE)
  assert (folder / 'tokenizer.model').read_bytes() == b'spoilt'
  kaggle.download(HANDLE, force=True)
  assert (folder / 'tokenizer.model').read_bytes() != b'spoilt'


def test_the_knob_forces(server, monkeypatch, tmp_path):
  monkeypatch.setitem(sizes.SIZES, 'tiny', CFG)
  config = default.get_config()
  config.weights.source = f'kaggle:{HANDLE}'

  def start(force):
    server.requests.clear()
    config.weights.force_download = force
    run_lib.open_weights(config, tmp_path, [])
    return 'DownloadModelInstanceVersion' in _names(server)

  assert start(False)
  assert not start(False)
  assert start(True)


def test_a_run_goes_on_without_forcing(tmp_path):
  config = default.get_config()
  config.weights.force_download = True
  run_folder.claim(tmp_path, config)
  (tmp_path / 'checkpoints' / 'step_1').mkdir(parents=True)
  config.weights.force_download = False
  run_folder.claim(tmp_path, config)


def test_a_source_is_read(server, monkeypatch):
  monkeypatch.setitem(sizes.SIZES, 'tiny', CFG)
  source = pretrained.open_source(
    f'kaggle:{HANDLE}', 'debug', '', seed=0, texts=()
  )
  assert source.config == CFG
  assert source.tokenizer.proto == gguf_fixture.train_proto()
  want = flax_fixture.tiny_params(CFG)
  assert (source.read()['embedding'] == want['embedding']).all()


@pytest.mark.parametrize('framework', ('transformers', 'gguf'))
def test_other_variations_are_read(server, tmp_path, framework):
  server.handle = f'google/gemma-3/{framework}/gemma-3-270m'
  own = tmp_path / 'own'
  own.mkdir()
  if framework == 'gguf':
    cfg, params = tiny_gguf.write(own / 'gemma-Q4_0.gguf')
  else:
    cfg, params = hf_fixture.write_folder(own)
  server.files = {p.name: p.read_bytes() for p in own.iterdir()}
  source = pretrained.open_source(
    f'kaggle:{server.handle}', '', '', seed=0, texts=()
  )
  assert source.config == cfg
  hf_fixture.assert_same(source.read(), params)


def test_a_cut_connection_goes_on(server):
  server.files['2b-it/noise'] = random.Random(0).randbytes(5_000_000)
  server.cut = 5_000_000
  refusal(
    lambda: kaggle.download(HANDLE),
    f'kaggle:{HANDLE}',
    'cut off',
    'the same command again',
  )
  server.ranges.clear()
  folder = kaggle.download(HANDLE)
  for name, content in server.files.items():
    assert (folder / name).read_bytes() == content
  # Nor are files sent again that were whole. The client writes megabytes.
  assert [r for r in server.ranges if r] == [f'bytes={2 << 20}-']


def test_a_damaged_file_is_refused_and_goes(server, published):
  server.damage = True
  refusal(lambda: kaggle.download(HANDLE), 'md5', 'again')
  server.damage = False
  assert _same(kaggle.download(HANDLE), published)


def test_no_credentials(server, monkeypatch):
  monkeypatch.delenv('KAGGLE_KEY')
  refusal(
    lambda: kaggle.download(HANDLE),
    HANDLE,
    'to nobody (403)',
    'https://www.kaggle.com/settings',
    'KAGGLE_USERNAME and KAGGLE_KEY',
  )


def test_wrong_credentials(server, monkeypatch):
  monkeypatch.setenv('KAGGLE_KEY', 'of last year')
  refusal(
    lambda: kaggle.download(HANDLE),
    'to morgane (401)',
    'new token at https://www.kaggle.com/settings',
  )
  monkeypatch.setenv('KAGGLE_API_TOKEN', 'of last year')
  refusal(lambda: kaggle.download(HANDLE), 'the token (401)', 'settings')


def test_credentials_in_a_file(server, monkeypatch, tmp_path):
  monkeypatch.delenv('KAGGLE_KEY')
  monkeypatch.delenv('KAGGLE_USERNAME')
  path = tmp_path / 'credentials' / 'kaggle.json'
  path.parent.mkdir()
  path.write_text('{"username": "morgane", "key": "secret"}')
  assert kaggle.download(HANDLE).is_dir()
  path.write_text('{"username": ')
  refusal(lambda: kaggle.download(HANDLE), path, 'kaggle.com/settings')


def test_a_licence_to_be_accepted(server):
  server.status = 403
  refusal(
    lambda: kaggle.download(HANDLE),
    '(403)',
    'to morgane',
    'accept its licence at https://www.kaggle.com/models/google/gemma',
  )


def test_an_unknown_variation(server):
  refusal(
    lambda: kaggle.download('google/gemma/flax/3b-it'),
    'kaggle:google/gemma/flax/3b-it',
    'no such model (404)',
    'https://www.kaggle.com/models/google/gemma',
  )


def test_a_busy_server(server):
  server.status = 503
  refusal(lambda: kaggle.download(HANDLE), '503', 'try again later')


@pytest.mark.parametrize(
  'handle',
  [
    '',
    'gemma',
    'google/gemma/flax',
    f'{HANDLE}/',
    f'{HANDLE}/two',
    f'{HANDLE}/2/x',
  ]
  + ['google/gemma/../2b-it', '/gemma/flax/2b-it', 'google/ge mma/flax/2b-it'],
)
def test_a_handle_of_another_shape(server, handle):
  refusal(lambda: kaggle.download(handle), f'kaggle:{handle}: OWNER/MODEL/')
  assert server.requests == []


def test_an_unknown_framework(server):
  refusal(lambda: kaggle.download('google/gemma/flux/2b-it'), "'flux'")


def _nobody(monkeypatch):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    proxy = f'http://127.0.0.1:{s.getsockname()[1]}'
  monkeypatch.setenv('HTTP_PROXY', proxy)
  monkeypatch.setenv('http_proxy', proxy)


def test_no_network(server, monkeypatch, capsys):
  with monkeypatch.context() as m:
    _nobody(m)
    refusal(
      lambda: kaggle.download(HANDLE),
      HANDLE,
      'Connection refused',
      'try again later',
    )
  server.version = 9
  kaggle.download(HANDLE)
  server.version = 10
  folder = kaggle.download(HANDLE)
  half = folder.with_name('11')  # A version that never came to its end.
  shutil.copytree(folder, half)
  capsys.readouterr()
  _nobody(monkeypatch)
  assert kaggle.download(HANDLE) == folder
  assert str(folder) in capsys.readouterr().out
  refusal(lambda: kaggle.download(HANDLE, force=True), 'Connection refused')


def test_a_full_disk(server, monkeypatch):
  from kagglehub import clients

  real = clients._download_file

  def full(response, out_file, *args):
    if out_file.endswith('tokenizer.model'):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), out_file)
    return real(response, out_file, *args)

  monkeypatch.setattr(clients, '_download_file', full)
  refusal(
    lambda: kaggle.download(HANDLE),
    'tokenizer.model',
    'No space left on device',
    'make room or mend it, or set KAGGLEHUB_CACHE',
  )


def test_the_token_is_never_shown(server, monkeypatch, capfd):
  for status in (0, 401, 403, 500):
    server.status = status
    try:
      kaggle.download(HANDLE)
    except errors.UserError as e:
      assert 'secret' not in str(e)
  out = capfd.readouterr()
  assert 'secret' not in out.out + out.err
  assert pathlib.Path(os.environ['KAGGLEHUB_CACHE']).is_dir()
