"""All chunks of a batch's targets: the middle part of the loss.

What is computed stands in mt/gemma/loss.py, a chunk in mt/gemma/loss_chunk.py.

On a mesh each device has its rows of the vocabulary, forever, and its rows of
the batch. Devices that share both splits exchange hidden states, never the
embedding.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt.gemma import loss_chunk
from mt.gemma import sharding

# Other widths of a chunk than the largest: 9/18, 10/18 and 12/18 of it, rounded
# up to a multiple of 16.
_NARROWER, _PARTS = (9, 10, 12), 18


class Result(NamedTuple):
  """The loss of M places, and its gradients; () for one that is not wanted."""

  total: jax.Array  # Scalar, the weighted sum.
  nll: jax.Array  # [M], 0 where the weight is 0.
  d_hidden: jax.Array | tuple  # [M, D].
  d_embedding: jax.Array | tuple  # [V, D].


def evaluate(
  options: loss_chunk.Options,
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
) -> Result:
  """The loss, and its gradients as the options ask for.

  Args:
    options: see there.
    hidden: [M, D].
    embedding: [V, D].
    targets: [M] int32.
    weights: [M] float32, 0 where there is no target.
  """
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
    out_specs=Result(
      PartitionSpec(),
      by_rows,
      by_rows if options.hidden_grad else (),
      by_vocab if options.embedding_grad else (),
    ),
    check_vma=False,  # Nothing is differentiated through it.
  )(hidden, embedding, targets, weights)


def _on_device(options, axes, hidden, embedding, targets, weights) -> Result:
  """`evaluate` on what a device has of each argument."""
  (m, d), largest = hidden.shape, min(options.chunk, len(hidden))
  # The places of the targets; m, out of bounds, fills up the last chunk.
  places = jnp.nonzero(weights, size=m + largest, fill_value=m)[0]
  start = Result(
    jnp.float32(0),
    jnp.zeros(m, jnp.float32),
    jnp.zeros((m, d), jnp.float32) if options.hidden_grad else (),
    jnp.zeros(embedding.shape, jnp.float32) if options.embedding_grad else (),
  )
  # Devices that exchange take part in each chunk, be it empty.
  num_targets = axes.max(jnp.sum(weights != 0))
  num_chunks = (num_targets + largest - 1) // largest
  in_each = (num_targets + num_chunks - 1) // jnp.maximum(num_chunks, 1)

  def all_chunks(width, in_place, result):
    def one_chunk(i, result):
      at = lax.dynamic_slice_in_dim(places, i * width, width)

      def take(x):
        return axes.gather(jnp.take(x, at, axis=0, mode='fill', fill_value=0))

      chunk = loss_chunk.Chunk(at, take(hidden), take(targets), take(weights))
      return _add_chunk(options, axes, embedding, chunk, in_place, result)

    return lax.fori_loop(0, num_chunks, one_chunk, result)

  ways = _ways(options, m, d)
  fits = [
    (width >= in_each) & ((num_chunks <= 1) | (not in_place))
    for width, in_place in ways
  ]
  result = lax.switch(
    jnp.argmax(jnp.array(fits)),
    [functools.partial(all_chunks, *way) for way in ways],
    start,
  )
  if options.embedding_grad:
    d_embedding = axes.sum_rows(result.d_embedding)
    result = result._replace(d_embedding=d_embedding)
  return result._replace(total=axes.sum_rows(result.total))


def _ways(options, m, d) -> list[tuple[int, bool]]:
  """How chunks may be taken: (their width, whether in place), best first.

  In place means that the logits are kept in the memory of the embedding's
  gradient: there must be one chunk, which is no wider than that. The last way
  does for any number of targets.
  """
  largest = min(options.chunk, m)
  if options.tile is None:
    return [(largest, False)]
  widths = chunk_widths(largest, options.mesh)
  if not options.embedding_grad or options.mesh is not None:
    return [(width, False) for width in widths]
  in_place = [(width, True) for width in widths if width <= d]
  if m <= min(options.chunk, d):  # There is never more than one chunk.
    return in_place
  return [*in_place[-3:], (largest, False)]


def chunk_widths(chunk: int, mesh: Mesh | None) -> list[int]:
  """How many targets a chunk can have: the narrowest that does is taken.

  About half of a packed row are targets. Each width is compiled; on a mesh,
  where that takes longer, there is one. `chunk` is the largest.
  """
  if mesh is not None:
    return [chunk]
  widths = {-(-chunk * n // (_PARTS * 16)) * 16 for n in _NARROWER}
  return [*sorted(w for w in widths if w < chunk), chunk]


def _add_chunk(options, axes, embedding, chunk, in_place, result) -> Result:
  """The result with one more chunk in it."""
  args = options, axes, embedding, chunk, result.d_embedding
  if options.tile is None:
    nll, d_h, d_embedding = loss_chunk.at_once(*args)
  else:
    nll, d_h, d_embedding = loss_chunk.in_tiles(*args, in_place)

  def put(x, new):
    return x.at[chunk.at].set(new, mode='drop')

  return Result(
    total=result.total + jnp.sum(chunk.weights * nll),
    nll=put(result.nll, axes.own(nll, len(chunk.at))),
    d_hidden=put(result.d_hidden, d_h) if options.hidden_grad else (),
    d_embedding=d_embedding,
  )
