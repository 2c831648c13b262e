"""The tutorial: Gemma 2B-IT from Kaggle, on the short sentences of MTNT.

ai.google.dev/gemma/docs/core/jax_finetune, on one GPU of 40 GB. Accept Gemma's
licence at kaggle.com/models/google/gemma, make a token at kaggle.com/settings
and set KAGGLE_USERNAME and KAGGLE_KEY.
"""

from configs import default


def get_config():
  c = default.get_config()
  c.weights.source = 'kaggle:google/gemma/flax/2b-it'
  c.data.source = 'mtnt'
  c.data.tfds_quoting = True  # The tutorial reads MTNT through TFDS.
  c.data.length = 25  # One pair in eight is as short as that.
  c.data.packing = False
  c.template.prompt = 'Translate this into French:\n{source}\n'
  c.template.target_prefix = ''
  c.template.target_bos = True
  c.train.max_steps = 100
  c.train.batch_size = 1
  c.train.parts = 'all'
  c.mesh.data = 1
  c.optim.name = 'sgd'
  c.optim.learning_rate = 1e-4
  c.optim.clip_norm = 0.0
  c.eval.every = 20
  c.eval.loss_batches = 50
  c.eval.translate_pairs = 50  # Not in the tutorial, which has no scores.
  c.eval.texts = ('Hello, my name is Morgane.',)
  c.decode.max_extra = 100  # The tutorial's total_generation_steps.
  c.log.every = 100
  c.log.table = True
  return c
