"""Gemma 3 4B, LoRA over bfloat16 weights, on one GPU of 24 GB."""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'kaggle:google/gemma-3/flax/gemma3-4b'
  c.weights.size = 'gemma3_4b'
  c.data.length = 512
  c.train.batch_size = 32
  c.train.loss_chunk = 1024
  c.train.loss_tile = 16384
  c.train.micro_batches = 4
  c.train.dtype = 'bfloat16'
  c.train.frozen_dtype = 'bfloat16'
  c.train.remat = 'full'
  c.mesh.data = 1
  c.optim.learning_rate = 2e-4
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 50
  c.eval.minitrain_pairs = 200
  c.eval.translate_every = 250
  c.eval.chrf_pairs = 200
  return c
