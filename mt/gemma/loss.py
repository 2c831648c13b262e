"""Cross-entropy over a large vocabulary, without all logits at once.

`reference_nll` is the definition. `target_nll` gives the same numbers and
gradients without ever building [B, L, V]: logits exist for target positions
only, a chunk of them at a time (mt/gemma/loss_loop.py), against a part of the
vocabulary at a time or all of it (mt/gemma/loss_chunk.py).

With p = softmax(logits) and y the target, d nll / d logits = p - onehot(y)
(times 1 - (logits / cap)^2 under a soft cap). With label smoothing e
(arXiv 1512.00567) the target is (1 - e) onehot(y) + e / V. So the gradients are
made in the forward pass, while the logits are there; the backward pass only
hands them on.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mt.gemma import attention
from mt.gemma import loss_chunk
from mt.gemma import loss_loop


def reference_nll(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  weights: jax.Array,
  *,
  final_softcap: float | None = None,
  smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """What `target_nll` computes, in the plainest way: with all logits."""
  logits = jnp.einsum('bld,vd->blv', hidden[:, :-1], embedding)
  # float32, or more where that is given.
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  logits = attention.softcap(logits, final_softcap)
  logp = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
  nll = -(1 - smoothing) * picked - smoothing * jnp.mean(logp, -1)
  nll = jnp.where(weights[:, 1:] != 0, nll, 0.0)
  nll = jnp.pad(nll, ((0, 0), (1, 0)))  # Position 0 is no target.
  return jnp.sum(weights * nll), nll


def target_nll(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  weights: jax.Array,
  *,
  final_softcap: float | None = None,
  smoothing: float = 0.0,
  chunk: int = 576,
  tile: int | None = 2048,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the targets' negative log-likelihoods, in nats, and each.

  A token at position l is predicted from the hidden state at l - 1, so that
  position 0 can never be a target. What a target counts is data: a weight of 1
  / (number of targets) makes the sum their mean, a weight for each sequence
  makes it a weighted mean, 0 is no target.

  Example, one row with a prompt of three tokens and a target of two:
    tokens   [[2, 10, 11, 20,  1]]
    weights  [[0,  0,  0, .5, .5]]
    the sum is the mean of -log p(20 | hidden 2) and -log p(1 | hidden 3).

  Args:
    hidden: [B, L, D], output of model.forward.
    embedding: [V, D].
    tokens: [B, L] int32.
    weights: [B, L] float32; what stands at position 0 is ignored.
    final_softcap: the model's cap on logits.
    smoothing: of the labels, from 0 to below 1; with more than 0 the numbers
      are cross-entropies with the smoothed labels.
    chunk: most targets at once, on each device of a mesh.
    tile: most rows of the vocabulary in one product; None for all at once,
      where the logits take chunk * V numbers of the dtype of `hidden`.
    mesh: of several devices, see mt/gemma/sharding.py.

  Returns:
    The sum, float32, which can be differentiated by hidden, embedding and
    weights; and the nll of each position, [B, L] float32, 0 where the weight
    is 0, which cannot.
  """
  dims = chex.Dimensions()
  dims['BLD'], dims['VD'] = hidden.shape, embedding.shape
  chex.assert_shape(hidden, dims['BLD'])
  chex.assert_shape([tokens, weights], dims['BL'])
  options = loss_chunk.Options(
    final_softcap, smoothing, chunk, tile, mesh, rows=dims.B
  )
  total, nll = _nll(
    hidden[:, :-1].reshape(-1, dims.D),
    embedding,
    tokens[:, 1:].reshape(-1),
    weights[:, 1:].reshape(-1).astype(jnp.float32),
    options,
  )
  return total, jnp.pad(nll.reshape(dims.B, dims.L - 1), ((0, 0), (1, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden, embedding, targets, weights, options):
  """M = B * (L - 1) places: [M, D], [V, D], [M], [M] -> scalar, [M]."""
  result = loss_loop.evaluate(options, hidden, embedding, targets, weights)
  return result.total, result.nll


def _nll_fwd(hidden, embedding, targets, weights, options):
  # `perturbed` says whether an argument is differentiated at all: a frozen
  # embedding costs no gradient.
  options = dataclasses.replace(
    options,
    hidden_grad=hidden.perturbed or embedding.perturbed,
    embedding_grad=embedding.perturbed,
  )
  args = hidden.value, embedding.value, targets.value, weights.value
  result = loss_loop.evaluate(options, *args)
  # Of hidden and embedding only their dtypes are kept.
  kept = result, hidden.value[:0], embedding.value[:0]
  return (result.total, result.nll), kept


def _nll_bwd(options, kept, cotangents):
  del options
  result, hidden, embedding = kept
  g, g_nll = cotangents
  if not isinstance(g_nll, jax.custom_derivatives.SymbolicZero):
    raise TypeError(
      'target_nll cannot be differentiated by the nll of single positions: '
      'give what each of them counts as `weights`, and differentiate the sum'
    )
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None

  def scaled(gradient, like):
    if isinstance(gradient, tuple):
      return None
    return (g * gradient).astype(like.dtype)

  return (
    scaled(result.d_hidden, hidden),
    scaled(result.d_embedding, embedding),
    None,
    g * result.nll,
  )


_nll.defvjp(_nll_fwd, _nll_bwd, symbolic_zeros=True)
