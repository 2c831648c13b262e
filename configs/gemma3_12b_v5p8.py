"""Gemma 3 12B, all weights, on 8 TPUs v5p of 95 GB (a v5p-16)."""

from configs import large


def get_config():
  c = large.make_config('12b', 'all')
  c.data.length = 1024
  c.data.shards = 2  # Four TPUs a host.
  c.train.batch_size = 64
  c.mesh.fsdp = 8
  return c
