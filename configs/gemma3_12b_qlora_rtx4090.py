"""Gemma 3 12B, LoRA over 4-bit weights, on one GPU of 24 GB."""

from configs import large


def get_config():
  c = large.make_config('12b', 'lora')
  c.train.frozen_dtype = 'int4'
  c.train.batch_size = 16
  c.train.micro_batches = 2
  c.decode.batch_size = 8
  return c
