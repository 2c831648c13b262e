"""Useful FLOPs, against loops over positions; peaks of devices."""

import types

import jax
import numpy as np
import pytest

from mt.gemma import parameters
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import step
from mt.train import usage
from tests.benchmarks import table
from tests.fixtures import tiny_step


def _seen_pairs(cfg, batch):
  """Of a query and a key in all layers, counted one by one."""
  count = 0
  for row in range(len(batch['tokens'])):
    segments = batch['segment_ids'][row]
    for layer in range(cfg.num_layers):
      local = cfg.attention[layer % len(cfg.attention)] == 'L'
      for q in np.flatnonzero(segments):
        for k in range(q + 1):
          near = not local or q - k < cfg.window
          count += segments[k] == segments[q] and near
  return count


@pytest.mark.parametrize('parts', ['all', 'lora'])
def test_useful_flops(parts):
  cfg = tiny_step.CFG
  _, _, state = tiny_step.setup(parts)
  batch = tiny_step.make_batch(b=2)
  at = np.arange(batch['tokens'].shape[1])
  batch['segment_ids'][0, at >= 18] = 2
  batch['positions'][0, at >= 18] -= 18
  tokens, targets_ = batch['segment_ids'] > 0, batch['target_mask']
  pairs = [(range(tokens.sum() - targets_.sum()), range(targets_.sum()))]
  want = table.useful_flops(cfg, pairs, parts == 'lora')
  factors = sum(x.size for k, x in state.trained.items() if '_lora_' in k)
  want += 6 * factors * tokens.sum()
  seen = _seen_pairs(cfg, batch)
  assert seen < cfg.num_layers * sum((batch['positions'] + 1)[tokens])
  want += 3 * 2 * 2 * cfg.num_heads * cfg.head_dim * seen
  got = jax.jit(lambda *x: usage.useful_flops(cfg, *x))(state.trained, batch)
  assert float(got) == pytest.approx(want, rel=1e-6)


def test_a_frozen_embedding_has_no_gradient_of_its_own():
  cfg, batch = tiny_step.CFG, tiny_step.make_batch()
  shapes = parameters.shapes(cfg).items()
  trained = {k: np.zeros(shape, bool) for k, shape in shapes}
  whole = usage.useful_flops(cfg, trained, batch)
  less = 2 * trained.pop('embedding').size * batch['target_mask'].sum()
  assert float(whole - usage.useful_flops(cfg, trained, batch)) == less


def test_layers_under_a_norm_that_alone_is_trained_have_no_backward():
  cfg, batch = tiny_step.CFG, tiny_step.make_batch()
  batch['target_mask'][:] = False  # All but the output layer.
  forward = 2 * table.numbers_of(cfg, 'layers/') * batch['segment_ids'].sum()
  seen = 2 * 2 * cfg.num_heads * cfg.head_dim * _seen_pairs(cfg, batch)
  for paths, want in (
    (('final_norm',), forward + seen),
    (('final_norm', 'embedding'), 2 * forward + 3 * seen),
  ):
    trained = dict.fromkeys(paths, np.zeros(1))
    assert float(usage.useful_flops(cfg, trained, batch)) == pytest.approx(want)


@pytest.mark.parametrize(
  'kind, dtype, peak',
  [
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12),
    ('NVIDIA H100 80GB HBM3', 'float32', 494.5e12),  # TF32.
    ('TPU v6 lite', 'float32', 918e12),  # Passes of bfloat16.
    ('cpu', 'float32', None),
  ],
)
def test_peaks_are_known_of_known_devices(monkeypatch, kind, dtype, peak):
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert usage.peak_flops(dtype, None) == peak
  mesh = types.SimpleNamespace(size=4)
  assert usage.peak_flops(dtype, mesh) == (peak and 4 * peak)


def test_what_a_step_used():
  metrics = {'targets': 10.0, 'tokens': 30.0, 'useful_flops': 6e12}
  rates = {'targets_per_s': 5.0, 'tokens_per_s': 15.0}
  assert usage.of_step(metrics, 2.0, None) == rates  # A CPU has no peak.
  assert usage.of_step(metrics, 2.0, 10e12) == rates | {'mfu': 0.3}


def test_memory_of_a_device(monkeypatch):
  stats = {'bytes_in_use': 2 * 10**9, 'peak_bytes_in_use': 3 * 10**9}
  for found, want in (
    (None, {}),
    (stats, {'memory_gb': 2.0, 'peak_memory_gb': 3.0}),
  ):
    device = types.SimpleNamespace(memory_stats=lambda found=found: found)
    monkeypatch.setattr(jax, 'local_devices', lambda d=device: [d])
    assert usage.device_memory() == want


def test_a_step_tells_its_learning_rate():
  config, optimizer, state = tiny_step.setup(
    train={'max_steps': 4}, schedule='linear', learning_rate=0.5
  )
  schedule = optimizer_lib.make_schedule(config.optim, 4)
  train_step = step.make_train_step(tiny_step.CFG, config, optimizer)
  for done in range(2):
    state, metrics = train_step(state, tiny_step.make_batch())
    assert float(metrics['learning_rate']) == float(schedule(done)) > 0


def test_precision_is_that_of_the_config():
  config, optimizer, state = tiny_step.setup()
  batch = tiny_step.make_batch()
  for precision in ('highest', 'default'):
    config.train.matmul_precision = precision
    machine.set_precision(config)
    made = step.make_train_step(tiny_step.CFG, config, optimizer)
    text = made.lower(state, batch).as_text()
    assert ('HIGHEST' in text) == (precision == 'highest')
