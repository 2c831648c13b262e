"""A tiny random model through every part of a run, in seconds."""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'random'
  c.weights.size = 'debug'
  c.data.length = 256
  c.train.max_steps = 20
  c.train.batch_size = 4
  c.train.parts = 'all'
  c.train.attention = 'xla'  # Its heads are too narrow for the kernels.
  c.train.loss_chunk = 16  # Compiled once; the default is in many sizes.
  c.optim.learning_rate = 1e-2
  c.mesh.data = 1
  c.eval.every = 10
  c.eval.loss_pairs = 16
  c.eval.minitrain_pairs = 8
  c.eval.translate_every = 5
  c.eval.chrf_pairs = 2
  c.eval.patience = 4  # More than there can be in 20 steps.
  c.eval.translate_pairs = 8
  c.decode.retry_ngram = 0  # A random model goes round in nearly all.
  c.checkpoint.every = 5
  c.log.every = 5
  return c
