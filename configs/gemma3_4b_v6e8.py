"""Gemma 3 4B, all weights, on a v6e-8: 8 TPUs of 32 GB."""

from configs import large


def get_config():
  c = large.make_config('4b', 'all')
  c.train.batch_size = 64
  c.mesh.fsdp = 8
  return c
