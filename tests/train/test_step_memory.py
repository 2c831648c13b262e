"""What a compiled step takes: donated buffers, micro-batches, remat."""

import jax
import numpy as np
import pytest

from mt.train import step
from tests.fixtures.tiny_step import CFG
from tests.fixtures.tiny_step import make_batch
from tests.fixtures.tiny_step import setup


@pytest.mark.parametrize('parts', ['all', 'blocks', 'lora'])
def test_state_is_donated_and_aliased(parts):
  config, optimizer, state = setup(parts)
  compiled = (
    step.make_train_step(CFG, config, optimizer)
    .lower(state, make_batch())
    .compile()
  )
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == size
  leaves = jax.tree.leaves(state)
  new, _ = compiled(state, make_batch())
  assert all(x.is_deleted() for x in leaves)
  assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_micro_batches_take_less_memory():
  def temporary(number):
    config, optimizer, state = setup('lora', {'micro_batches': number})
    batch = {k: np.tile(v, (8, 4)) for k, v in make_batch(b=2).items()}
    lowered = step.make_train_step(CFG, config, optimizer).lower(state, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary(8) < 0.4 * temporary(1)


def test_remat_trades_memory_for_time():
  batch = {k: np.tile(v, (2, 8)) for k, v in make_batch().items()}
  memory, flops = {}, {}
  for remat in ('none', 'dots', 'full'):
    config, optimizer, state = setup('lora', {'remat': remat})
    lowered = step.make_train_step(CFG, config, optimizer).lower(state, batch)
    compiled = lowered.compile()
    memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    flops[remat] = compiled.cost_analysis()['flops']
  assert memory['full'] < 0.7 * memory['none']
  assert memory['full'] < memory['dots'] < 0.9 * memory['none']
  assert flops['none'] < flops['dots'] < flops['full']
