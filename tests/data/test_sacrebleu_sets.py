"""sacreBLEU's test sets, fetched by its own client from a server here."""

import functools
import hashlib
import io
import tarfile

import pytest
from sacrebleu import dataset
from sacrebleu import utils

from configs import default
from mt.data import corpus
from tests.data.test_mtnt import Server
from tests.fixtures.refusal import refusal

_LINES = '1\tngl 😂\tc’est 😂\n2\t"hi\tsalut\n3\t\tempty\n'


@functools.cache  # Its bytes have the time in them.
def _archive():
  out, content = io.BytesIO(), _LINES.encode()
  with tarfile.open(fileobj=out, mode='w:gz') as tar:
    member = tarfile.TarInfo('MTNT/test/test.en-fr.tsv')
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
  return out.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
  """(content, plan) -> Server, which sacreBLEU asks for MTNT's test set."""
  servers, chosen = [], dataset.DATASETS['mtnt1.1/test']
  monkeypatch.setenv('NO_PROXY', '*')
  folder = tmp_path / chosen.name
  monkeypatch.setattr(utils, 'SACREBLEU_DIR', str(tmp_path))
  monkeypatch.setattr(chosen, '_outdir', str(folder))
  monkeypatch.setattr(chosen, '_rawdir', str(folder / 'raw'))
  md5 = hashlib.md5(_archive(), usedforsecurity=False).hexdigest()
  monkeypatch.setattr(chosen, 'md5', [md5])

  def start(content, plan=()):
    servers.append(Server(content, plan))
    url = f'http://127.0.0.1:{servers[-1].server_address[1]}/MTNT.1.1.tar.gz'
    monkeypatch.setattr(chosen, 'data', [url])
    return servers[-1]

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def _read(name, pair='en-fr', split='test'):
  config = default.get_config().data
  config[split], config.pair, config.max_bad_fraction = name, pair, 0.5
  return corpus.read_splits(config, [split])[split][0]


def test_a_set_is_fetched_once(serve):
  server = serve(_archive())
  for name in ('sacrebleu:mtnt1.1/test', 'sacrebleu:mtnt1.1/{split}'):
    text = _read(name)
    pairs = [(p.source, p.target) for p in text.read()]
    assert pairs == [('ngl 😂', 'c’est 😂'), ('"hi', 'salut')]
    assert text.sample.unusable == {'an empty source': (1, 3)}
  assert server.requests == 1


@pytest.mark.parametrize(
  'content, plan, words',
  [
    (_archive(), [404], '404'),
    (_archive(), ['cut'], ''),
    (b'another archive', [], ''),
  ],
)
def test_what_is_not_fetched_is_one_sentence(serve, content, plan, words):
  """And what came of it is not taken for the set at the next start."""
  server, name = serve(content, plan), 'sacrebleu:mtnt1.1/test'
  refusal(lambda: _read(name), name, words, 'with a network')
  server.content = _archive()
  assert len(_read(name).read()) == 2 and server.requests == 2


def test_names_and_pairs_are_sacrebleus():
  refusal(lambda: _read('sacrebleu:mtnt2018'), 'mtnt2018', 'mtnt2019', '--list')
  refusal(
    lambda: _read('sacrebleu:mtnt2019', 'en-de'), 'en-de', 'data.pair', 'en-fr'
  )


def test_what_is_trained_on_is_not_scored():
  config = default.get_config().data
  config.source = 'sacrebleu:mtnt2019'
  refusal(lambda: corpus.read_splits(config, ['test']), 'data.test')
