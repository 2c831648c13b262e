"""Checks of docs/forks/*.diff, run inside a copy of the code that has one.

python -m tests.docs.forked attention_gate|sequence_weights|preference FOLDER
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mt.data import tokenizer
from mt.gemma import lora
from mt.gemma import model
from mt.gemma import parameters
from mt.train import step
from mt.weights import hf
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_step


def _gradients(config, state, batch):
  return jax.jit(
    lambda *args: step.accumulated_gradients(
      tiny_step.CFG, config.train, *args
    )[0]
  )(state.trained, state.frozen, batch)


def attention_gate(folder):
  """The matrix begins as 0, is trained, may be LoRA's, and goes to a file."""
  batch = tiny_step.make_batch()
  config, optimizer, state = tiny_step.setup('all', learning_rate=0.1)
  assert not np.any(state.trained['layers/attn_gate'])
  new, metrics = step.make_train_step(tiny_step.CFG, config, optimizer)(
    state, batch
  )
  assert np.isfinite(metrics['grad_norm'])
  gate = np.asarray(new.trained['layers/attn_gate'])
  assert np.all(np.any(gate, axis=(1, 2))), 'a layer without a gradient'

  config, _, state = tiny_step.setup('lora', {'lora_targets': 'attn_gate'})
  grads = _gradients(config, state, batch)
  assert list(grads) == ['layers/attn_gate_lora_a', 'layers/attn_gate_lora_b']
  assert np.any(grads['layers/attn_gate_lora_b'])

  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'train_proto')
  cfg = gguf_fixture.tiny_config('gemma3', tok.vocab_size)
  row = {p.name: p for p in parameters.table(cfg)}['attn_gate']
  assert (row.gguf, row.hf) == ('attn_gate', 'self_attn.gate_proj')
  params = parameters.init(cfg, jax.random.key(0))
  shape = params['layers']['attn_gate'].shape
  gate = jax.random.normal(jax.random.key(1), shape)
  params['layers']['attn_gate'] = gate
  hf.write(folder, cfg, params, tok)
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  name = 'model.layers.1.self_attn.gate_proj.weight'
  np.testing.assert_array_equal(tensors[name], gate[1].T)
  _, read = hf_fixture.load(folder)
  np.testing.assert_array_equal(read['layers']['attn_gate'], gate)


def _logp(config, trained, frozen, batch):
  """Of each target, [B, L], with all logits."""
  scale = config.train.lora_alpha / config.train.lora_rank
  params = lora.merge(trained, frozen, lora_scale=scale)
  inputs = [batch[k] for k in ('tokens', 'positions', 'segment_ids')]
  hidden = model.forward(tiny_step.CFG, params, *inputs)
  logits = jnp.einsum('bld,vd->blv', hidden[:, :-1], params['embedding'])
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), batch['tokens'][:, 1:, None], -1
  )
  logp = jnp.pad(picked[..., 0], ((0, 0), (1, 0)))
  return jnp.where(batch['target_mask'], logp, 0.0)


def _assert_gradients(config, state, batch, naive):
  """Those of a step in two parts are those of `naive` in one."""
  want = jax.jit(
    jax.grad(lambda trained: naive(_logp(config, trained, state.frozen, batch)))
  )(state.trained)
  config.train.micro_batches = 2
  got = _gradients(config, state, batch)
  assert got.keys() == want.keys()
  for name, x in want.items():
    scale = np.abs(x).max()
    assert scale > 0, name
    np.testing.assert_allclose(got[name], x, atol=1e-4 * scale)


def sequence_weights(_):
  """The mean over pairs of the mean over a pair's targets."""
  batch = tiny_step.make_batch(b=2)
  # A second pair in the first row, with half as many targets.
  at = np.arange(batch['tokens'].shape[1])
  batch['segment_ids'][0, at >= 12] = 2
  batch['positions'][0, at >= 12] -= 12
  batch['target_mask'][0, (at >= 12) & (at < 16)] = False
  pairs = [(0, 1), (0, 2), (1, 1)]

  def naive(logp):
    total = 0.0
    for row, segment in pairs:
      own = batch['segment_ids'][row] == segment
      own &= batch['target_mask'][row]
      total -= jnp.sum(jnp.where(own, logp[row], 0.0)) / own.sum()
    return total / len(pairs)

  config, _, state = tiny_step.setup('all')
  _assert_gradients(config, state, batch, naive)


def preference(_):
  """-log sigmoid(0.1 (better - worse)) - better, the mean over pairs."""
  one, two = tiny_step.make_batch(0), tiny_step.make_batch(1)
  batch = {k: np.concatenate([one[k][:2], two[k][:2]]) for k in one}
  config, _, state = tiny_step.setup('all')

  def naive(logp):
    rows = jnp.sum(logp, axis=1)
    total = 0.0
    for better, worse in ((rows[0], rows[1]), (rows[2], rows[3])):
      total += jnp.log1p(jnp.exp(-0.1 * (better - worse))) - better
    return total / 2

  _assert_gradients(config, state, batch, naive)


CHECKS = {f.__name__: f for f in (attention_gate, sequence_weights, preference)}

if __name__ == '__main__':
  CHECKS[sys.argv[1]](pathlib.Path(sys.argv[2]))
