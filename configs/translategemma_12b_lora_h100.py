"""TranslateGemma 12B, LoRA, on one H100 of 80 GB."""

from configs import large


def get_config():
  c = large.make_translategemma('12b')
  c.train.batch_size = 32
  return c
