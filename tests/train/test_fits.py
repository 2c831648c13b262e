"""Refused before anything is read: what cannot fit into memory."""

import pytest

from mt.data import splits
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import plan
from mt.train import programs
from mt.train import run as run_lib
from tests.fixtures.refusal import refusal


@pytest.mark.parametrize(
  'parts, remat, name',
  [
    ('all', 'none', 'adamw'),
    ('all', 'narrow', 'sgd'),
    pytest.param('lora', 'full', 'sgd', marks=pytest.mark.heavy),
  ],
)
def test_it_is_less_than_a_compiled_step_takes(
  debug_config, parts, remat, name
):
  debug_config.train.parts, debug_config.train.remat = parts, remat
  debug_config.optim.name = name
  target = plan.here(debug_config.mesh)
  (made,) = programs.compile_run(debug_config, target, ('train_step',))
  whole = made.bytes['total']
  least = plan.needed(sizes.SIZES['debug'], debug_config, None)
  assert 0.2 * whole < least <= whole


def test_what_there_is(tmp_path):
  plain = plan.available(tmp_path)
  assert plain > 0

  def write(**texts):
    for name, text in texts.items():
      (folder / f'memory.{name}').write_text(f'{text}\n')

  folder = tmp_path
  write(max='max', current=5, stat='anon 5\ninactive_file 0\nactive_file 3')
  assert plan.available(tmp_path) > 1000
  write(current=805, max=8805)
  assert plan.available(tmp_path) == 1000  # Of each of eight devices.
  # What was read from files and can be dropped is free.
  write(current=1005, stat='anon 805\ninactive_file 200\nactive_file 3')
  assert plan.available(tmp_path) == 1000
  folder = tmp_path / 'memory'
  folder.mkdir()
  write(
    limit_in_bytes=4000,
    usage_in_bytes=80,
    stat='inactive_file 7\ntotal_inactive_file 80',
  )
  assert plan.available(tmp_path) == 500


def test_what_cannot_fit_is_refused_with_what_would_help(
  debug_config, tmp_path, monkeypatch
):
  read = []
  monkeypatch.setattr(splits, 'read', lambda *args: read.append(args))
  monkeypatch.setattr(plan, 'available', lambda: 10_000_000)
  debug_config.train.batch_size = 64
  cfg = sizes.SIZES['debug']
  need = plan.needed(cfg, debug_config, None)
  assert need > 10_000_000
  debug_config.train.micro_batches = 64
  less = plan.needed(cfg, debug_config, None)
  debug_config.train.micro_batches = 1
  refusal(
    lambda: run_lib.run(debug_config, tmp_path),
    f'needs {need / 1e9:.1f} GB',
    f'train.micro_batches=64 (saves {(need - less) / 1e9:.1f} GB)',
    'train.remat=full (saves',
    'train.parts=lora (saves',
  )
  assert not read


def test_a_device_holds_the_activations_of_its_own_rows(debug_config):
  cfg = sizes.SIZES['debug']

  def of_rows(mesh):
    debug_config.train.batch_size = 16
    twice = plan.needed(cfg, debug_config, mesh)
    debug_config.train.batch_size = 8
    return twice - plan.needed(cfg, debug_config, mesh)

  debug_config.mesh.data, debug_config.mesh.fsdp = 2, 4
  assert of_rows(sharding.make_mesh(debug_config.mesh)) * 8 == of_rows(None)
