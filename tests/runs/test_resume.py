"""Runs that go on: after a kill, with another config, on another machine."""

import dataclasses
import gc
import json
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from mt.base import journal
from mt.base import run_folder
from mt.data import corpus
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import checkpoint
from mt.train import machine
from mt.train import run as run_lib
from mt.train import state as state_lib
from tests.fixtures import tiny_step
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.runs import small


def _die_after(monkeypatch, at):
  """KeyboardInterrupt once the loss of step `at` is logged."""
  real = journal.add_metrics

  def add_then_die(path, line):
    real(path, line)
    if line['step'] == at and 'loss' in line:
      raise KeyboardInterrupt

  monkeypatch.setattr(journal, 'add_metrics', add_then_die)


def _interrupted(config, folder, at):
  """A run that dies after a step and is started again."""
  with pytest.MonkeyPatch.context() as patch:
    _die_after(patch, at)
    with pytest.raises(KeyboardInterrupt):
      run_lib.run(config, folder)
  run_lib.run(config, folder)


@pytest.mark.parametrize('stop', [5, pytest.param(1, marks=pytest.mark.heavy)])
def test_an_interrupted_run_goes_on_bit_for_bit(finished, tmp_path, stop):
  """And with the programs of the whole run: none is compiled anew."""
  config, whole, _ = finished
  compiled = []

  def hear(event, **_):
    compiled.extend([event] if event.endswith('/cache_misses') else [])

  jax.monitoring.register_event_listener(hear)
  _interrupted(config, tmp_path, stop)
  jax.monitoring.unregister_event_listener(hear)
  assert not compiled
  folders.assert_same_run(whole, tmp_path)


def test_so_does_one_of_lora_in_four_bits_without_packing(
  debug_config, tmp_path
):
  debug_config.train.parts, debug_config.data.packing = 'lora', False
  debug_config.train.frozen_dtype = 'int4'
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path / 'whole')
  _interrupted(debug_config, tmp_path / 'cut', 3)
  folders.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def _stop_at(workdir, flags, at, sent):
  """Starts the command, sends a signal once a step is logged; its exit code."""
  process = subprocess.Popen(
    folders.command(workdir, *flags),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  deadline = time.monotonic() + 120
  path = workdir / 'metrics.jsonl'
  while not (path.exists() and f'"step": {at},' in path.read_text()):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(sent)
  return process.wait(), process.stderr.read().decode()


def test_killed_twice_and_the_same_command_again(debug_config, tmp_path):
  """A process of its own each time, and the end of one that ran here."""
  debug_config.train.max_steps, debug_config.eval.every = 20, 10
  run_lib.run(debug_config, tmp_path / 'whole')
  cut = tmp_path / 'cut'
  flags = '--config.train.max_steps=20', '--config.eval.every=10'
  code, text = _stop_at(cut, flags, 3, signal.SIGINT)
  assert code == 130 and text.count('\n') == 1 and 'interrupted' in text
  at = int(re.search(r'at step (\d+), which is saved', text)[1])
  assert at == folders.steps(cut)[-1]
  code, _ = _stop_at(cut, flags, max(7, at + 1), signal.SIGKILL)
  assert code == -signal.SIGKILL
  done = subprocess.run(
    folders.command(cut, *flags), check=True, capture_output=True, text=True
  )
  assert 'resumed' in done.stdout
  folders.assert_same_run(tmp_path / 'whole', cut)


def test_more_steps_go_on_from_the_last(plain_copy, capsys):
  config, folder = plain_copy
  config.train.max_steps = 5
  before = (folder / 'config.json').read_bytes()
  refusal(lambda: run_lib.run(config, folder), 'at step 6', 'max_steps=5')
  assert (folder / 'config.json').read_bytes() == before
  config.train.max_steps, config.eval.every = 8, 4
  run_lib.run(config, folder)
  lines = folders.metrics(folder)
  assert [m['step'] for m in lines if 'loss' in m] == list(range(1, 9))
  assert folders.scores(folder)['valid']['after']['step'] == 8
  out = capsys.readouterr().out
  assert 'changed: eval.every=4 (was 3), train.max_steps=8 (was 6); the' in out
  assert 'learning rate' not in out


def test_a_folder_of_another_run_is_refused(finished_copy):
  config, folder = finished_copy
  config.optim.learning_rate = 0.5
  refusal(
    lambda: run_lib.run(config, folder), folder, 'learning_rate=0.01', '0.5'
  )


def test_a_checkpoint_of_another_model_is_refused(plain_copy, monkeypatch):
  # The same name, other weights: only the fingerprint tells them apart.
  config, folder = plain_copy
  real = parameters.init
  with monkeypatch.context() as patch:
    patch.setattr(
      parameters, 'init', lambda cfg, key: real(cfg, jax.random.key(99))
    )
    refusal(lambda: run_lib.run(config, folder), folder, 'fingerprint')
  other = dataclasses.replace(sizes.SIZES['debug'], num_layers=2)
  monkeypatch.setitem(sizes.SIZES, 'debug', other)
  refusal(lambda: run_lib.run(config, folder), folder, 'num_layers')


@pytest.mark.parametrize('mesh', [{}, {'fsdp': 2}])
def test_a_resume_never_holds_two_states(tmp_path, monkeypatch, mesh):
  config, optimizer, _ = tiny_step.setup(ema_decay=0.5)
  config.mesh.update(mesh)
  on = sharding.make_mesh(config.mesh)

  def fresh():
    params = parameters.init(tiny_step.CFG, jax.random.key(1))
    return state_lib.init_state(
      tiny_step.CFG, params, config, optimizer, jax.random.key(2), on
    )

  def alive():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())

  saved = fresh()
  saved = dataclasses.replace(saved, step=saved.step + 3)
  with checkpoint.open_manager(tmp_path, 1) as manager:
    checkpoint.save(manager, saved, 7, {})
    checkpoint.wait(manager)
    want, others = jax.device_get(saved.trained), alive()
    new = fresh()
    real, most = checkpoint._read, []
    monkeypatch.setattr(
      checkpoint, '_read', lambda *a, **k: most.append(alive()) or real(*a, **k)
    )
    restored, data = checkpoint.restore(manager, new, {})
  size = sum(x.nbytes for x in jax.tree.leaves(new))
  assert most[-1] <= others + 1000 < others + size
  assert (restored.at, data) == (3, 7)
  jax.tree.map(np.testing.assert_array_equal, want, restored.trained)
  for a, b in zip(*map(jax.tree.leaves, (saved, restored)), strict=True):
    assert a.sharding == b.sharding


def test_other_data_is_refused(debug_config, tmp_path):
  data = tmp_path / 'data'
  for split, n in (('train', 40), ('valid', 5)):
    (data / split).mkdir(parents=True)
    name = f'{split}/{split}.en-fr.tsv'
    text = (corpus.SAMPLE / name).read_text(encoding='utf-8')
    lines = text.splitlines(keepends=True)[:n]
    (data / name).write_text(''.join(lines), encoding='utf-8')
  debug_config.data.source = str(data)

  def go_on():
    run_lib.run(debug_config, tmp_path / 'w')

  def change(split, at):
    path = data / split / f'{split}.en-fr.tsv'
    lines = path.read_text('utf-8').splitlines(keepends=True)
    lines[at] = lines[at].swapcase()
    path.write_text(''.join(lines), encoding='utf-8')
    return path

  debug_config.train.max_steps = 1
  go_on()
  change('valid', 0)  # Nothing is compared by it yet.
  debug_config.eval.translate_every, debug_config.eval.chrf_pairs = 1, 2
  go_on()  # Step 1 has a chrF now, but its checkpoint is of before.
  debug_config.train.max_steps = 2
  go_on()
  change('valid', 2)  # Nor ever by this pair.
  go_on()
  change('valid', 1)
  refusal(go_on, 'step 2 belongs', 'the text of valid has changed')
  change('valid', 1)
  refusal(go_on, change('train', 0), 'has changed')


def _started(folder, config):
  """As if a run had got to its first checkpoint."""
  run_folder.claim(folder, config)
  (folder / 'checkpoints' / 'step_1').mkdir(parents=True)


def test_what_a_resume_may_change(debug_config, tmp_path):
  _started(tmp_path, debug_config)
  debug_config.data.max_bad_fraction, debug_config.train.max_skipped = 0.5, 3
  run_folder.claim(tmp_path, debug_config)
  debug_config.data.length += 1
  refusal(lambda: run_folder.claim(tmp_path, debug_config), 'data.length')


def test_a_run_of_a_gpu_goes_on_here_if_its_formats_are_asked_for(tmp_path):
  config = small.get_config()
  _started(tmp_path, machine.resolve(config, 'gpu', 'NVIDIA L4', 10**10))
  refusal(
    lambda: run_folder.claim(tmp_path, machine.here(config)),
    "train.dtype='bfloat16'",
    '--config.train.dtype=bfloat16',
  )
  config.train.update(dtype='bfloat16', frozen_dtype='bfloat16')
  run_folder.claim(tmp_path, machine.here(config))  # Remat and tiles are free.


def test_what_is_compared_by_chrf_stays_the_same(debug_config, tmp_path):
  config = debug_config
  config.eval.translate_every = 2
  _started(tmp_path, config)

  def again(**values):
    config.update_from_flattened_dict(
      {k.replace('_', '.', 1): v for k, v in values.items()}
    )
    run_folder.claim(tmp_path, config)

  again(eval_patience=3, eval_every=7, decode_batch_size=2)
  refusal(lambda: again(eval_chrf_pairs=1), tmp_path, 'eval.chrf_pairs=0')
  config.eval.chrf_pairs = 0
  refusal(lambda: again(decode_beam=2), tmp_path, 'decode.beam=1')
  config.decode.beam = 1
  # Where there is nothing to compare they may change.
  again(eval_translate_every=0)
  again(eval_chrf_pairs=1, decode_beam=2)
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0, "valid_chrf": 1.0}\n')  # Of no checkpoint.
  again(eval_chrf_pairs=2)
  # An earlier start has compared, whatever the last one did.
  path.write_text('{"step": 2, "valid_chrf": 1.0}\n')
  again(eval_translate_every=2)
  again(eval_translate_every=0)
  refusal(lambda: again(decode_beam=3), tmp_path, 'decode.beam=2')


@pytest.mark.parametrize('which', ['', '@6', '@best'])
def test_a_folder_to_begin_with_is_found_from_elsewhere(
  debug_config, tmp_path, monkeypatch, which
):
  other = tmp_path / 'other'
  other.mkdir()
  for folder, path in ((tmp_path, 'other'), (other, '../other')):
    monkeypatch.chdir(folder)
    debug_config.weights.warm_start = path + which
    found = run_folder.absolute(debug_config).weights.warm_start
    assert found == f'{other}{which}'


def test_knobs_that_are_no_more_are_passed_over(debug_config, tmp_path):
  _started(tmp_path, debug_config)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  config['data'] |= {'workers': 2, 'max_wait': 9.0}
  path.write_text(json.dumps(config))
  assert run_folder.read_config(tmp_path) == debug_config
  run_folder.claim(tmp_path, debug_config)
