"""Gemma 3 27B, LoRA over bfloat16 weights, on a v5e-8: 8 TPUs of 16 GB."""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'kaggle:google/gemma-3/flax/gemma3-27b'
  c.weights.size = 'gemma3_27b'
  c.data.length = 512
  c.train.batch_size = 16
  c.train.loss_chunk = 1024
  c.train.loss_tile = 16384
  c.train.dtype = 'bfloat16'
  c.train.frozen_dtype = 'bfloat16'
  c.train.remat = 'full'
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 4, 2
  c.optim.learning_rate = 2e-4
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 50
  c.eval.minitrain_pairs = 200
  c.eval.translate_every = 250
  c.eval.chrf_pairs = 200
  return c
