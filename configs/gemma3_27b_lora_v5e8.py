"""Gemma 3 27B, LoRA, on a v5e-8: 8 TPUs of 16 GB."""

from configs import large


def get_config():
  c = large.make_config('27b', 'lora')
  c.train.batch_size = 16
  c.mesh.fsdp = 4
  c.mesh.tensor = 2
  c.decode.batch_size = 8
  return c
