"""What the configs for GPUs and TPUs have in common; none by itself.

What follows the machine (formats, remat, chunks and tiles) is `auto`. That all
of a run fits, with a tenth of the memory to spare, a test asks the machine's
own compiler; learning rates are customary.
"""

import ml_collections

from configs import default


def make_config(size: str, parts: str) -> ml_collections.ConfigDict:
  """Gemma 3 of a size (1b, 4b, 12b, 27b) on packed rows of 512 tokens."""
  c = default.get_config()
  c.weights.source = f'kaggle:google/gemma-3/flax/gemma3-{size}'
  c.weights.size = f'gemma3_{size}'
  c.data.length = 512
  c.train.parts = parts
  c.mesh.data = 1
  c.optim.learning_rate = 2e-4 if parts == 'lora' else 1e-5
  c.optim.schedule = 'cosine'
  c.optim.warmup_steps = 50
  c.eval.minitrain_pairs = 200
  c.eval.translate_every = 250
  c.eval.chrf_pairs = 200
  return c


def make_translategemma(size: str) -> ml_collections.ConfigDict:
  """LoRA of TranslateGemma (4b, 12b, 27b; arXiv 2601.09012).

  It is Gemma 3, trained to translate, with a prompt of its own. Some languages
  have codes of their own in it: zh_Hans, not zh_CN.
  """
  c = make_config(size, 'lora')
  c.weights.source = f'hf:google/translategemma-{size}-it'
  c.template.prompt = 'translategemma'
  c.template.chat = True
  c.template.target_prefix = ''
  return c
