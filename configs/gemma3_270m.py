"""Gemma 3 270M on the bundled sample: what `make train` runs.

Five to six minutes on two CPU cores; BUILD_NOTES.md has the measurements.
"""

from configs import default


def get_config():
  c = default.get_config()
  c.train.max_steps = 110  # Of about five pairs each: 0.7 epochs.
  c.train.batch_size = 1
  c.mesh.data = 1  # One row, one device.
  c.optim.learning_rate = 1e-3
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 10
  c.eval.every = 55
  c.eval.loss_pairs = 32
  c.checkpoint.every = 20  # A second each.
  return c
