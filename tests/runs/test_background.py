"""What the loop does not wait for: transfers, and checkpoints being written."""

import asyncio
import threading
import time

import jax
from jax._src import array
import jax.numpy as jnp
import numpy as np
import pytest

from mt.base import errors
from mt.train import checkpoint
from mt.train import loop
from mt.train import manifest
from mt.train import plan
from mt.train import run as run_lib
from mt.train import state as state_lib
from tests.runs import folders


def test_no_transfer_is_implicit(debug_config, tmp_path, monkeypatch):
  """Nor is a number asked of an array: of a CPU's, the guard lets that pass."""
  real = loop.train

  def refuse(*_):
    raise AssertionError('a number is fetched')

  def guarded(*args):
    with jax.transfer_guard('disallow'), monkeypatch.context() as patch:
      for name in ('__float__', '__int__', '__bool__', '__index__', 'item'):
        patch.setattr(array.ArrayImpl, name, refuse)
      return real(*args)

  monkeypatch.setattr(loop, 'train', guarded)
  debug_config.log.profile = (2, 3)
  debug_config.train.max_steps = 4
  run_lib.run(debug_config, tmp_path)
  lines = folders.metrics(tmp_path)
  assert [m['step'] for m in lines if 'learning_rate' in m] == [1, 2, 3, 4]
  traces = (tmp_path / 'tensorboard' / 'plugins' / 'profile').glob('*/*.pb')
  (trace,) = traces
  # Of two steps; XProf is not here to read it.
  assert trace.read_bytes().count(b'jit_train_step') >= 2


@pytest.fixture
def state():
  names = 'step', 'skipped', 'skipped_in_a_row'
  counts = {name: jnp.int32(0) for name in names}
  arrays = {
    f'layers/{i}': jnp.full((512, 512), i, jnp.float32) for i in range(4)
  }
  return state_lib.TrainState(
    trained=arrays, frozen={}, opt_state=(), ema={}, **counts
  )


def _take_step(state):
  return jax.tree.map(lambda x: x + 1, state)


_step = jax.jit(_take_step, donate_argnums=0)


@pytest.fixture
def gate(monkeypatch):
  """No folder of a checkpoint is made before this is set."""
  opened, real = threading.Event(), manifest.TemporaryPath.create

  async def create(self):
    await asyncio.to_thread(opened.wait)
    return await real(self)

  monkeypatch.setattr(manifest.TemporaryPath, 'create', create)
  opened.set()
  return opened


def _save(manager, state):
  checkpoint.save(manager, state, {'batches_taken': state.at}, {'version': 2})


def test_a_step_goes_on_while_a_checkpoint_is_written(state, gate, tmp_path):
  """It has the numbers of its step, and the one before stands till then."""
  manager = checkpoint.open_manager(tmp_path, 1)
  with checkpoint.finished(manager):
    state = _step(state)
    _save(manager, state)
    checkpoint.wait(manager)
    gate.clear()
    state = _step(state)
    want = jax.tree.map(np.array, state.trained)
    _save(manager, state)
    places = []
    for _ in range(3):
      arrays = state.trained.values()
      places.append({x.unsafe_buffer_pointer() for x in arrays})
      state = _step(state)
    checkpoint.check_written(manager)
    before = manifest.steps(tmp_path / 'checkpoints')
    gate.set()
  assert places[0] == places[1] == places[2]  # What was saved is written over.
  assert before == [1]
  assert manifest.steps(tmp_path / 'checkpoints') == [2]
  found = folders.arrays(tmp_path)
  for name, x in want.items():
    np.testing.assert_array_equal(found[name], x)


def test_what_fails_in_the_background_is_said(state, tmp_path, monkeypatch):
  manager = checkpoint.open_manager(tmp_path, 2)
  state = _step(state)
  _save(manager, state)
  checkpoint.wait(manager)

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manifest, 'write', full)
  _save(manager, _step(state))
  while manager.is_saving_in_progress():
    time.sleep(0.01)
  with pytest.raises(errors.ExitNow, match=r'cannot save step 2 .*No space'):
    checkpoint.check_written(manager)
  assert manager.latest_step() == 1
  folder = tmp_path / 'checkpoints'
  assert manifest.steps(folder) == [1]
  assert not manifest.damage(manifest.folder_of(folder, 1))


def test_without_memory_for_a_copy_the_write_is_waited_for(
  state, tmp_path, monkeypatch
):
  monkeypatch.setattr(plan, 'available', lambda: 0)
  with checkpoint.finished(checkpoint.open_manager(tmp_path)) as manager:
    _save(manager, state)
    assert not manager.is_saving_in_progress()
    assert manifest.steps(tmp_path / 'checkpoints') == [0]
