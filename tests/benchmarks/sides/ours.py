"""This project's side of `make bench`."""

import itertools
import time

import jax
import ml_collections

from configs import gemma3_270m
from mt.base import compiling
from mt.data import batches
from mt.data import corpus
from mt.data import splits
from mt.data import tokenizer
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import step
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.weights import kept
from mt.weights import pretrained
from tests.benchmarks.sides import side


def make_config(parts: str, job: side.Job) -> ml_collections.ConfigDict:
  """configs/gemma3_270m.py with the optimizer that all sides have."""
  c = gemma3_270m.get_config()
  c.train.parts = parts
  c.train.batch_size = job['rows']
  c.train.max_steps = job['steps']
  c.optim.name = 'adamw' if parts == 'lora' else 'sgd'
  c.optim.learning_rate = job['learning_rate']
  c.optim.schedule = 'constant'
  c.optim.warmup_steps = 0
  c.optim.clip_norm = 0.0
  return machine.here(c)


def rows_of(
  config: ml_collections.ConfigDict, tok: tokenizer.Tokenizer
) -> list[batches.Batch]:
  """The rows of all steps, as a run of this config has them."""
  texts = corpus.read_splits(config.data, ['train'])['train']
  rows, shares = splits.training_rows(config, tok, texts)
  number = config.train.max_steps
  iterator = batches.TrainBatches(rows, shares, config.train.batch_size, number)
  return list(itertools.islice(iterator, number))


def open_weights() -> pretrained.Source:
  name = gemma3_270m.get_config().weights.source
  return pretrained.open_source(name, '', '', seed=0, texts=())


def _train(job, parts):
  compiling.keep_compiled_programs()
  config, source = make_config(parts, job), open_weights()
  optimizer = optimizer_lib.make_optimizer(config.optim, job['steps'])
  key = jax.random.key(0)
  params, _ = source.read_kept(kept.Keep(donated=True))
  state = state_lib.init_state(source.config, params, config, optimizer, key)
  del params
  train_step = step.make_train_step(source.config, config, optimizer)

  def take(batch):
    nonlocal state
    state, metrics = train_step(state, batch)
    return float(metrics['nll'])

  rows = rows_of(config, source.tokenizer)
  compiling.ahead(train_step, state, rows[0])
  return side.train(job, take, rows)


def _decode(job, beam):
  """The decoder of mt/translate/translator.py, which gives ids to compare."""
  compiling.keep_compiled_programs()
  source = open_weights()
  params = decode.unstack(source.read())
  settings = batching.Settings(
    source.config, search.Search(beam=beam), tuple(job['stops']), job['batch']
  )
  prompts = [batching.Prompt(p['tokens'], p['limit']) for p in job['prompts']]
  batching.decode_all(settings, params, prompts)  # Compiles.
  start = time.perf_counter()
  found = batching.decode_all(settings, params, prompts)
  seconds = time.perf_counter() - start
  made = [h.tokens + ([h.end] if h.end is not None else []) for h, *_ in found]
  return side.decoded(job, seconds, made)


if __name__ == '__main__':
  side.main(
    {
      'full': lambda job: _train(job, 'all'),
      'lora': lambda job: _train(job, 'lora'),
      'greedy': lambda job: _decode(job, 1),
      'beam': lambda job: _decode(job, job['beam']),
    }
  )
