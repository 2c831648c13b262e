"""Cross-entropy over a large vocabulary, a chunk of targets at a time.

`reference_nll` is the definition. `target_nll` gives the same numbers and
gradients without ever building [B, L, V]: logits exist for target positions
only, for at most `chunk` of them at once, in float32, and a tile of the
vocabulary at a time, so that a tile's numbers stay in the cache.

With p = softmax(logits) and y the target, d nll / d logits = p - onehot(y)
(times 1 - (logits / cap)^2 under a soft cap). One pass over the vocabulary does
an online softmax (arXiv 1805.02867) and forms the gradient of the hidden states
with it, as attention does with its values (2112.05682, 2205.14135). A trained
embedding needs each logit once more, for its own gradient: they are kept in the
logits buffer [V, chunk] for a second pass. The buffer of a single chunk is the
memory of that gradient itself, [V, D], where the chunk is no wider: each tile
of logits is replaced by its gradient (8 % of a step and 600 MB less for four
rows of the 270M). So all gradients stand when the value does, and the backward
pass only hands them on. With label smoothing e (1512.00567) the target is
(1 - e) onehot(y) + e / V.

That is a CPU's way, whose products are slow and whose memory is slower. An
accelerator takes the vocabulary in one piece (`tile=None`), with the logits of
a chunk in the dtype of the activations: an H100 is estimated to take 16 ms for
8,192 targets of the 270M, instead of 24 in float32 (docs/measurements.md).

On a mesh each device has its rows of the vocabulary, forever, and its rows of
the batch. Devices that share both split and exchange hidden states, never the
embedding: see mt/gemma/loss_chunk.py.
"""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt.gemma import attention
from mt.gemma import loss_chunk
from mt.gemma import sharding

# Widths of a chunk besides the largest, in 18ths of it, up to a multiple of 16.
_NARROWER, _PARTS = (9, 10, 12), 18


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
    chunk: most targets at once; the logits buffer takes chunk * V * 4 bytes.
    tile: most rows of the vocabulary in one product; None for all at once,
      where the logits take chunk * V numbers of the dtype of `hidden`.
    mesh: of several devices, see mt/gemma/sharding.py; `chunk` is of each.

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
    final_softcap, smoothing, chunk, tile, mesh, dims.B
  )
  total, nll = _nll(
    hidden[:, :-1].reshape(-1, dims.D),
    embedding,
    tokens[:, 1:].reshape(-1),
    weights[:, 1:].reshape(-1).astype(jnp.float32),
    options,
  )
  return total, jnp.pad(nll.reshape(dims.B, dims.L - 1), ((0, 0), (1, 0)))


class _Result(NamedTuple):
  total: jax.Array  # Scalar.
  nll: jax.Array  # [M].
  d_hidden: jax.Array | tuple = ()  # [M, D], if wanted.
  d_embedding: jax.Array | tuple = ()  # [V, D], if wanted.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden, embedding, targets, weights, options):
  """[M, D], [V, D], [M], [M] -> scalar, [M]."""
  result = _evaluate(options, hidden, embedding, targets, weights)
  return result.total, result.nll


def _nll_fwd(hidden, embedding, targets, weights, options):
  # With symbolic_zeros each argument says whether it is differentiated at all:
  # a frozen embedding costs no gradient.
  options = dataclasses.replace(
    options,
    hidden_grad=hidden.perturbed or embedding.perturbed,
    embedding_grad=embedding.perturbed,
  )
  args = hidden.value, embedding.value, targets.value, weights.value
  result = _evaluate(options, *args)
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


def _evaluate(options, hidden, embedding, targets, weights) -> _Result:
  """The loss, and its gradients as the options ask for."""
  mesh = options.mesh
  axes = loss_chunk.VocabAxes(
    size=len(embedding),
    vocab=sharding.split_over(mesh, 'vocab', len(embedding)),
    rows=sharding.split_over(mesh, 'rows', options.rows),
  )
  if mesh is None:
    return _on_device(options, axes, hidden, embedding, targets, weights)
  by_rows = PartitionSpec(axes.rows or None)
  by_vocab = PartitionSpec(axes.vocab or None)
  return jax.shard_map(
    functools.partial(_on_device, options, axes),
    mesh=mesh,
    in_specs=(by_rows, by_vocab, by_rows, by_rows),
    out_specs=_Result(
      PartitionSpec(),
      by_rows,
      by_rows if options.hidden_grad else (),
      by_vocab if options.embedding_grad else (),
    ),
    check_vma=False,  # Nothing is differentiated through it.
  )(hidden, embedding, targets, weights)


def chunk_widths(chunk: int, mesh: Mesh | None) -> list[int]:
  """How many targets a chunk can have: the narrowest that does is taken.

  About half of a packed row are targets. Each width is compiled; on a mesh,
  where that takes longer, there is one.

  Args:
    chunk: most targets at once.
    mesh: of several devices.
  """
  if mesh is not None:
    return [chunk]
  widths = {-(-chunk * n // (_PARTS * 16)) * 16 for n in _NARROWER}
  return [*sorted(w for w in widths if w < chunk), chunk]


def _on_device(options, axes, hidden, embedding, targets, weights) -> _Result:
  """`_evaluate` on what a device has of each argument."""
  (m, d), largest = hidden.shape, min(options.chunk, len(hidden))
  whole = options.tile is None
  # The places of the targets; m, out of bounds, fills up the last chunk.
  places = jnp.nonzero(weights, size=m + largest, fill_value=m)[0]
  start = _Result(
    jnp.float32(0),
    jnp.zeros(m, jnp.float32),
    jnp.zeros((m, d), jnp.float32) if options.hidden_grad else (),
    jnp.zeros(embedding.shape, jnp.float32) if options.embedding_grad else (),
  )
  # Devices that exchange take part in each chunk, be it empty.
  number = axes.max(jnp.sum(weights != 0))
  chunks = (number + largest - 1) // largest
  each = (number + chunks - 1) // jnp.maximum(chunks, 1)

  def all_chunks(width, in_place, result):
    def one_chunk(i, result):
      at = lax.dynamic_slice_in_dim(places, i * width, width)

      def take(x):
        return axes.gather(jnp.take(x, at, axis=0, mode='fill', fill_value=0))

      chunk = loss_chunk.Chunk(at, take(hidden), take(targets), take(weights))
      return _add_chunk(options, axes, embedding, chunk, in_place, result)

    return lax.fori_loop(0, chunks, one_chunk, result)

  # (width, whether the logits buffer is the embedding's gradient); in place
  # only if there is one chunk, and the last, for several, is beside it.
  widths = [largest] if whole else chunk_widths(largest, options.mesh)
  cases = [(w, False) for w in widths]
  if options.embedding_grad and options.mesh is None and not whole:
    several = m > min(options.chunk, d)
    cases = [(w, True) for w in widths if w <= d]
    cases = cases[-3:] + [(largest, False)] if several else cases
  fits = [(w >= each) & ((chunks <= 1) | (not p)) for w, p in cases]
  result = lax.switch(
    jnp.argmax(jnp.array(fits)),
    [functools.partial(all_chunks, *case) for case in cases],
    start,
  )
  if options.embedding_grad:
    d_embedding = axes.sum_rows(result.d_embedding)
    result = result._replace(d_embedding=d_embedding)
  return result._replace(total=axes.sum_rows(result.total))


def _add_chunk(options, axes, embedding, chunk, in_place, result) -> _Result:
  """The result with one more chunk in it; for `in_place` see loss_chunk."""
  args = options, axes, embedding, chunk, result.d_embedding
  if options.tile is None:
    nll, d_h, d_embedding = loss_chunk.at_once(*args)
  else:
    nll, d_h, d_embedding = loss_chunk.in_tiles(*args, in_place)

  def put(x, new):
    return x.at[chunk.at].set(new, mode='drop')

  return _Result(
    total=result.total + jnp.sum(chunk.weights * nll),
    nll=put(result.nll, axes.own(nll, len(chunk.at))),
    d_hidden=put(result.d_hidden, d_h) if options.hidden_grad else (),
    d_embedding=d_embedding,
  )
