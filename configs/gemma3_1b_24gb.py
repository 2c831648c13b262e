"""Gemma 3 1B, all weights, on one GPU of 24 GB."""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'kaggle:google/gemma-3/flax/gemma3-1b'
  c.weights.size = 'gemma3_1b'
  c.data.length = 512
  c.train.parts = 'all'
  # No micro-batches: the sum of their gradients would take 4 GB more.
  c.train.batch_size = 8
  c.train.loss_chunk = 1024
  c.train.loss_tile = 16384
  c.train.dtype = 'bfloat16'
  c.train.remat = 'full'
  c.mesh.data = 1
  c.optim.learning_rate = 1e-5
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 50
  c.eval.minitrain_pairs = 200
  c.eval.translate_every = 250
  c.eval.chrf_pairs = 200
  return c
