"""Damaged checkpoints: seen, said, and gone past."""

import json
import os
import shutil

import numpy as np
import pytest

from mt.base import files
from mt.train import checkpoint
from mt.train import loop
from mt.train import manifest
from mt.base import run_folder
from tests.fixtures.refusal import refusal

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def whole(tmp_path_factory, quick_compilation):
  """A run of four steps with checkpoints of two and four."""
  from configs import debug

  config = debug.get_config()
  config.data.length = 128
  config.train.max_steps, config.train.batch_size = 4, 2
  config.eval.every = 4
  config.eval.loss_pairs = 4
  config.eval.chrf_pairs = config.eval.translate_every = 0
  config.eval.patience = 0
  config.eval.translate_pairs = 1
  config.decode.max_ratio = 0.1
  config.checkpoint.every = 2
  workdir = tmp_path_factory.mktemp('whole')
  loop.run(config, workdir)
  return config, workdir


def _copy(whole, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(whole[1], workdir)
  return whole[0], workdir


def _damage(file, how):
  data = file.read_bytes()
  file.unlink()
  if how == 'truncated':
    file.write_bytes(data[: len(data) // 2])
  elif how == 'zeroed':
    file.write_bytes(bytes(len(data)))


# Written again at each commit by Orbax; nothing is read out of it.
_IRRELEVANT = 'commit_success.txt'


@pytest.mark.parametrize('how', ['truncated', 'zeroed', 'deleted'])
def test_damage_to_any_file_is_seen_and_gone_past(whole, tmp_path, capsys, how):
  _, source = whole
  newest = source / 'checkpoints' / 'step_4'
  files = [p.relative_to(newest) for p in newest.rglob('*') if p.is_file()]
  assert len(files) > 20
  for file in files:
    workdir = tmp_path / 'w'
    shutil.copytree(source, workdir)
    folder = workdir / 'checkpoints'
    _damage(folder / 'step_4' / file, how)
    manifest.quarantine_damaged(folder)
    out = capsys.readouterr().out
    if str(file) != _IRRELEVANT:
      assert 'step 4 is damaged' in out and str(file) in out, file
      assert 'of step 2' in out and out.count('\n') == 1
      assert manifest.steps(folder) == [2]
      assert (folder / 'damaged-step_4').is_dir()
      manifest.quarantine_damaged(folder)
      assert capsys.readouterr().out == ''
    shutil.rmtree(workdir)


def test_zeros_in_an_array_are_not_what_was_written(whole, tmp_path):
  """They may parse: Orbax would train on with them."""
  _, workdir = _copy(whole, tmp_path)
  folder = workdir / 'checkpoints' / 'step_4'
  file = max(folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  assert 'another content' in manifest.damage(folder)
  assert manifest.damage(folder, largest=100) == ''  # Only measured.


def test_a_run_goes_on_from_the_checkpoint_before(whole, tmp_path, capsys):
  config, workdir = _copy(whole, tmp_path)
  metrics = workdir / 'metrics.jsonl'
  before = [json.loads(x)['step'] for x in metrics.read_text().splitlines()]
  _damage(workdir / 'checkpoints' / 'step_4' / 'identity/metadata', 'zeroed')
  loop.run(config, workdir)
  out = capsys.readouterr().out
  assert 'step 4 is damaged (identity/metadata' in out
  assert 'at step 2' in out
  lines = [json.loads(x) for x in metrics.read_text().splitlines()]
  assert [x['step'] for x in lines] == before
  old, new = (checkpoint.load_trained(w, 4)[2] for w in (whole[1], workdir))
  assert old.keys() == new.keys() and len(old) > 5
  for name in old:
    np.testing.assert_array_equal(old[name], new[name])


def test_with_none_left_nothing_starts_over(whole, tmp_path):
  config, workdir = _copy(whole, tmp_path)
  folder = workdir / 'checkpoints'
  for at in (2, 4):
    _damage(folder / f'step_{at}' / 'manifest.json', 'deleted')
  for _ in range(2):
    refusal(
      lambda: loop.run(config, workdir),
      folder,
      'step 4: manifest.json is missing',
      'step 2: ',
      'delete that folder',
    )
  # Nor where only what was moved aside is left.
  shutil.rmtree(folder / 'step_2')
  (folder / 'step_4').rename(folder / 'damaged-step_4')
  refusal(lambda: loop.run(config, workdir), 'damaged-step_4')
  shutil.rmtree(folder)
  loop.run(config, workdir)
  assert manifest.steps(folder) == [2, 4]


def test_commands_refuse_a_damaged_checkpoint(whole, tmp_path):
  _, workdir = _copy(whole, tmp_path)
  _damage(workdir / 'checkpoints' / 'step_4' / 'rest/_METADATA', 'truncated')
  refusal(
    lambda: checkpoint.load_finetuned(workdir), 'step 4', 'rest/_METADATA'
  )
  checkpoint.load_finetuned(workdir, 2)


def test_a_checkpoint_half_written_is_none(whole, tmp_path):
  """Orbax's temporary folder, as a kill leaves it."""
  config, workdir = _copy(whole, tmp_path)
  folder = workdir / 'checkpoints'
  os.rename(folder / 'step_4', folder / 'step_4.orbax-checkpoint-tmp')
  assert manifest.steps(folder) == [2]
  loop.run(config, workdir)
  assert sorted(p.name for p in folder.iterdir()) == ['step_2', 'step_4']
  # Of a folder that has nothing else, another run may be made.
  shutil.rmtree(folder / 'step_2')
  os.rename(folder / 'step_4', folder / 'step_4.orbax-checkpoint-tmp')
  other = config.copy_and_resolve_references()
  other.seed = 7
  run_folder.claim(workdir, other)


def test_a_checkpoint_of_another_config_or_version_is_refused(
  whole, tmp_path, monkeypatch
):
  """Whatever config.json says, which anyone can change."""
  config, workdir = _copy(whole, tmp_path)
  other = config.copy_and_resolve_references()
  other.optim.learning_rate = 0.5
  files.write_json(workdir / 'config.json', other.to_dict())
  refusal(
    lambda: loop.run(other, workdir),
    'step 4 belongs to another run',
    'config.optim.learning_rate is 0.01',
    '0.5',
  )
  files.write_json(workdir / 'config.json', config.to_dict())
  monkeypatch.setattr(checkpoint, 'VERSION', 2)
  refusal(lambda: loop.run(config, workdir), 'version is 1, here it is 2')
