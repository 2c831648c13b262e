"""The side of google/tunix: its PeftTrainer, all weights.

Masks and loss are its own defaults. It does not pack: pairs in batches, each as
wide as the next multiple of 64, every width compiled before the clock runs.
"""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.gemma3 import model as model_lib
from tunix.models.gemma3 import params_safetensors
from tunix.sft import peft_trainer
from tunix.sft import utils

from tests.benchmarks.sides import side

_WIDTH, _PAD = 64, 0


class _Losses:
  """A metrics logger that keeps the mean loss of each step."""

  def __init__(self):
    self.found = []

  def log(self, prefix, name, value, mode, step):
    if name == 'loss':
      self.found.append(float(value))

  def close(self):
    pass


def _inputs(x):
  mask = x.input_tokens != _PAD
  return {
    'input_tokens': x.input_tokens,
    'input_mask': x.input_mask,
    'positions': utils.build_positions_from_mask(mask),
    'attention_mask': utils.make_causal_attn_mask(mask),
  }


def _batch(pairs, rows):
  width = max(len(p) + len(t) for p, t in pairs)
  shape = rows, -(-width // _WIDTH) * _WIDTH
  tokens, mask = np.full(shape, _PAD, np.int32), np.zeros(shape, bool)
  for row, (prompt, target) in enumerate(pairs):
    size = len(prompt) + len(target)
    tokens[row, :size] = prompt + target
    mask[row, len(prompt) : size] = True
  return peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask)


def _train(job):
  config = dataclasses.replace(
    model_lib.ModelConfig.gemma3_270m(), param_dtype=jnp.float32
  )
  model = params_safetensors.create_model_from_safe_tensors(
    job['hf'], config, dtype=jnp.float32
  )
  losses = _Losses()
  trainer = peft_trainer.PeftTrainer(
    model,
    optax.sgd(job['learning_rate']),
    peft_trainer.TrainingConfig(
      eval_every_n_steps=1_000_000, max_inflight_computations=1
    ),
    metrics_logger=losses,
  ).with_gen_model_input_fn(_inputs)
  trainer.is_managed_externally = True  # It goes on after `train` returns.
  size = job['train_batch']
  batches = [_batch(p, size) for p in side.groups(job['pairs'], size)]
  shapes = {b.input_tokens.shape: b for b in batches}
  first = None
  for batch in shapes.values():
    trainer.train([batch])
    first = first or time.time() - job['started']
  start = time.perf_counter()
  trainer.train(batches)
  seconds = time.perf_counter() - start
  trainer.close()
  targets = [int(b.input_mask.sum()) for b in batches]
  found = losses.found[-len(batches) :]
  nll = sum(x * n for x, n in zip(found, targets, strict=True))
  return side.trained(job, seconds, nll, first)


if __name__ == '__main__':
  side.main({'full': _train})
