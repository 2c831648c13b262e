"""configs/debug.py cut down to seconds: tiny rows, few sentences."""

from configs import debug


def get_config():
  c = debug.get_config()
  c.data.length = 128
  c.train.max_steps = 6
  c.train.batch_size = 2
  c.eval.every = 3
  c.eval.loss_pairs = 4
  c.eval.translate_every = c.eval.chrf_pairs = c.eval.patience = 0
  c.eval.minitrain_pairs = -1
  c.eval.translate_pairs = 3
  c.decode.max_ratio = 0.1
  c.checkpoint.every = 2
  return c
