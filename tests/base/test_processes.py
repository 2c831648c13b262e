"""Two real processes on one machine: one run, whoever starts or dies."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mt.base import processes
from mt.train import manifest
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]


def _start(workdir, processes, *flags):
  """Processes of one run, each with two devices."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  started = []
  for i in range(processes):
    of_several = [f'--coordinator={address}', f'--processes={processes}']
    command = [
      sys.executable,
      str(ROOT / 'train.py'),
      f'--config={ROOT}/configs/debug.py',
      f'--workdir={workdir}',
      *(of_several + [f'--process={i}'] if processes > 1 else []),
      '--config.data.length=128',
      '--config.eval.translate_pairs=2',
      '--config.eval.loss_pairs=4',
      '--config.eval.every=2',
      '--config.eval.translate_every=2',
      '--config.checkpoint.every=2',
      '--config.decode.max_ratio=0.1',
      *flags,
    ]
    flags_of_xla = '--xla_force_host_platform_device_count=2'
    started.append(
      subprocess.Popen(
        command,
        env=os.environ | {'XLA_FLAGS': flags_of_xla},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def _run(workdir, processes, *flags):
  started = _start(workdir, processes, *flags)
  outs = [p.communicate(timeout=600) for p in started]
  for p, (_, err) in zip(started, outs, strict=True):
    assert p.returncode == 0, err
  return [out for out, _ in outs]


def _numbers(workdir, *kinds):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  lines = [json.loads(x) for x in lines]
  return {
    (x['step'], kind): x[kind] for x in lines for kind in kinds if kind in x
  }


def test_two_processes_are_one_run(tmp_path):
  """From one to two, and from two to one, in the middle of a run."""
  one, two = ('--config.mesh.data=1',), ('--config.mesh.fsdp=2',)
  steps = '--config.train.max_steps='
  whole, workdir = tmp_path / 'whole', tmp_path / 'changing'
  _run(whole, 1, *one, steps + '6')
  _run(workdir, 1, *one, steps + '2')
  outs = _run(workdir, 2, *two, '--config.mesh.data=-1', steps + '4')
  assert 'data 2 x fsdp 2' in outs[0] and '2 processes' in outs[0]
  # Process 0 speaks for both; the other's lines are Gloo's own.
  assert 'step' in outs[0] and 'step' not in outs[1]
  assert 'resumed' in outs[0] and 'valid chrf' in outs[0]
  scored = json.loads((workdir / 'scores.json').read_text())['valid']
  curve = _numbers(workdir, 'valid_chrf')
  chosen = max((chrf, at) for (at, _), chrf in curve.items() if at)[1]
  assert scored['after']['step'] == chosen
  assert f'best: step {chosen} of 4' in outs[0] and 'best' not in outs[1]
  assert 'resumed' in _run(workdir, 1, *one, steps + '6')[0]
  kinds = 'loss', 'valid_loss', 'minitrain_loss'
  want, got = _numbers(whole, *kinds), _numbers(workdir, *kinds)
  assert len(want) == 6 + 4 + 4 and got.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=str(key))


def test_the_first_process_decides():
  """A third is no float32, and what the other process has does not matter."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  code = (
    'import sys; from mt.base import processes as d; i = int(sys.argv[1]); '
    f'd.start({address!r}, 2, i); '
    'print("got", d.broadcast_from_first(1 / 3 + i), '
    'd.agree(i == 0), d.agree(i == 1), '
    '*(int(d.largest(x)) for x in (3 + i, 9 - i, 0)))'
  )
  started = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(i)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in started:
    out, _ = process.communicate(timeout=300)
    assert f'got {1 / 3} True False 4 9 0' in out


@pytest.mark.parametrize('lost', [pytest.param(0, marks=pytest.mark.heavy), 1])
def test_if_one_dies_the_other_ends(tmp_path, lost):
  many = '--config.train.max_steps=100000'
  started = _start(tmp_path, 2, '--config.mesh.data=-1', many)
  path = tmp_path / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not (path.exists() and '"step": 3,' in path.read_text()):
    assert time.monotonic() < deadline
    assert all(p.poll() is None for p in started), started[0].stderr.read()
    time.sleep(0.05)
  started[lost].send_signal(signal.SIGKILL)
  _, err = started[1 - lost].communicate(timeout=60)
  assert started[1 - lost].returncode != 0
  assert 'error' in err.lower() or 'terminat' in err.lower()
  started[lost].communicate()


@pytest.mark.heavy
@pytest.mark.parametrize('asked', [0, 1])
def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path, asked):
  many = ('--config.mesh.data=-1', '--config.train.max_steps=100000')
  rare = ('--config.checkpoint.every=50000', '--config.eval.every=50000')
  started = _start(tmp_path, 2, *many, *rare)
  path = tmp_path / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not (path.exists() and '"step": 3,' in path.read_text()):
    assert time.monotonic() < deadline
    assert all(p.poll() is None for p in started), started[0].stderr.read()
    time.sleep(0.05)
  started[asked].send_signal(signal.SIGTERM)
  errs = [p.communicate(timeout=120)[1] for p in started]
  assert [p.returncode for p in started] == [143, 143], errs
  steps = {re.search(r'at step (\d+), which is saved', e)[1] for e in errs}
  saved = manifest.steps(tmp_path / 'checkpoints')
  assert {int(x) for x in steps} == {saved[-1]}


@pytest.mark.parametrize(
  'flags, env, words',
  [
    (('', 2, -1), {}, ('--coordinator', '--processes=2')),
    (('127.0.0.1:1', 0, -1), {}, ('--process=-1', '--processes=0')),
    (('127.0.0.1:1', 2, 2), {}, ('--process=2', '--processes=2')),
    (('127.0.0.1:1', 2, -1), {'JAX_PROCESS_ID': '2'}, ('--process=2',)),
    (('127.0.0.1:1', 2, -1), {'JAX_PROCESS_ID': 'x'}, ('JAX_PROCESS_ID',)),
    (('', 0, -1), {'JAX_COORDINATOR_ADDRESS': 'h:1'}, ('--processes=0',)),
  ],
)
def test_incomplete_addresses_are_refused(monkeypatch, flags, env, words):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  refusal(lambda: processes.start(*flags), *words)


def test_a_single_process_needs_nothing():
  processes.start('', 0, -1)
  assert processes.is_first() and processes.agree(True)
  assert processes.first_then_others(lambda: 3) == 3
