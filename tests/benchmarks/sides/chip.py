"""This project's side of `make accelerator`: on whatever JAX has.

Of the job (see side.py) it reads

  config, changes  the config's name and the knobs that differ
  rows             an .npz file with the batches of all steps, [S, B, L] each
  size             of the model; with `random`, weights by chance, else the real
  prompts, stops, batches, beams
"""

import importlib
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from mt.base import accelerator
from mt.base import compiling
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import roofline
from mt.train import state as state_lib
from mt.train import step
from mt.train import targets
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from tests.benchmarks.sides import ours
from tests.benchmarks.sides import side


def _peak():
  """The most memory of the device, or of this process on a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use') or side.peak_bytes()


def _params(job):
  if job['random']:
    return parameters.init(sizes.SIZES[job['size']], jax.random.key(0))
  return ours.open_weights().read()


def _config(job):
  config = importlib.import_module(f'configs.{job["config"]}').get_config()
  config.update_from_flattened_dict(job['changes'])
  return machine.here(config)


def _planned(compiled):
  """Bytes that the compiler has assigned."""
  m = compiled.memory_analysis()
  held = m.argument_size_in_bytes + m.temp_size_in_bytes
  return held + m.output_size_in_bytes - m.alias_size_in_bytes


def _estimate(compiled, trips):
  """Seconds; 0 for a chip that nothing is known of."""
  chip = targets.chip_of(jax.devices()[0].device_kind)
  return roofline.seconds(roofline.kernels(compiled.as_text(), chip, trips))


def _compiled(cfg, config, optimizer, state, batch):
  """The step, for half of the rows where all do not fit, and so on."""
  while True:
    train_step = step.make_train_step(cfg, config, optimizer)
    made = train_step.lower(state, batch).compile()
    rows = len(batch['tokens'])
    if not 0 < accelerator.memory() < _planned(made) or rows == 1:
      return made, rows
    batch = {k: v[: rows // 2] for k, v in batch.items()}


def _train(job):
  compiling.keep_compiled_programs()
  cfg, config = sizes.SIZES[job['size']], _config(job)
  read = np.load(job['rows'])
  names = read.files
  arrays = [read[name] for name in names]
  steps = [dict(zip(names, x, strict=True)) for x in zip(*arrays, strict=True)]
  optimizer = optimizer_lib.make_optimizer(config.optim, len(steps))
  params = _params(job)
  key = jax.random.key(0)
  state = state_lib.init_state(cfg, params, config, optimizer, key)
  del params
  compiled, rows = _compiled(cfg, config, optimizer, state, steps[0])
  seconds, losses, first = [], [], None
  for batch in steps:
    batch = {k: v[:rows] for k, v in batch.items()}
    start = time.perf_counter()
    state, metrics = compiled(state, batch)
    losses.append(float(metrics['nll']) / float(metrics['targets']))
    seconds.append(time.perf_counter() - start)
    first = first or time.time() - job['started']
  used = [{k: v[:rows] for k, v in b.items()} for b in steps[1:]]
  targets_of_step = float(np.mean([b['target_mask'].sum() for b in used]))
  chunks = math.ceil(targets_of_step / config.train.loss_chunk)
  return {
    'rows': rows,
    'seconds': float(np.median(seconds[1:])),
    'tokens': float(np.mean([(b['segment_ids'] > 0).sum() for b in used])),
    'targets': targets_of_step,
    'first_step': first,
    'losses': losses,
    'peak': _peak(),
    'planned': _planned(compiled),
    'estimate': _estimate(compiled, chunks),
    'chosen': {k: config.train[k] for k in ('dtype', 'remat', 'attention')},
  }


def _decode(job):
  """Each batch size with each width of beam: output tokens and seconds."""
  compiling.keep_compiled_programs()
  cfg, config = sizes.SIZES[job['size']], _config(job)
  dtype = config.train.dtype
  params = decode.unstack(_params(job), dtype)
  answers = {}
  for size, beam in job['batches']:
    settings = batching.Settings(
      cfg, search.Search(beam=beam), tuple(job['stops']), size, dtype
    )
    part = {'prompts': job['prompts'][: 4 * size]}
    prompts = [batching.Prompt(**p) for p in part['prompts']]
    batching.decode_all(settings, params, prompts)  # Compiles.
    start = time.perf_counter()
    found = batching.decode_all(settings, params, prompts)
    seconds = time.perf_counter() - start
    made = [h.tokens + [h.end] * (h.end is not None) for h, *_ in found]
    answer = side.decoded(job | part, seconds, made)
    slots = batching.bucket(max(p.slots(beam) for p in prompts), 128)
    rows = settings.most_rows(slots)
    batch = batching.init(settings, rows, slots)
    args = settings, batch, params, jnp.int32(0)
    compiled = batching.decode.lower(*args).compile()
    answers[f'{size}x{beam}'] = answer | {
      'rows': rows,
      'peak': _peak(),
      'planned': _planned(compiled),
      'estimate': _estimate(compiled, 1),  # Of a step.
    }
  return {'decoded': answers}


def _roof(job):
  """FLOP/s of the best bfloat16 product, and what the device is."""
  del job
  n = 8192 if accelerator.memory() else 256
  x, f = jnp.ones((n, n), jnp.bfloat16), jax.jit(jnp.matmul)
  jax.block_until_ready(f(x, x))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready([f(x, x) for _ in range(5)])
    times.append((time.perf_counter() - start) / 5)
  return {
    'device': accelerator.describe(),
    'kind': jax.devices()[0].device_kind,
    'memory': accelerator.memory(),
    'product': 2 * n**3 / min(times),
    'jax': jax.__version__,
  }


if __name__ == '__main__':
  side.main({'train': _train, 'decode': _decode, 'roof': _roof})
