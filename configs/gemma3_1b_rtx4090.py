"""Gemma 3 1B, all weights, on one GPU of 24 GB."""

from configs import large


def get_config():
  c = large.make_config('1b', 'all')
  c.train.batch_size = 16
  return c
