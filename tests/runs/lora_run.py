"""A run of LoRA whose factors are random, and its export by command."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mt.base import files
from mt.base import run_folder
from mt.train import checkpoint
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.weights import kept


def write(folder, source, tok_proto, rank=4, alpha=12.0, frozen_dtype='auto'):
  """A run of LoRA from `source`, as if its factors had been trained.

  The same as `loop.run` leaves behind, without the minute that it takes.
  """
  from configs import debug

  config = debug.get_config()
  config.train.frozen_dtype = frozen_dtype
  config = machine.here(config)
  config.weights.source = str(source)
  config.train.parts = 'lora'
  config.train.lora_rank = rank
  config.train.lora_alpha = alpha
  run_folder.claim(folder, config)
  files.write(folder / 'tokenizer.model', tok_proto)
  _, opened = checkpoint.open_source(folder)
  params, fingerprint = opened.read_kept(kept.FLOAT32)
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  state = state_lib.init_state(
    opened.config, params, config, optimizer, jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  trained = {
    k: jnp.asarray(rng.normal(size=v.shape, scale=1 / 16), jnp.float32)
    for k, v in state.trained.items()
  }
  manager = checkpoint.open_manager(folder)
  checkpoint.save(
    manager,
    dataclasses.replace(state, trained=trained),
    {},
    checkpoint.identity(opened, fingerprint),
  )
  manager.close()
  return folder


# What is no weight of an export that transformers reads.
SERVED = (
  'README.md',
  'generation_config.json',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
)


def command(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'mt.export', *map(str, flags)],
    capture_output=True,
    text=True,
  )
