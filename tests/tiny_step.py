"""A tiny model, a batch and a state for the tests of a step."""

import dataclasses

import jax
import numpy as np

from configs import debug
from mt import model
from mt import optimizer as optimizer_lib
from mt import sizes
from mt import step

CFG = dataclasses.replace(sizes.SIZES['debug'], num_layers=2, vocab_size=96)


def make_batch(seed=0, b=3, l=20):
  rng = np.random.default_rng(seed)
  lengths = np.array([l, l - 4, l - 9])[:b]
  at = np.arange(l)
  inside = at < lengths[:, None]
  return {
    'tokens': rng.integers(3, 96, (b, l)).astype(np.int32),
    'positions': np.where(inside, at, 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'target_mask': inside & (at >= 6),
  }


def setup(parts='all', train=None, **optim):
  config = debug.get_config()
  config.train.parts, config.train.lora_rank = parts, 4
  config.optim.update(optim)
  config.train.update(train or {})
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  params = model.init_params(CFG, jax.random.key(1))
  state = step.init_state(CFG, params, config, optimizer, jax.random.key(2))
  return config, optimizer, state
