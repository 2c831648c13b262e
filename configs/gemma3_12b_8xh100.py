"""Gemma 3 12B, all weights, on eight H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_config('12b', 'all')
  c.train.batch_size = 64
  c.mesh.fsdp = 8
  return c
