"""Gemma 3 12B, LoRA, on a v5e-8: 8 TPUs of 16 GB."""

from configs import large


def get_config():
  c = large.make_config('12b', 'lora')
  c.train.batch_size = 32
  c.mesh.fsdp = 8
  return c
