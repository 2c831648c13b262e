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
  'gemma3_12b_qlora_rtx4090': 'rtx4090',
  'gemma3_1b_h100': 'h100',
  'gemma3_4b_h100': 'h100',
  'gemma3_12b_lora_h100': 'h100',
  'translategemma_4b_lora_rtx4090': 'rtx4090',
  'translategemma_12b_lora_h100': 'h100',
  'gemma3_27b_qlora_h100': 'h100',
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


def _compiled(on, *knobs, program='train_step'):
  """What tests/fixtures/compile_step.py prints of the 270M, one row of 128."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tests.fixtures.compile_step', on, program),
      *('weights.size=gemma3_270m', 'train.parts=all', 'train.batch_size=1'),
      *('data.length=128', 'train.loss_chunk=128', *knobs),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('on', ['h100', 'v5e:1x1'])
def test_a_step_does_not_copy_its_state(on):
  bytes_ = _compiled(on)['bytes']
  # What else there is: the embedding and a chunk's logits in bfloat16.
  vocabulary, width, chunk = 262_144, 640, 128
  rest = 2 * vocabulary * (width + chunk)
  gradients = bytes_['gradients']
  assert gradients + bytes_['temporary'] < 1.1 * (gradients + rest)


@pytest.mark.parametrize(
  'on, kernel',
  [
    ('h100', 'mosaic_gpu'),
    ('rtx4090', 'triton'),
    ('a100', 'triton'),
    ('v6e:1x1', 'splash'),
  ],
)
def test_attention_is_the_fused_kernel(on, kernel):
  found = _compiled(on, 'data.length=512')
  # Forward, twice, backward.
  assert sum(kernel in name for name in found['opaque']) >= 3
  # Its products have heads as axes: see model.dense_of_heads.
  to_heads = any('bli,ino->bnlo' in name for name in found['kernels'])
  assert to_heads == (kernel == 'splash')


def test_a_mesh_of_tpus_gathers_weights_before_their_product():
  """XLA's default is a product for each part, which is sent on (4B or more)."""
  knobs = 'weights.size=gemma3_4b', 'mesh.fsdp=8', 'train.batch_size=64'
  kernels = _compiled('v6e:2x4', *knobs, 'data.length=512')['kernels']
  sent_on = [k for k in kernels if k.startswith('collective-permute')]
  assert any(k.startswith('all-gather') for k in kernels)
  assert len(sent_on) < 10, len(sent_on)


def test_a_soft_cap_takes_what_has_its_gradient():
  knobs = 'weights.size=gemma2_2b', 'train.parts=lora'
  assert _compiled('h100', *knobs)['opaque']
  assert not _compiled('rtx4090', *knobs)['opaque']


@pytest.mark.parametrize('on', ['h100', 'v6e:1x1'])
def test_a_token_is_decoded_without_a_loop_over_rows(on):
  """A TPU's compiler makes one of writing each row into its own slot."""
  assert _compiled(on, program='decode_step')['times'] == 1
