"""Gemma 3 27B, LoRA, on a v6e-8: 8 TPUs of 32 GB."""

from configs import large


def get_config():
  c = large.make_config('27b', 'lora')
  c.train.batch_size = 64
  c.mesh.fsdp = 8
  return c
