"""Damaged checkpoints: seen, said, and gone past."""

import json
import os
import shutil

import pytest

from mt.base import files
from mt.base import run_folder
from mt.evaluate import __main__ as evaluate
from mt.export import __main__ as export
from mt.train import checkpoint
from mt.train import machine
from mt.train import manifest
from mt.train import run as run_lib
from tests.fixtures.refusal import refusal
from tests.runs import folders


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
def test_damage_to_any_file_is_seen_and_gone_past(plain, tmp_path, capsys, how):
  source = plain[1]
  newest = source / 'checkpoints' / 'step_6'
  files = [p.relative_to(newest) for p in newest.rglob('*') if p.is_file()]
  assert len(files) > 20
  for file in files:
    folder = tmp_path / 'checkpoints'
    shutil.copytree(source / 'checkpoints', folder)
    _damage(folder / 'step_6' / file, how)
    manifest.quarantine_damaged(folder)
    out = capsys.readouterr().out
    if str(file) != _IRRELEVANT:
      assert 'step 6 is damaged' in out and str(file) in out, file
      assert 'of step 4' in out and out.count('\n') == 1
      assert manifest.steps(folder) == [4]
      assert (folder / 'damaged-step_6').is_dir()
      manifest.quarantine_damaged(folder)
      assert capsys.readouterr().out == ''
    shutil.rmtree(folder)


def test_zeros_in_an_array_are_not_what_was_written(plain_copy):
  """They may parse: Orbax would train on with them."""
  folder = plain_copy[1] / 'checkpoints' / 'step_6'
  file = max(folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  assert 'another content' in manifest.damage(folder)
  assert manifest.damage(folder, largest=100) == ''  # Only measured.


def test_a_run_goes_on_from_the_checkpoint_before(plain, plain_copy, capsys):
  config, workdir = plain_copy
  _damage(workdir / 'checkpoints' / 'step_6' / 'rest/_METADATA', 'truncated')
  refusal(
    lambda: checkpoint.load_finetuned(workdir, 6), 'step 6', 'rest/_METADATA'
  )
  checkpoint.load_finetuned(workdir, 4)
  run_lib.run(config, workdir)
  out = capsys.readouterr().out
  assert 'step 6 is damaged (rest/_METADATA' in out
  assert 'at step 4' in out
  shutil.rmtree(workdir / 'checkpoints' / 'damaged-step_6')
  folders.assert_same_run(plain[1], workdir)


@pytest.mark.parametrize('how', ['zeroed', 'deleted'])
def test_without_its_chrf_no_other_is_called_the_best(finished_copy, how):
  config, workdir = finished_copy
  assert 'the best' in checkpoint.find_step(workdir)[1]
  _damage(workdir / 'checkpoints' / 'step_6' / 'metrics' / 'metrics', how)
  words = 'step 6 is damaged (metrics/metrics', 'move it away, as train.py'
  for which in ('', 'last', '4'):
    refusal(lambda which=which: checkpoint.find_step(workdir, which), *words)
  run_lib.run(config, workdir)
  assert 'the best' in checkpoint.find_step(workdir)[1]


def test_a_whole_checkpoint_beside_one_without_manifest_is_found(plain_copy):
  _, workdir = plain_copy
  _damage(workdir / 'checkpoints' / 'step_4' / 'manifest.json', 'deleted')
  for which in ('', 'last', '6'):
    assert checkpoint.find_step(workdir, which)[0] == 6


def test_what_a_run_at_work_deletes_meanwhile_is_not_damaged(
  plain_copy, monkeypatch
):
  """As Orbax does it: moved away at once."""
  _, workdir = plain_copy
  old = workdir / 'checkpoints' / 'step_4'
  real = manifest.damage

  def damage(folder, *args, **kwargs):
    if folder == old:
      shutil.rmtree(old)
    return real(folder, *args, **kwargs)

  kept = shutil.copytree(old, workdir / 'kept')
  with monkeypatch.context() as m:
    m.setattr(manifest, 'damage', damage)
    assert checkpoint.find_step(workdir) == (6, 'step 6, the last')
    shutil.copytree(kept, old)
    refusal(lambda: checkpoint.find_step(workdir, '4'), "no checkpoint '4'")
    shutil.copytree(kept, old)
    gone = 'step 4 is gone', 'give the command again'
    refusal(lambda: checkpoint.load_finetuned(workdir, 4), *gone)
  shutil.copytree(kept, old)
  monkeypatch.setattr(
    checkpoint, 'identity', lambda *args: shutil.rmtree(old) or {}
  )
  refusal(lambda: checkpoint.load_finetuned(workdir, 4), *gone)


def test_with_none_left_nothing_starts_over(plain_copy):
  config, workdir = plain_copy
  folder = workdir / 'checkpoints'
  for at in (4, 6):
    _damage(folder / f'step_{at}' / 'manifest.json', 'deleted')
  for _ in range(2):
    refusal(
      lambda: run_lib.run(config, workdir),
      folder,
      'step 6: manifest.json is missing',
      'step 4: ',
      'another --workdir',
    )
  # Nor where only what was moved aside is left.
  shutil.rmtree(folder / 'step_4')
  (folder / 'step_6').rename(folder / 'damaged-step_6')
  refusal(lambda: run_lib.run(config, workdir), 'damaged-step_6')


def test_a_checkpoint_half_written_is_none(plain, plain_copy):
  """Orbax's temporary folder, as a kill leaves it."""
  config, workdir = plain_copy
  folder = workdir / 'checkpoints'
  os.rename(folder / 'step_6', folder / 'step_6.orbax-checkpoint-tmp')
  assert manifest.steps(folder) == [4]
  run_lib.run(config, workdir)
  folders.assert_same_run(plain[1], workdir)
  # Of a folder that has nothing else, another run may be made.
  shutil.rmtree(folder / 'step_4')
  os.rename(folder / 'step_6', folder / 'step_6.orbax-checkpoint-tmp')
  config.seed = 7
  run_folder.claim(workdir, config)


def test_what_is_not_kept_is_no_checkpoint_before_it_is_deleted(
  plain_copy, monkeypatch, capsys
):
  """A kill meanwhile leaves no damaged one."""
  config, workdir = plain_copy
  config.train.max_steps, config.checkpoint.keep = 8, 1
  config.checkpoint.every = 1
  folder = workdir / 'checkpoints'
  with monkeypatch.context() as m:
    m.setattr(manifest, 'remove_deleted', lambda checkpoints: None)
    run_lib.run(config, workdir)
  moved = folder / manifest.DELETED
  assert {'step_4', 'step_7'} <= {path.name for path in moved.iterdir()}
  assert not any(manifest.damage(path) for path in moved.iterdir())
  (moved / 'step_7' / manifest.NAME).unlink()  # As a kill leaves it.
  config.train.max_steps = 9
  run_lib.run(config, workdir)
  assert 'damaged' not in capsys.readouterr().out
  assert manifest.steps(folder) == [9] and not moved.exists()


def test_a_checkpoint_of_another_config_is_refused(plain_copy):
  """Whatever config.json says, which anyone can change."""
  config, workdir = plain_copy
  config.optim.learning_rate = 0.5
  made = machine.here(config).to_dict()
  files.write_json(workdir / 'config.json', made)
  refusal(
    lambda: run_lib.run(config, workdir),
    'step 6 belongs to another run',
    'config.optim.learning_rate is 0.01',
    '0.5',
  )


def _as_version(workdir, version):
  """The checkpoints as another version of this code left them."""
  for at in manifest.steps(workdir / 'checkpoints'):
    folder = workdir / 'checkpoints' / f'step_{at}'
    path = folder / 'identity' / 'metadata'
    identity = json.loads(path.read_text())
    del identity['version']
    (folder / 'manifest.json').unlink()
    if version is not None:
      identity['version'] = version
    path.write_text(json.dumps(identity))
    if version is not None:
      manifest.write(folder)


@pytest.mark.parametrize('version', [None, 3])
def test_a_checkpoint_of_another_version_is_named(
  debug_config, plain_copy, tmp_path, version
):
  """By whoever reads one; nothing is called damaged, moved or written."""
  config, workdir = plain_copy
  _as_version(workdir, version)
  config.optim.learning_rate = 0.5
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  (workdir / 'translations' / 'valid.after.json').unlink()
  debug_config.weights.warm_start = str(workdir)
  word = 'has no version' if version is None else 'has version 3'
  for call in (
    lambda: run_lib.run(config, workdir),
    lambda: run_lib.run(debug_config, tmp_path / 'warm'),
    lambda: checkpoint.load_finetuned(workdir, 6),
    lambda: evaluate.translate_split(workdir, evaluate.Text('valid')),
    lambda: export.from_run('hf', workdir, tmp_path / 'x', 'float32', False),
  ):
    refusal(call, workdir, f'step 6 {word}', 'with version 2', '--workdir')
  for path, time in before.items():
    if path.is_file() and path.name != 'lock':
      assert path.stat().st_mtime_ns == time, path


def test_of_version_1_the_model_is_read(debug_config, plain_copy, tmp_path):
  config, workdir = plain_copy
  _as_version(workdir, 1)
  config.optim.learning_rate = 0.5
  refusal(
    lambda: run_lib.run(config, workdir),
    'step 6 has version 1',
    'weights.warm_start',
  )
  (workdir / 'translations' / 'valid.after.json').unlink()
  assert evaluate.translate_split(workdir, evaluate.Text('valid')).step == 6
  debug_config.weights.warm_start = str(workdir)
  debug_config.train.max_steps = 1
  run_lib.run(debug_config, tmp_path / 'warm')


def test_the_identity_passes_over_knobs_that_are_no_more(plain_copy, capsys):
  config, workdir = plain_copy
  for at in manifest.steps(workdir / 'checkpoints'):
    folder = workdir / 'checkpoints' / f'step_{at}'
    path = folder / 'identity' / 'metadata'
    identity = json.loads(path.read_text())
    identity['config'] |= {'data.buckets': [], 'data.of_old': 3}
    del identity['config']['data.noise']  # And over new ones.
    path.write_text(json.dumps(identity))
    manifest.write(folder)
  run_lib.run(config, workdir)
  assert 'at step 6' in capsys.readouterr().out
