"""Cross-entropy over a large vocabulary, one chunk of targets at a time.

Logits exist for target positions only and for at most `chunk` of them at once,
in float32; [B, L, V] is never built. The gradient with respect to the hidden
states (and to the embedding, if it is trained) is formed in the same pass, so
the backward pass costs two multiplications.

With p = softmax(logits) and y the target: d nll / d logits = p - onehot(y)
(times 1 - (logits / cap)^2 under a soft cap).
"""

import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mt import model


def target_nll(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  target_mask: jax.Array,
  *,
  final_softcap: float | None = None,
  chunk: int = 64,
) -> jax.Array:
  """Sum of the negative log-likelihoods of the target tokens, in nats.

  A token at position l is predicted from the hidden state at l - 1, so that
  position 0 can never be a target.

  Example, one row with a prompt of three tokens and a target of two:
    tokens       [[2, 10, 11, 20, 1]]
    target_mask  [[0,  0,  0,  1, 1]]
    the sum is over -log p(20 | hidden 2) and -log p(1 | hidden 3).

  Args:
    hidden: [B, L, D], output of model.forward.
    embedding: [V, D].
    tokens: [B, L] int32.
    target_mask: [B, L] bool.
    final_softcap: the model's cap on logits.
    chunk: targets per step; memory is chunk * V * 4 bytes.

  Returns:
    Scalar float32 sum; divide by the number of targets for the mean.
  """
  chex.assert_rank([hidden, embedding], [3, 2])
  chex.assert_equal_shape([tokens, target_mask])
  chex.assert_equal_shape_prefix([hidden, tokens], 2)
  chex.assert_axis_dimension_gt(tokens, 1, 1)
  b, l, d = hidden.shape
  inputs = hidden[:, :-1].reshape(b * (l - 1), d)
  targets = jnp.asarray(tokens)[:, 1:].reshape(-1)
  mask = jnp.asarray(target_mask)[:, 1:].reshape(-1).astype(bool)
  return _masked_nll(inputs, embedding, targets, mask, final_softcap, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _masked_nll(inputs, embedding, targets, mask, cap, chunk):
  """[M, D], [V, D], [M], [M] -> scalar."""
  return _scan_chunks(inputs, embedding, targets, mask, cap, chunk)[0]


def _scan_chunks(
  inputs,
  embedding,
  targets,
  mask,
  cap,
  chunk,
  want_inputs=False,
  want_embedding=False,
):
  """The loss, and its gradients as asked for (else empty tuples)."""
  m, d = inputs.shape
  chunk = min(chunk, m)
  # Target rows first; index m (out of bounds) fills up the last chunk.
  size = -(-m // chunk) * chunk
  index = jnp.nonzero(mask, size=size, fill_value=m)[0]
  d_inputs = jnp.zeros((m, d), jnp.float32) if want_inputs else ()
  d_embedding = (
    jnp.zeros(embedding.shape, jnp.float32) if want_embedding else ()
  )

  def one_chunk(i, carry):
    total, d_inputs, d_embedding = carry
    rows = lax.dynamic_slice_in_dim(index, i * chunk, chunk)
    valid = rows < m
    h = inputs.at[rows].get(mode='fill', fill_value=0)
    y = targets.at[rows].get(mode='fill', fill_value=0)
    # [V, t] throughout: V first is what a CPU multiplies fastest.
    raw = jnp.einsum(
      'vd,td->vt',
      embedding.astype(h.dtype),
      h,
      preferred_element_type=jnp.float32,
    )
    logits = model.softcap(raw, cap)
    top = jnp.max(logits, axis=0)
    exps = jnp.exp(logits - top)
    norm = jnp.sum(exps, axis=0)
    picked = jnp.take_along_axis(logits, y[None], axis=0)[0]
    total += jnp.sum(jnp.where(valid, jnp.log(norm) + top - picked, 0.0))
    if want_inputs or want_embedding:
      onehot = jnp.arange(embedding.shape[0])[:, None] == y
      g = exps / norm - onehot  # Of filled rows too: their h is 0.
      if cap is not None:
        g = g * (1.0 - jnp.square(logits / cap))
      g = g.astype(h.dtype)
    if want_inputs:
      d_h = jnp.einsum(
        'vt,vd->td',
        g,
        embedding.astype(h.dtype),
        preferred_element_type=jnp.float32,
      )
      d_inputs = d_inputs.at[rows].set(d_h, mode='drop')
    if want_embedding:
      d_embedding += jnp.einsum(
        'vt,td->vd', g, h, preferred_element_type=jnp.float32
      )
    return total, d_inputs, d_embedding

  chunks = (jnp.sum(mask) + chunk - 1) // chunk
  start = (jnp.zeros((), jnp.float32), d_inputs, d_embedding)
  return lax.fori_loop(0, chunks, one_chunk, start)


def _masked_nll_fwd(inputs, embedding, targets, mask, cap, chunk):
  # With symbolic_zeros, each argument says whether it is differentiated at
  # all: a frozen embedding costs no gradient.
  total, d_inputs, d_embedding = _scan_chunks(
    inputs.value,
    embedding.value,
    targets.value,
    mask.value,
    cap,
    chunk,
    inputs.perturbed,
    embedding.perturbed,
  )
  protos = (inputs.value[:0], embedding.value[:0])  # Only their dtypes.
  return total, (d_inputs, d_embedding, protos)


def _masked_nll_bwd(cap, chunk, residuals, g):
  del cap, chunk
  d_inputs, d_embedding, (inputs, embedding) = residuals
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return (
    None
    if isinstance(d_inputs, tuple)
    else (g * d_inputs).astype(inputs.dtype),
    None
    if isinstance(d_embedding, tuple)
    else (g * d_embedding).astype(embedding.dtype),
    None,
    None,
  )


_masked_nll.defvjp(_masked_nll_fwd, _masked_nll_bwd, symbolic_zeros=True)
