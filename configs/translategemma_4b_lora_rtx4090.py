"""TranslateGemma 4B, LoRA, on one GPU of 24 GB."""

from configs import large


def get_config():
  c = large.make_translategemma('4b')
  c.train.batch_size = 32
  c.train.micro_batches = 2
  return c
