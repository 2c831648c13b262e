"""Every shipped config fits its machine, all of its run, by its compiler."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from mt.train import programs

pytestmark = [
  pytest.mark.accelerators,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('libtpu', 'jax_cuda13_plugin'))),
    reason='the compilers of accelerators are missing: make test-accelerators',
  ),
]

ROOT = pathlib.Path(__file__).parents[2]

# Config -> the machine that its docstring names.
MACHINES = {
  'gemma3_270m': 'l4',  # Of a CPU: it fits any card.
  'gemma3_270m_gpu': 'l4',
  'tutorial': 'a100',
  'gemma3_1b_rtx4090': 'rtx4090',
  'gemma3_4b_lora_rtx4090': 'rtx4090',
  'gemma3_1b_h100': 'h100',
  'gemma3_4b_h100': 'h100',
  'gemma3_12b_lora_h100': 'h100',
  'gemma3_12b_8xh100': 'h100:8',
  'gemma3_27b_8xh100': 'h100:8',
  'gemma3_12b_lora_v5e8': 'v5e:2x4',
  'gemma3_27b_lora_v5e8': 'v5e:2x4',
  'gemma3_4b_v6e8': 'v6e:2x4',
  'gemma3_27b_lora_v6e8': 'v6e:2x4',
  'gemma3_12b_v5p8': 'v5p:2x2x2',
  'gemma3_27b_v5p32': 'v5p:2x4x4',
}


def test_each_config_has_a_machine():
  shipped = {p.stem for p in (ROOT / 'configs').glob('*.py')}
  assert shipped - {'default', 'knobs', 'large', 'debug'} == set(MACHINES)


@pytest.mark.parametrize('name', MACHINES)
def test_a_config_fits_its_machine_with_a_tenth_to_spare(name):
  done = subprocess.run(
    [
      sys.executable,
      'train.py',
      f'--config=configs/{name}.py',
      '--plan',
      f'--on={MACHINES[name]}',
      '--json',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)
  assert plan['target'] == MACHINES[name] and not plan['guess']
  found = [p['name'] for p in plan['programs']]
  assert found == [*programs.TRAINING, *programs.DECODING]
  assert all(p['seconds'] > 0 for p in plan['programs'])
  assert plan['fits'], done.stderr
  kinds = {p['name']: p['bytes_by_kind'] for p in plan['programs']}
  step, weights = kinds['decode_step'], kinds['decode_weights']['decoding']
  cache = step['decoding'] - weights
  assert step['temporary'] < cache, 'a second cache, of another order'
