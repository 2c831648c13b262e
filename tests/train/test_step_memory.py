"""What a compiled step takes: donated buffers, micro-batches, remat."""

import functools

import jax
import numpy as np
import optax
import pytest

from mt.train import step
from tests.fixtures.tiny_step import CFG
from tests.fixtures.tiny_step import make_batch
from tests.fixtures.tiny_step import setup


@pytest.mark.parametrize('parts', ['all', 'lora'])
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


def _gradients(**train):
  """The compiled gradients of LoRA's factors, 16 rows of 80, and their norm."""
  config, _, state = setup('lora', train)
  batch = {k: np.tile(v, (8, 4)) for k, v in make_batch(b=2).items()}
  run = functools.partial(step.accumulated_gradients, CFG, config.train)
  args = state.trained, state.frozen, batch
  compiled = jax.jit(run).lower(*args).compile()
  return compiled, float(optax.tree.norm(compiled(*args)[0]))


def test_remat_and_micro_batches_trade_memory_for_time():
  memory, flops, norms = {}, {}, {}
  for remat in ('none', 'dots', 'full'):
    compiled, norms[remat] = _gradients(remat=remat)
    memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    flops[remat] = compiled.cost_analysis()['flops']
  assert memory['full'] < 0.7 * memory['none']
  assert memory['full'] < memory['dots'] < 0.9 * memory['none']
  assert flops['none'] < flops['dots'] < flops['full']
  np.testing.assert_allclose(list(norms.values()), norms['none'], rtol=1e-5)
  compiled, norm = _gradients(micro_batches=8)
  in_parts = compiled.memory_analysis().temp_size_in_bytes
  assert in_parts < 0.4 * memory['none']
  assert norm == pytest.approx(norms['none'], rel=1e-5)
