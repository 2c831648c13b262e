"""Finished runs that many tests look at, made once; who writes, copies."""

import contextlib
import io
import shutil

import pytest

from mt.gemma import lora
from mt.train import checkpoint
from mt.train import run as run_lib
from tests.fixtures import gguf_fixture
from tests.runs import lora_run
from tests.runs import small


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """(config, folder, what it said): translated once, at the end."""
  config = small.get_config()
  config.eval.test = True
  config.eval.translate_every, config.eval.chrf_pairs = 6, 2
  config.eval.minitrain_pairs = 4
  return _run(config, tmp_path_factory.mktemp('finished'))


@pytest.fixture(scope='session')
def plain(tmp_path_factory):
  """The same with losses alone: no checkpoint is the best."""
  return _run(small.get_config(), tmp_path_factory.mktemp('plain'))


def _run(config, folder):
  with contextlib.redirect_stdout(io.StringIO()) as said:
    run_lib.run(config, folder)
  return config.copy_and_resolve_references(), folder, said.getvalue()


@pytest.fixture
def finished_copy(finished, tmp_path):
  """(config, folder), to be changed."""
  config, folder, _ = finished
  copy = shutil.copytree(folder, tmp_path / 'copy')
  return config.copy_and_resolve_references(), copy


@pytest.fixture
def plain_copy(plain, tmp_path):
  """(config, folder), to be changed."""
  config, folder, _ = plain
  copy = shutil.copytree(folder, tmp_path / 'copy')
  return config.copy_and_resolve_references(), copy


@pytest.fixture(scope='session')
def run(tmp_path_factory):
  """Of LoRA, from a GGUF file of Gemma 2, to be exported."""
  folder = tmp_path_factory.mktemp('run')
  cfg = gguf_fixture.tiny_config('gemma2', 400)
  params = gguf_fixture.tiny_params(cfg)
  proto = gguf_fixture.train_proto()
  path = gguf_fixture.write_gguf(
    folder / 'a.gguf', cfg, params, proto, 'gemma2'
  )
  return lora_run.write(folder / 'run', path, proto)


@pytest.fixture(scope='session')
def finetuned(run):
  """(source, parameters with the factors folded in) of `run`."""
  _, source, params = checkpoint.load_finetuned(run, 0)
  return source, lora.fold(params)
