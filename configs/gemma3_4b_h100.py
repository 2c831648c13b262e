"""Gemma 3 4B, all weights, on one H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_config('4b', 'all')
  c.train.batch_size = 32
  return c
