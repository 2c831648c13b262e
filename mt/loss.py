"""Cross-entropy over a large vocabulary, one chunk of targets at a time.

Logits exist for target positions only and for at most `chunk` of them at once,
in float32; [B, L, V] is never built. The gradient with respect to the hidden
states (and to the embedding, if it is trained) is formed in the same pass, so
the backward pass costs two multiplications.

With p = softmax(logits) and y the target: d nll / d logits = p - onehot(y)
(times 1 - (logits / cap)^2 under a soft cap).

On a mesh each device has its rows of the vocabulary, forever, and its rows of
the batch. Devices that share both split and exchange hidden states, never the
embedding: see _Group.
"""

import dataclasses
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt import model
from mt import sharding


@dataclasses.dataclass(frozen=True)
class _Options:
  cap: float | None
  chunk: int
  logits_dtype: jnp.dtype
  mesh: Mesh | None
  rows: int  # B, what a mesh may split of the M places.


@dataclasses.dataclass(frozen=True)
class _Group:
  """Mesh axes of a device's view, all () where there is one device.

  Attributes:
    vocab: those over which the vocabulary is split.
    shared: those of them over which rows are split as well: a chunk holds the
      rows of all devices along them.
    copies: the others of them; the same rows on each.
    apart: over which rows alone are split.
  """

  vocab: tuple[str, ...] = ()
  shared: tuple[str, ...] = ()
  copies: tuple[str, ...] = ()
  apart: tuple[str, ...] = ()

  def gather(self, x):
    return lax.all_gather(x, self.shared, tiled=True) if self.shared else x

  def scatter_sum(self, x):
    if self.shared:
      x = lax.psum_scatter(x, self.shared, tiled=True)
    return lax.psum(x, self.copies) if self.copies else x

  def sum(self, x):
    return lax.psum(x, self.vocab) if self.vocab else x

  def max(self, x):
    return lax.pmax(x, self.vocab) if self.vocab else x

  def sum_apart(self, x):
    return lax.psum(x, self.apart) if self.apart else x


def target_nll(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  target_mask: jax.Array,
  *,
  final_softcap: float | None = None,
  chunk: int = 64,
  logits_dtype: jnp.dtype = jnp.float32,
  mesh: Mesh | None = None,
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
    logits_dtype: of logits and their exponentials.
    mesh: of several devices, see mt/sharding.py; `chunk` is of each.

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
  dtype = jnp.dtype(logits_dtype)
  options = _Options(final_softcap, chunk, dtype, mesh, b)
  return _masked_nll(inputs, embedding, targets, mask, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _masked_nll(inputs, embedding, targets, mask, options):
  """[M, D], [V, D], [M], [M] -> scalar."""
  return _evaluate(options, False, False, inputs, embedding, targets, mask)[0]


def _evaluate(options, want_inputs, want_embedding, *args):
  """The loss, and its gradients as asked for (else empty tuples)."""
  run = functools.partial(_scan_chunks, options, want_inputs, want_embedding)
  mesh = options.mesh
  if mesh is None:
    return run(_Group(), *args)
  rows = sharding.split_over(mesh, 'rows', options.rows)
  vocab = sharding.split_over(mesh, 'vocab', args[1].shape[0])
  group = _Group(
    vocab=vocab,
    shared=tuple(a for a in vocab if a in rows),
    copies=tuple(a for a in vocab if a not in rows),
    apart=tuple(a for a in rows if a not in vocab),
  )
  of_rows, of_vocab = PartitionSpec(rows or None), PartitionSpec(vocab or None)
  return jax.shard_map(
    functools.partial(run, group),
    mesh=mesh,
    in_specs=(of_rows, of_vocab, of_rows, of_rows),
    out_specs=(
      PartitionSpec(),
      of_rows if want_inputs else (),
      of_vocab if want_embedding else (),
    ),
    check_vma=False,  # Nothing is differentiated through it.
  )(*args)


def _scan_chunks(
  options, want_inputs, want_embedding, group, inputs, embedding, targets, mask
):
  """`_evaluate` on what a device has of each argument."""
  cap = options.cap
  m, d = inputs.shape
  chunk = min(options.chunk, m)
  # Target rows first; index m (out of bounds) fills up the last chunk.
  size = -(-m // chunk) * chunk
  index = jnp.nonzero(mask, size=size, fill_value=m)[0]
  d_inputs = jnp.zeros((m, d), jnp.float32) if want_inputs else ()
  d_embedding = (
    jnp.zeros(embedding.shape, jnp.float32) if want_embedding else ()
  )

  # The first row of the vocabulary that is here.
  offset = (
    lax.axis_index(group.vocab) * embedding.shape[0] if group.vocab else 0
  )

  def one_chunk(i, carry):
    total, d_inputs, d_embedding = carry
    rows = lax.dynamic_slice_in_dim(index, i * chunk, chunk)
    valid = group.gather(rows < m)
    h = group.gather(inputs.at[rows].get(mode='fill', fill_value=0))
    y = group.gather(targets.at[rows].get(mode='fill', fill_value=0)) - offset
    # [V, t] throughout: V first is what a CPU multiplies fastest.
    raw = jnp.einsum(
      'vd,td->vt',
      embedding.astype(h.dtype),
      h,
      preferred_element_type=options.logits_dtype,
    )
    logits = model.softcap(raw, cap)
    top = group.max(jnp.max(logits, axis=0))
    exps = jnp.exp(logits - top)
    norm = group.sum(jnp.sum(exps, axis=0))
    picked = jnp.take_along_axis(logits, y[None], axis=0, mode='clip')[0]
    if group.vocab:
      here = (y >= 0) & (y < embedding.shape[0])
      picked = group.sum(jnp.where(here, picked, 0.0))
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
      d_h = group.scatter_sum(d_h)
      d_inputs = d_inputs.at[rows].set(d_h, mode='drop')
    if want_embedding:
      d_embedding += jnp.einsum(
        'vt,td->vd', g, h, preferred_element_type=jnp.float32
      )
    return total, d_inputs, d_embedding

  # Who exchanges takes part in each chunk, be it empty.
  chunks = group.max((jnp.sum(mask) + chunk - 1) // chunk)
  start = (jnp.zeros((), jnp.float32), d_inputs, d_embedding)
  total, d_inputs, d_embedding = lax.fori_loop(0, chunks, one_chunk, start)
  d_embedding = group.sum_apart(d_embedding) if want_embedding else ()
  return group.sum_apart(total), d_inputs, d_embedding


def _masked_nll_fwd(inputs, embedding, targets, mask, options):
  # With symbolic_zeros, each argument says whether it is differentiated at
  # all: a frozen embedding costs no gradient.
  total, d_inputs, d_embedding = _evaluate(
    options,
    inputs.perturbed,
    embedding.perturbed,
    inputs.value,
    embedding.value,
    targets.value,
    mask.value,
  )
  protos = (inputs.value[:0], embedding.value[:0])  # Only their dtypes.
  return total, (d_inputs, d_embedding, protos)


def _masked_nll_bwd(options, residuals, g):
  del options
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
