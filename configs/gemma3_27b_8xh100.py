"""Gemma 3 27B, all weights, on eight H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_config('27b', 'all')
  c.train.batch_size = 32
  c.mesh.fsdp = 8
  return c
