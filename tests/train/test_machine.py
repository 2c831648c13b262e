"""What is chosen for a machine, and what a run says of it."""

import importlib.util

import jax.numpy as jnp
import pytest

from configs import default
from mt.base import accelerator
from mt.gemma import fused
from mt.gemma import sizes
from mt.train import machine
from tests.fixtures.refusal import refusal

_KNOBS = ('dtype', 'frozen_dtype', 'remat', 'attention')


@pytest.fixture(autouse=True)
def with_tokamax(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)


def _chosen(*target, **given):
  config = default.get_config()
  config.train.update(given)
  train = machine.resolve(config, *target).train
  texts = tuple(train[k] for k in _KNOBS)
  return *texts, train.loss_chunk, train.loss_tile


@pytest.mark.parametrize(
  'target, expected',
  [
    (
      ('cpu', 'cpu', 0),
      ('float32', 'float32', 'none', 'xla', 576, 2048),
    ),
    (
      ('gpu', 'NVIDIA H100 80GB HBM3', 78 * 10**9),
      ('bfloat16', 'bfloat16', 'narrow', 'tokamax', 2048, -1),
    ),
    (
      ('gpu', 'NVIDIA GeForce RTX 4090', 23 * 10**9),
      ('bfloat16', 'bfloat16', 'narrow', 'tokamax', 2048, -1),
    ),
    (
      ('gpu', 'Tesla T4', 14 * 10**9),
      ('float32', 'bfloat16', 'narrow', 'xla', 2048, -1),
    ),
    (
      ('gpu', 'NVIDIA T1000 8GB', 7 * 10**9),
      ('float32', 'bfloat16', 'narrow', 'xla', 1024, -1),
    ),
    (
      ('gpu', 'NVIDIA RTX 2000 Ada Generation', 15 * 10**9),
      ('bfloat16', 'bfloat16', 'narrow', 'tokamax', 2048, -1),
    ),
    (
      ('tpu', 'TPU v6 lite', 32 * 10**9),
      ('bfloat16', 'bfloat16', 'full', 'splash', 4096, -1),
    ),
    (
      ('tpu', 'TPU v5 lite', 16 * 10**9),
      ('bfloat16', 'bfloat16', 'full', 'splash', 2048, -1),
    ),
  ],
)
def test_every_machine_has_its_own(target, expected):
  assert _chosen(*target) == expected


def test_what_is_said_is_taken():
  given = {'dtype': 'float32', 'remat': 'dots', 'loss_chunk': 8}
  chosen = _chosen('gpu', 'NVIDIA L4', 10**12, **given)
  assert chosen == ('float32', 'bfloat16', 'dots', 'xla', 8, -1)


def test_fused_attention_only_where_it_can_be(monkeypatch):
  config = default.get_config()
  config.data.length = 100  # No multiple of splash's blocks.
  made = machine.resolve(config, 'tpu', 'TPU v5 lite', 10**10)
  assert made.train.attention == 'xla'
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  made = machine.resolve(config, 'gpu', 'NVIDIA L4', 10**10)
  assert made.train.attention == 'xla'


def test_what_was_chosen_is_said(capsys):
  config = default.get_config()
  config.train.remat = 'full'
  made = machine.here(config)
  machine.say_chosen(config, made)
  assert config.train.dtype == 'auto'  # Not changed under its owner's hands.
  assert (made.train.dtype, made.train.remat) == ('float32', 'full')
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith('auto: ')
  assert set(line.split()[1:]) == {
    'dtype=float32',
    'frozen_dtype=float32',
    'attention=xla',
    'loss_chunk=576',
    'loss_tile=2048',
  }
  machine.say_chosen(made, machine.here(made))
  assert not capsys.readouterr().out


def test_a_run_of_a_gpu_is_read_in_its_formats():
  made = machine.resolve(default.get_config(), 'gpu', 'NVIDIA L4', 10**11)
  assert machine.here(made) == made


def test_layers_that_no_kernel_takes_are_said_once(capsys, monkeypatch):
  """Not by each of their stacks, in each program that is traced."""
  config, cfg = default.get_config(), sizes.SIZES['gemma4_e2b']
  segments = jnp.ones((1, 128), jnp.int32)

  def said(name):
    config.train.attention = name
    machine.say_attention(config, cfg)
    for stack in cfg.stacks():
      fused.make_attend(stack.cfg, name, segments)
    return capsys.readouterr().out

  start = 'note: attention is xla in '
  wide = 'layers with heads of 512: splash takes 256 at most'
  assert len([*cfg.stacks()]) > 2 and said('xla') == ''
  assert said('splash') == f'{start}{wide}\n'
  cfg = sizes.SIZES['gemma2_2b']
  monkeypatch.setattr(fused, '_has_mosaic', lambda: False)
  assert said('splash') == ''
  capped = 'all layers: tokamax has no gradient under a soft cap on this card'
  assert said('tokamax') == f'{start}{capped}\n'
  monkeypatch.setattr(fused, '_has_mosaic', lambda: True)
  assert said('tokamax') == ''


@pytest.mark.parametrize(
  'platform, given, words',
  [
    ('cpu', {'attention': 'tokamax'}, ('is for a GPU', 'this is a CPU')),
    ('gpu', {'attention': 'splash'}, ('is for a TPU', 'this is a GPU')),
    ('gpu', {'attention': 'tokamax', 'dtype': 'float32'}, ('bfloat16',)),
    ('tpu', {'attention': 'splash'}, ('multiple of 128', 'data.length=100')),
  ],
)
def test_attention_that_cannot_be_is_refused(platform, given, words):
  config = default.get_config()
  config.data.length = 100
  config.train.update({'dtype': 'bfloat16'} | given)
  refusal(
    lambda: machine.check_attention(config, platform),
    *(f'train.attention={given["attention"]}', *words),
  )


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_what_is_chosen_can_be(platform):
  config = default.get_config()
  for config.data.length in (100, 512):
    made = machine.resolve(config, platform, 'some kind', 10**11)
    machine.check_attention(made, platform)


def test_determinism_that_comes_too_late_is_refused(monkeypatch):
  config = default.get_config()
  config.train.deterministic = True
  monkeypatch.setenv('XLA_FLAGS', '')
  machine.check_deterministic(config, 'cpu')
  call = lambda: machine.check_deterministic(config, 'gpu')  # noqa: E731
  refusal(call, 'train.deterministic', '--xla_gpu_deterministic_ops=true')
  accelerator.set_deterministic()
  call()
