"""The loop of ai.google.dev/gemma/docs/core/jax_finetune, Google's tutorial.

Its blocks are those of the `gemma` package; loss, masks and step are as the
tutorial writes them: every logit, a one-hot matrix, nothing donated. Only rows
are as wide as the next multiple of 128, so that no pair is left out.
"""

import functools

from gemma import layers as gemma_layers
from gemma import modules as gemma_modules
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.benchmarks.sides import ours
from tests.benchmarks.sides import side
from tests.fixtures import flax_fixture
from tests.fixtures import gemma_oracle

_WIDTH, _PAD = 128, 0


def _logits(cfg, params, tokens, positions, mask):
  """gemma.transformer.Transformer, which cannot be had without TensorFlow."""
  embedder = gemma_modules.Embedder(cfg.vocab_size, cfg.embed_dim)
  table = {'params': params['embedder']}
  x = embedder.apply(table, tokens, method='encode')
  for n, kind in enumerate(gemma_oracle.layer_kinds(cfg)):
    block = gemma_oracle.block(cfg, kind)
    layer = {'params': params[f'layer_{n}']}
    _, x = block.apply(layer, x, positions, None, mask)
  x = gemma_layers.RMSNorm().apply({'params': params['final_norm']}, x)
  return embedder.apply(table, x, method='decode')


def _loss(params, cfg, tokens, target_mask, positions, attention_mask):
  logits = _logits(cfg, params, tokens, positions, attention_mask)[0, :-1]
  one_hot = jax.nn.one_hot(tokens[0, 1:], logits.shape[-1])
  one_hot = one_hot * target_mask[0, 1:].astype(one_hot.dtype)[..., None]
  norm_factor = 1 / (jnp.sum(target_mask[0, 1:]) + 1e-8)
  return -jnp.sum(jax.nn.log_softmax(logits) * one_hot) * norm_factor


@functools.partial(jax.jit, static_argnames=['cfg', 'optimizer'])
def _train_step(cfg, params, optimizer, opt_state, tokens, target_mask):
  pad_mask = tokens != _PAD
  positions = jnp.cumsum(pad_mask, axis=-1)
  positions = positions - (positions >= 1)
  causal = jnp.tril(jnp.ones((tokens.shape[-1],) * 2, jnp.bool_))
  attention_mask = pad_mask[:, None, :] * causal[None]
  loss, grads = jax.value_and_grad(_loss)(
    params, cfg, tokens, target_mask, positions, attention_mask
  )
  updates, opt_state = optimizer.update(grads, opt_state)
  return loss, optax.apply_updates(params, updates), opt_state


def _row(prompt, target):
  size = len(prompt) + len(target)
  width = -(-size // _WIDTH) * _WIDTH
  tokens = np.full((1, width), _PAD, np.int32)
  tokens[0, :size] = prompt + target
  at = np.arange(width)[None]
  return tokens, (at >= len(prompt)) & (at < size)


def _train(job):
  source = ours.open_weights()
  cfg = source.config
  params = flax_fixture.nested_tree(cfg, source.read())
  optimizer = optax.sgd(job['learning_rate'])
  opt_state = optimizer.init(params)

  def take(row):
    nonlocal params, opt_state
    loss, params, opt_state = _train_step(
      cfg, params, optimizer, opt_state, *row
    )
    return float(loss) * int(row[1].sum())

  rows = [_row(*pair) for pair in job['pairs']]
  return side.train(job, take, rows, lambda row: row[0].shape)


if __name__ == '__main__':
  side.main({'full': _train})
