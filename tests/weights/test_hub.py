"""The Hugging Face hub's own client against a server on 127.0.0.1."""

import os
import socket
import subprocess
import sys

import pytest

from mt.weights import hub
from mt.weights import pretrained
from tests.fixtures import hf_fixture
from tests.fixtures import hub_server
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal

NAME = hub_server.MODEL


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A model as the hub has it, with files that nobody here reads."""
  folder = tmp_path_factory.mktemp('published')
  hf_fixture.write_folder(folder)
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 106]}')
  (folder / 'chat_template.jinja').write_text('{{ bos_token }}')
  tiny_gguf.write(folder / 'gemma-Q8_0.gguf')
  for name in ('README.md', 'pytorch_model.bin', 'original/a.safetensors'):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'x' * 99)
  return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
  """The hub, its client told of it, and nobody's token."""
  from huggingface_hub import constants

  server = hub_server.Hub(published)
  template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(constants, 'ENDPOINT', server.url)
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
  monkeypatch.delenv('HF_TOKEN', raising=False)
  yield server
  server.close()


def _nobody(monkeypatch):
  """An address that nobody listens at."""
  from huggingface_hub import constants

  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{s.getsockname()[1]}'
  monkeypatch.setattr(constants, 'ENDPOINT', url)


def test_a_source_is_read_out_of_the_files_that_are_needed(
  server, published, monkeypatch
):
  def read():
    return pretrained.open_source(f'hf:{NAME}', '', '', seed=0, texts=())

  found = read()
  own = hf_fixture.open_folder(published)
  assert found.config == own.config
  assert found.tokenizer.proto == own.tokenizer.proto
  hf_fixture.assert_same(found.read(), own.read())
  assert server.fetched() == {
    'config.json',
    'model.safetensors',
    'tokenizer.model',
    'generation_config.json',
    'chat_template.jinja',
  }
  server.requests.clear()
  read()
  assert server.fetched() == set()
  server.requests.clear()
  hub.download(NAME, force=True)
  assert 'model.safetensors' in server.fetched()
  # What the cache has is taken when nobody answers.
  _nobody(monkeypatch)
  assert read().config == own.config


def test_a_gguf_file_has_a_name_of_its_own(server, published):
  path = hub.download(f'{NAME}/gemma-Q8_0.gguf@v1')
  assert path.read_bytes() == (published / 'gemma-Q8_0.gguf').read_bytes()
  assert server.fetched() == {'gemma-Q8_0.gguf'}
  refusal(
    lambda: hub.download(f'{NAME}/gemma-Q4_0.gguf'),
    f'hf:{NAME}/gemma-Q4_0.gguf',
    'is not in it',
    f'{server.url}/{NAME}/tree/main',
  )


def test_a_model_of_gguf_files_alone(server):
  del server.files['model.safetensors']
  refusal(
    lambda: hub.download(NAME),
    f'hf:{NAME}: no .safetensors file is in it; see ',
    f'hf:{NAME}/FILE.gguf',
  )


def test_a_gated_model(server, monkeypatch):
  server.gated = 'accepted'
  page = f'accept it at {server.url}/{NAME}'
  refusal(lambda: hub.download(NAME), f'hf:{NAME}', '(401)', page, 'HF_TOKEN')
  monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
  assert hub.download(NAME).is_dir()
  server.gated = True
  refusal(lambda: hub.download(NAME, force=True), '(403)', page, 'account')


@pytest.mark.parametrize(
  ('name', 'token', 'words'),
  [
    ('google/gemma-9', '', ('no such model', '(401)', 'its name', 'HF_TOKEN')),
    ('google/gemma-9', hub_server.TOKEN, ('no such model', '(404)', 'name')),
    (NAME, 'hf_old', ('of your token', '(401)', 'settings/tokens')),
    (f'{NAME}@v9', '', ("no revision 'v9'", '/tree/main')),
    (f'{NAME}@', '', ('OWNER/MODEL',)),
    ('gemma-3-270m', '', ('OWNER/MODEL',)),
    (f'{NAME}/a/../b', '', ('OWNER/MODEL',)),
  ],
)
def test_what_the_hub_does_not_give(server, monkeypatch, name, token, words):
  if token:
    monkeypatch.setenv('HF_TOKEN', token)
  refusal(lambda: hub.download(name), f'hf:{name}', *words)


def test_a_hub_that_is_ill_or_away(server, monkeypatch):
  from huggingface_hub import constants

  server.status = 500
  refusal(lambda: hub.download(NAME), 'answers 500', 'try again later')
  _nobody(monkeypatch)
  refusal(lambda: hub.download(NAME), 'does not answer', 'try again later')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  refusal(lambda: hub.download(NAME), 'HF_HUB_OFFLINE', 'not in the cache')


def test_a_cache_that_cannot_be_written(server, tmp_path):
  (tmp_path / 'cache').write_text('')
  refusal(lambda: hub.download(NAME), 'Not a directory', 'HF_HOME')


def test_a_command_ends_with_one_sentence(server, tmp_path):
  command = [sys.executable, '-m', 'mt.export', '--source=hf:google/gemma-9']
  environment = {'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path)}
  done = subprocess.run(
    [*command, f'--out={tmp_path / "out"}'],
    capture_output=True,
    text=True,
    env=os.environ | environment,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: hf:google/gemma-9: the hub has no such model')


# Out.


def test_a_folder_is_sent(server, published, monkeypatch):
  name = f'hf:{hub_server.OWN}'
  refusal(lambda: hub.check_upload(name), name, 'no token', 'HF_TOKEN')
  monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
  for wrong in ('somebody/mine', 'hf:mine', f'{name}/x', f'{name}@v1'):
    refusal(lambda wrong=wrong: hub.check_upload(wrong), wrong, 'hf:USER/NAME')
  model = hub.check_upload(name)
  assert hub.upload(published, model) == f'{server.url}/{hub_server.OWN}'
  assert server.made['visibility'] == 'private'
  assert server.sent == server.files
  hub.upload(published, model, public=True)
  assert server.made['visibility'] == 'public'


def test_an_export_is_sent_by_the_command(server, published, tmp_path):
  command = [sys.executable, '-m', 'mt.export', f'--source={published}']
  command += [f'--push=hf:{hub_server.OWN}', f'--out={tmp_path / "out"}']
  token = {'HF_TOKEN': hub_server.TOKEN, 'HF_HOME': str(tmp_path / 'home')}
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    env=os.environ | {'HF_ENDPOINT': server.url} | token,
  )
  assert done.returncode == 0, done.stderr
  assert f'sent: {server.url}/{hub_server.OWN}' in done.stdout
  assert server.made['visibility'] == 'private'
  written = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
  assert server.sent == written
  assert f"'{hub_server.OWN}'" in server.sent['README.md'].decode()


def test_a_folder_that_the_hub_does_not_take(server, published, monkeypatch):
  def upload(name=hub_server.OWN):
    return lambda: hub.upload(published, name)

  again = f'`hf upload {hub_server.OWN} {published} --private`'
  monkeypatch.setenv('HF_TOKEN', 'hf_old')
  refusal(upload(), '(401)', 'settings/tokens', again)
  monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
  refusal(upload(NAME), 'there already', 'nothing is overwritten', 'name')
  server.status = 403
  refusal(upload(), '(403)', 'may read or write', again)
  _nobody(monkeypatch)
  refusal(upload(), f'--push=hf:{hub_server.OWN}', 'does not answer', again)
  assert not server.sent
