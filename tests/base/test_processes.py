"""Two real processes on one machine: one run, whoever starts or dies."""

import os
import pathlib
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mt.base import processes
from mt.base import run_folder
from mt.train import machine
from mt.train import run as run_lib
from tests.fixtures import several
from tests.fixtures.refusal import refusal
from tests.runs import folders
from tests.runs import small

ROOT = pathlib.Path(__file__).parents[2]


def _start(*commands):
  """Each with two devices, compiled as here: see tests/conftest.py."""
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')
  return several.start(*commands, XLA_FLAGS=flags)


def _config(steps):
  config = small.get_config()
  config.train.max_steps, config.train.batch_size = steps, 4
  config.data.shards = 2
  config.eval.every = config.eval.translate_every = config.checkpoint.every = 1
  config.eval.translate_pairs, config.eval.minitrain_pairs = 2, 4
  return config


_PROCESS = """
import sys
import numpy as np
from mt.base import processes
address, workdir, i = *sys.argv[1:3], int(sys.argv[3])
processes.start(address, 2, i)
x = np.array([[i, -0.0, 1e-40]], np.float32)  # To the sign of a zero.
assert [y.hex() for y in map(bytes, processes.gather(x))] == [
    bytes(np.array([[j, -0.0, 1e-40]], np.float32)).hex() for j in range(2)]
print('got', processes.broadcast_from_first(1 / 3 + i),
      processes.agree(i == 0), processes.agree(i == 1),
      *(int(processes.largest(x)) for x in (3 + i, 9 - i, 0)))
from mt.train import run
from tests.base import test_processes
config = test_processes._config(2)
config.mesh.fsdp, config.mesh.data = 2, -1
run.run(config, workdir)
"""


def _two_processes(workdir):
  address = several.address()
  started = _start(
    *(['-c', _PROCESS, address, str(workdir), str(i)] for i in range(2))
  )
  return several.ends(started)


_AUTO = """
import sys
from mt.base import errors
from mt.base import processes
processes.start(sys.argv[1], 0, -1)
first = processes.is_first()
print('got', processes.broadcast_from_first(1 / 3 + first))
try:
  processes.check_same({'model': (1, 'x'), 'text': first, 'config': 2})
except errors.UserError as e:
  print(e)
"""


def _as_slurm(job, i):
  return {
    'SLURM_JOB_ID': str(job),
    'SLURM_STEP_NODELIST': '127.0.0.1',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(i),
    'SLURM_LOCALID': str(i),
  }


def _as_open_mpi(job, i):
  return {
    'OMPI_MCA_orte_hnp_uri': f'{job * 2**12}.0;tcp://127.0.0.1:1',
    'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': str(i),
    'OMPI_COMM_WORLD_LOCAL_RANK': str(i),
  }


@pytest.mark.parametrize('variables', [_as_slurm, _as_open_mpi])
def test_a_cluster_says_who_they_are(variables):
  """With --coordinator=auto, by the variables that a scheduler sets."""
  port = int(several.address().partition(':')[2])
  job = port % 2**12  # JAX makes a port of it.
  commands = ['-c', _AUTO, 'auto']
  started = [several.start(commands, **variables(job, i))[0] for i in range(2)]
  # Gloo speaks too.
  ends = several.ends(started)
  assert all(f'got {4 / 3}\n' in out for out in ends)
  # The same inputs are expected of both.
  refused = ['process 1 has another text than process 0' in out for out in ends]
  assert refused == [False, True]


@pytest.mark.parametrize('every', (0, 1))
def test_every_knob_is_compared(tmp_path, monkeypatch, every):
  """Those too that a resume may change: all must end at the same step.

  Until then processes ask each other the same, whatever their knobs are.
  """
  seen, asked_others = {}, []
  monkeypatch.setattr(processes, 'check_same', seen.update)
  monkeypatch.setattr(
    processes, 'agree', lambda x: bool(asked_others.append(x)) or x
  )
  config = machine.here(_config(1))
  config.eval.translate_every = every
  run, _ = run_lib.begin(config, tmp_path, None, 0.0)
  run.data.train.close()
  assert asked_others == [every > 0]
  compared, asked = seen['config'], run_folder.flat(config.to_dict())
  paths = {f'weights.{name}' for name in run_folder._PATHS}
  assert compared.keys() == asked.keys() - paths
  assert all(compared[k] == asked[k] for k in ('seed', 'train.max_steps'))
  assert seen['validation text'] == run.texts_of_chrf() != {}


def _numbers(workdir, *kinds):
  return {
    (line['step'], kind): line[kind]
    for line in folders.metrics(workdir)
    for kind in kinds
    if kind in line
  }


def test_two_processes_are_one_run(tmp_path, capsys):
  """From one to two, and from two to one, in the middle of a run."""
  whole, workdir = tmp_path / 'whole', tmp_path / 'changing'
  run_lib.run(_config(3), whole)
  run_lib.run(_config(1), workdir)
  first, second = _two_processes(workdir)
  # A third is no float32; what the other process has does not matter.
  for out in (first, second):
    assert f'got {1 / 3} True False 4 9 0' in out
  assert 'data 2 x fsdp 2' in first and '2 processes' in first
  # Process 0 speaks for both; the other's lines are Gloo's own.
  assert 'step' in first and 'step' not in second
  assert 'resumed' in first and 'valid chrf' in first
  curve = _numbers(workdir, 'valid_chrf')
  chosen = max((chrf, at) for (at, _), chrf in curve.items() if at)[1]
  assert folders.scores(workdir)['valid']['after']['step'] == chosen
  assert f'best: step {chosen} of 2' in first and 'best' not in second
  capsys.readouterr()
  run_lib.run(_config(3), workdir)
  assert 'resumed' in capsys.readouterr().out
  kinds = 'loss', 'valid_loss', 'minitrain_loss'
  want, got = _numbers(whole, *kinds), _numbers(workdir, *kinds)
  assert len(want) == 3 + 4 + 4 and got.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=str(key))


@pytest.fixture
def endless(tmp_path):
  """Two processes of train.py that have taken three steps, and their folder."""
  shared = (
    ROOT / 'train.py',
    f'--config={ROOT}/tests/runs/small.py',
    f'--workdir={tmp_path}',
    f'--coordinator={several.address()}',
    '--processes=2',
    '--config.mesh.data=-1',
    '--config.train.batch_size=4',
    '--config.train.max_steps=100000',
    '--config.eval.every=50000',
    '--config.checkpoint.every=50000',
  )
  started = _start(*([*shared, f'--process={i}'] for i in range(2)))
  path = tmp_path / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not (path.exists() and '"step": 3,' in path.read_text()):
    assert time.monotonic() < deadline
    assert all(p.poll() is None for p in started), started[0].stderr.read()
    time.sleep(0.05)
  yield started, tmp_path
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.heavy
@pytest.mark.parametrize('lost', [0, 1])
def test_if_one_dies_the_other_ends(endless, lost):
  started, _ = endless
  started[lost].send_signal(signal.SIGKILL)
  _, err = started[1 - lost].communicate(timeout=60)
  assert started[1 - lost].returncode != 0
  assert 'error' in err.lower() or 'terminat' in err.lower()


@pytest.mark.heavy
@pytest.mark.parametrize('asked', [0, 1])
def test_a_signal_to_one_stops_both_at_the_same_step(endless, asked):
  started, workdir = endless
  started[asked].send_signal(signal.SIGTERM)
  errs = [p.communicate(timeout=120)[1] for p in started]
  assert [p.returncode for p in started] == [143, 143], errs
  steps = {re.search(r'at step (\d+), which is saved', e)[1] for e in errs}
  assert {int(x) for x in steps} == {folders.steps(workdir)[-1]}


@pytest.mark.parametrize(
  'flags, words',
  [
    (('', 2, -1), ('--coordinator', '--processes=2')),
    (('', 0, 1), ('--coordinator', '--process=1')),
    (('127.0.0.1:1', 0, -1), ('--process=-1', '--processes=0')),
    (('127.0.0.1:1', 2, 2), ('--process=2', '--processes=2')),
  ],
)
def test_incomplete_addresses_are_refused(flags, words):
  refusal(lambda: processes.start(*flags), *words)


@pytest.mark.parametrize('full', [True, False])
def test_a_full_device_is_no_lost_process(monkeypatch, full):
  def fail():
    with processes.exit_if_peer_lost():
      if full:
        jnp.zeros(2**45).block_until_ready()
      raise jax.errors.JaxRuntimeError('UNAVAILABLE: connection closed')

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  words = ('is full', 'train.remat') if full else ('lost another', 'checkpoint')
  refusal(fail, 'process 0', *words)


def test_a_single_process_needs_nothing():
  processes.start('', 0, -1)
  assert processes.is_first() and processes.agree(True)
  assert processes.first_then_others(lambda: 3) == 3
