"""Gemma 3 27B, all weights, on 32 TPUs v5p of 95 GB (a v5p-64)."""

from configs import large


def get_config():
  c = large.make_config('27b', 'all')
  c.data.length = 1024
  c.data.shards = 8  # Four TPUs a host.
  c.train.batch_size = 128
  c.mesh.fsdp = 32
  return c
