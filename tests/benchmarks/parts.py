"""Training steps of LoRA, the blocks, all weights, on the same packed rows.

python -m tests.benchmarks.parts [rows in a step …]
"""

import sys
import time

import jax
import numpy as np

from configs import gemma3_270m
from mt.data import batches
from mt.data import corpus
from mt.data import splits
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import step
from mt.weights import pretrained

STEPS = 5


def main():
  config = machine.here(gemma3_270m.get_config())
  source = pretrained.open_source(
    config.weights.source, '', '', seed=0, texts=()
  )
  texts = corpus.read_splits(config.data, ['train'])['train']
  for size in [int(x) for x in sys.argv[1:]] or [1]:
    for parts in ('lora', 'blocks', 'all'):
      config.train.parts = parts
      optimizer = optimizer_lib.make_optimizer(config.optim, 100)
      state = state_lib.init_state(
        source.config, source.read(), config, optimizer, jax.random.key(0)
      )
      train_step = step.make_train_step(source.config, config, optimizer)
      config.train.batch_size = size
      rows, shares = splits.training_rows(config, source.tokenizer, texts)
      iterator = batches.TrainBatches(rows, shares, size, STEPS + 1)
      speeds = []
      for i in range(STEPS + 1):
        batch = next(iterator)
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        targets = float(metrics['targets'])
        if i:  # The first one compiles.
          speeds.append(targets / (time.perf_counter() - start))
      print(
        f'{parts}, {size} rows: {np.median(speeds):.1f} target tokens/s',
        flush=True,
      )
      del state


if __name__ == '__main__':
  main()
