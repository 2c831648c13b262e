"""Gemma 3 1B, all weights, on one H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_config('1b', 'all')
  c.train.batch_size = 64
  return c
