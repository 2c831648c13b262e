"""Gemma 3 27B, all weights, on a v5p-64: 32 TPUs of 95 GB."""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'kaggle:google/gemma-3/flax/gemma3-27b'
  c.weights.size = 'gemma3_27b'
  c.data.length = 1024
  c.train.parts = 'all'
  c.train.batch_size = 128
  c.train.loss_chunk = 1024
  c.train.loss_tile = 16384
  c.train.dtype = 'bfloat16'
  c.train.remat = 'full'
  c.mesh.data, c.mesh.fsdp = 1, 32
  c.optim.learning_rate = 1e-5
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 50
  c.eval.minitrain_pairs = 200
  c.eval.translate_every = 250
  c.eval.chrf_pairs = 200
  return c
