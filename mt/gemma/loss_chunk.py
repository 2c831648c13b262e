"""A chunk of targets against the vocabulary: the inner part of the loss.

What is computed stands in mt/gemma/loss.py. There are two ways:

`in_tiles`, for a CPU, whose memory is slower still than its products. One pass
over the vocabulary, a tile at a time so that its numbers stay in the cache,
does an online softmax (arXiv 1805.02867) and forms the gradient of the hidden
states with it, as attention does with its values (2112.05682, 2205.14135). A
trained embedding needs each logit once more, for its own gradient: they are
kept in the logits buffer [V, chunk] for a second pass. Of a single chunk that
buffer may be the memory of the gradient itself ("in place"): each tile of
logits is replaced by its gradient.

`at_once`, for an accelerator: the vocabulary in one piece, and logits in the
dtype of the activations.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mt.gemma import attention

_LARGEST = 75.0  # A float32 holds the sum of 2^18 numbers of e^75.


@dataclasses.dataclass(frozen=True)
class Options:
  """See loss.target_nll."""

  cap: float | None
  smoothing: float
  chunk: int
  tile: int | None
  mesh: Mesh | None
  rows: int  # B: over so many a mesh may split the M places.
  hidden_grad: bool = False  # Which gradients are wanted.
  embedding_grad: bool = False


class VocabAxes(NamedTuple):
  """Exchange between the devices of a mesh, by its axes.

  On a single device all axes are (), and what is given comes back.
  """

  size: int  # V, rows of the whole vocabulary.
  vocab: tuple[str, ...]  # Over these the vocabulary is split.
  rows: tuple[str, ...]  # Over these the rows of the batch are.

  @property
  def shared(self):
    """Over these both are: a chunk has the targets of all along them."""
    return tuple(a for a in self.vocab if a in self.rows)

  def gather(self, x):
    """The x of all devices along `shared`, one after the other."""
    return lax.all_gather(x, self.shared, tiled=True) if self.shared else x

  def own(self, x, size):
    """This device's part, of this size, of what `gather` made."""
    if not self.shared:
      return x
    at = lax.axis_index(self.shared) * size
    return lax.dynamic_slice_in_dim(x, at, size)

  def scatter_sum(self, x):
    """This device's part of the sum over all parts of the vocabulary."""
    if self.shared:
      x = lax.psum_scatter(x, self.shared, tiled=True)
    others = tuple(a for a in self.vocab if a not in self.rows)
    return lax.psum(x, others) if others else x

  def sum(self, x):
    """Over all parts of the vocabulary."""
    return lax.psum(x, self.vocab) if self.vocab else x

  def max(self, x):
    return lax.pmax(x, self.vocab) if self.vocab else x

  def sum_rows(self, x):
    """Over all rows, of what `gather` has not yet put together."""
    others = tuple(a for a in self.rows if a not in self.vocab)
    return lax.psum(x, others) if others else x

  def first_row(self, v):
    """The number of the first of the v rows of the vocabulary that are here."""
    return lax.axis_index(self.vocab) * v if self.vocab else 0


class Chunk(NamedTuple):
  """Targets that are taken at once: t of them, as `gather` brings them."""

  at: jax.Array  # Places of this device's own among its M.
  h: jax.Array  # [t, D]; 0 where the chunk is filled up.
  y: jax.Array  # [t]
  weights: jax.Array  # [t]; 0 where the chunk is filled up.


class Seen(NamedTuple):
  """What the first pass leaves of t targets.

  The sums for the gradient are over the rows of the vocabulary that are here.
  """

  nll: jax.Array  # [t]
  lse: jax.Array  # [t], log of the sum of all exponentials.
  picked: jax.Array  # [t], the targets' own logits.
  top: jax.Array  # [t], the largest logit here.
  exps: jax.Array | tuple  # [t, D], sum of exp(logit - top) * slope * vector.
  mean: jax.Array | tuple  # [t or 1, D], sum of slope * vector.
  logits_buffer: jax.Array | tuple  # [V, t or more], before the cap.


def _over_tiles(options, v, run, carry):
  """run(first row, number of rows, carry) for each tile of v rows.

  Equal ones, if less than twice as many do; else the last one is smaller.
  """
  least = -(-v // options.tile)
  number = next((n for n in range(least, 2 * least) if v % n == 0), least)
  tile = -(-v // number)
  carry = lax.fori_loop(
    0, v // tile, lambda i, carry: run(i * tile, tile, carry), carry
  )
  rest = v % tile
  return run(v - rest, rest, carry) if rest else carry


def _slope(logits, cap):
  """The derivative of logits by what they were before the cap, or ones."""
  if cap is None:
    return jnp.ones_like(logits[:, :1])
  return 1.0 - jnp.square(logits / cap)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def at_once(options, axes, embedding, chunk, d_embedding):
  """A chunk against all rows of the vocabulary that are here, in one piece.

  Three large products, and few passes over the logits between them:
  exponentials are of differences to the target's own logit, which is known
  beforehand, so that no pass looks for the largest one. They end at e^_LARGEST:
  an nll of more nats is finite, but too small. Where gradients are wanted,
  logits and their gradients are kept in the dtype of the activations.

  Returns:
    nll [t]; and, of sum(weights * nll), the gradient of the own hidden states
    and `d_embedding`, the embedding's of the chunks before, with that of this
    one; each () where it is not wanted. All float32.
  """
  v, h, e = len(embedding), chunk.h, options.smoothing
  table, y = embedding.astype(h.dtype), chunk.y - axes.first_row(v)
  own = jnp.take(table, y, axis=0, mode='clip').astype(jnp.float32)
  own = jnp.sum(h.astype(jnp.float32) * own, axis=1)
  own = axes.sum(jnp.where((y >= 0) & (y < v), own, 0.0))
  own = attention.softcap(own, options.cap)
  kept = h.dtype if options.hidden_grad else jnp.float32
  raw = jnp.einsum('td,vd->tv', h, table, preferred_element_type=kept)
  logits = attention.softcap(raw.astype(jnp.float32), options.cap)
  exps = jnp.exp(jnp.minimum(logits - own[:, None], _LARGEST))
  norm = axes.sum(jnp.sum(exps, axis=1))
  nll = jnp.log(norm)
  lse = own + nll
  if e:
    nll += e * (own - axes.sum(jnp.sum(logits, axis=1)) / axes.size)
  if not options.hidden_grad:
    return nll, (), d_embedding
  p = jnp.exp(jnp.minimum(logits - lse[:, None], 0.0))
  g = p - (1 - e) * (jnp.arange(v) == y[:, None])
  if e:
    g -= e / axes.size
  if options.cap is not None:
    g *= 1.0 - jnp.square(logits / options.cap)
  g = (g * chunk.weights[:, None]).astype(h.dtype)
  d_h = axes.scatter_sum(_product('tv,vd->td', g, table))
  if options.embedding_grad:
    d_embedding += _product('tv,td->vd', g, h)
  return nll, d_h, d_embedding


def in_tiles(options, axes, embedding, chunk, d_embedding, in_place):
  """`at_once` with a tile of the vocabulary at a time.

  Args:
    in_place: whether the logits buffer is `d_embedding`, still empty.
  """
  buffer = d_embedding
  if options.embedding_grad and not in_place:
    buffer = jnp.zeros((len(embedding), len(chunk.y)), jnp.float32)
  seen, d_h = _first_pass(options, axes, embedding, chunk, buffer), ()
  if options.hidden_grad:
    d_h = _hidden_grad(options, axes, embedding, chunk, seen)
  if options.embedding_grad:
    so_far = None if in_place else d_embedding
    d_embedding = _embedding_grad(options, axes, chunk, seen, so_far)
  return seen.nll, d_h, d_embedding


def _first_pass(options, axes, embedding, chunk, logits_buffer) -> Seen:
  """Over the vocabulary: the nll, and what the gradients need of it."""
  (v, d), h, e = embedding.shape, chunk.h, options.smoothing
  t, y = len(h), chunk.y - axes.first_row(v)

  def one_tile(at, size, carry):
    top, norm, picked, total, exps, mean, logits_buffer = carry
    part = lax.dynamic_slice_in_dim(embedding, at, size).astype(h.dtype)
    # [tile, t]: the vocabulary first is what a CPU multiplies fastest.
    raw = _product('vd,td->vt', part, h)
    if options.embedding_grad:
      logits_buffer = lax.dynamic_update_slice(logits_buffer, raw, (at, 0))
    logits = attention.softcap(raw, options.cap)
    new_top = jnp.maximum(top, jnp.max(logits, axis=0))
    shrink, p = jnp.exp(top - new_top), jnp.exp(logits - new_top)
    norm = norm * shrink + jnp.sum(p, axis=0)
    row = y - at
    found = jnp.take_along_axis(logits, row[None], axis=0, mode='clip')[0]
    picked += jnp.where((row >= 0) & (row < size), found, 0.0)
    if e:
      total += jnp.sum(logits, axis=0)
    if options.hidden_grad:
      slope = _slope(logits, options.cap)
      p = (p * slope).astype(h.dtype)
      exps = exps * shrink[:, None] + _product('vt,vd->td', p, part)
      if e:
        mean += _product('vt,vd->td', slope.astype(h.dtype), part)
    return new_top, norm, picked, total, exps, mean, logits_buffer

  zeros, some = jnp.zeros(t, jnp.float32), 1 if options.cap is None else t
  start = (
    *(zeros - jnp.inf, zeros, zeros, zeros),
    jnp.zeros((t, d), jnp.float32) if options.hidden_grad else (),
    jnp.zeros((some, d), jnp.float32) if options.hidden_grad and e else (),
    logits_buffer,
  )
  here, norm, picked, total, exps, mean, logits_buffer = _over_tiles(
    options, v, one_tile, start
  )
  top = axes.max(here)
  lse = jnp.log(axes.sum(norm * jnp.exp(here - top))) + top
  picked = axes.sum(picked)
  nll = lse - (1 - e) * picked
  if e:
    nll -= e * axes.sum(total) / axes.size
  return Seen(nll, lse, picked, here, exps, mean, logits_buffer)


def _hidden_grad(options, axes, embedding, chunk, seen):
  """[own targets, D]: the first pass's sums, normalised, less the target."""
  v, e = len(embedding), options.smoothing
  at = chunk.y - axes.first_row(v)
  vectors = jnp.take(embedding, at, axis=0, mode='clip').astype(jnp.float32)
  here = (at >= 0) & (at < v)
  slope = _slope(seen.picked[:, None], options.cap)[:, 0]
  d_h = seen.exps * jnp.exp(seen.top - seen.lse)[:, None]
  d_h -= ((1 - e) * here * slope)[:, None] * vectors
  if e:
    d_h -= e / axes.size * seen.mean
  return axes.scatter_sum(d_h * chunk.weights[:, None])


def _embedding_grad(options, axes, chunk, seen, so_far):
  """The embedding's gradient [V, D] of a chunk.

  It is added to `so_far`, in its memory; where that is None, it takes the place
  of the logits.
  """
  buffer, e = seen.logits_buffer, options.smoothing
  v, t = len(buffer), len(chunk.y)
  y = chunk.y - axes.first_row(v)

  def one_tile(at, size, out):
    raw = out if so_far is None else buffer
    raw = lax.dynamic_slice(raw, (at, 0), (size, t))
    logits = attention.softcap(raw, options.cap)
    onehot = jnp.arange(size)[:, None] == y - at
    g = jnp.exp(logits - seen.lse) - (1 - e) * onehot
    if e:
      g -= e / axes.size
    g = (g * _slope(logits, options.cap) * chunk.weights).astype(chunk.h.dtype)
    part = _product('vt,td->vd', g, chunk.h)
    if so_far is not None:
      part += lax.dynamic_slice_in_dim(out, at, size)
    return lax.dynamic_update_slice_in_dim(out, part, at, 0)

  start = buffer if so_far is None else so_far
  return _over_tiles(options, v, one_tile, start)
