"""How much memory training holds at its worst, with a model of any size.

  python -m tests.benchmarks.peak [--size=gemma3_1b] [--parts=lora] [--rows=1]

Weights are constant and text is real: neither changes what is held. Printed:
the parameters' bytes, the peak of the process, both in relation.
"""

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from mt.base import compiling
from mt.gemma import model
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import step
from tests.benchmarks.sides import ours
from tests.benchmarks.sides import side

_SIZE = flags.DEFINE_enum('size', 'gemma3_1b', sizes.SIZES, 'Of the model.')
_PARTS = flags.DEFINE_string('parts', 'all', 'As in train.parts.')
_ROWS = flags.DEFINE_integer('rows', 1, 'Of a step.', 1)
_REMAT = flags.DEFINE_enum('remat', 'full', model.REMAT, 'As in train.remat.')
_STEPS = 3


def main(argv):
  del argv
  job = {'rows': _ROWS.value, 'steps': _STEPS, 'learning_rate': 1e-9}
  config = ours.make_config(_PARTS.value, job)
  config.train.remat = _REMAT.value
  cfg, tok = sizes.SIZES[_SIZE.value], ours.open_weights().tokenizer
  rows = ours.rows_of(config, tok)
  optimizer = optimizer_lib.make_optimizer(config.optim, _STEPS)
  params = parameters.unflatten(
    {
      path: jnp.full(shape, 0.01, jnp.float32)
      for path, shape in parameters.shapes(cfg).items()
    }
  )
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  key = jax.random.key(0)
  state = state_lib.init_state(cfg, params, config, optimizer, key)
  del params
  train_step = step.make_train_step(cfg, config, optimizer)
  compiling.ahead(train_step, state, rows[0])
  for batch in rows:
    state, metrics = train_step(state, batch)
    jax.block_until_ready(metrics)
  peak = side.peak_bytes()
  print(
    f'{_SIZE.value}, {_PARTS.value}, {_ROWS.value} rows, remat {_REMAT.value}: '
    f'{nbytes / 2**20:.0f} MiB of weights, {peak / 2**20:.0f} MiB at the peak, '
    f'{peak / nbytes:.2f} times as much'
  )


if __name__ == '__main__':
  app.run(main)
