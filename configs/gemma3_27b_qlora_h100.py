"""Gemma 3 27B, LoRA over 4-bit weights, on one H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_config('27b', 'lora')
  c.train.frozen_dtype = 'int4'
  c.train.batch_size = 32
  return c
