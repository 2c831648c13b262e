"""On a machine with a GPU or TPU: a run there, and the same on the CPU."""

import os
import subprocess
import sys

import pytest

from mt.base import accelerator
from tests.runs import folders


@pytest.mark.skipif(
  accelerator.find() == 'cpu', reason='no GPU and no TPU is here'
)
def test_a_run_on_the_accelerator_learns_as_one_on_the_cpu(tmp_path):
  """Neither is told which formats to take; validation's losses agree."""
  losses = []
  for name, platform in (('there', {}), ('cpu', {'JAX_PLATFORMS': 'cpu'})):
    hidden = 'JAX_PLATFORMS', 'XLA_FLAGS'  # Those of the tests.
    env = {k: v for k, v in os.environ.items() if k not in hidden} | platform
    done = subprocess.run(
      [
        sys.executable,
        'train.py',
        '--config=tests/runs/small.py',
        f'--workdir={tmp_path / name}',
      ],
      cwd=folders.ROOT,
      env=env,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('machine: CPU') == (name == 'cpu')
    losses.append(folders.losses(tmp_path / name))
  there, cpu = losses
  assert there.keys() == cpu.keys()
  for step, loss in cpu.items():
    assert there[step] == pytest.approx(loss, rel=0.02)
