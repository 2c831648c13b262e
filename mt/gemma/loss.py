"""Cross-entropy over a large vocabulary, one chunk of targets at a time.

Logits exist for target positions only and for at most `chunk` of them at once,
in float32; [B, L, V] is never built. Chunks are hardly wider than the targets:
133 of them are one chunk of 144, not two of 128. The vocabulary is taken a tile
at a time, and the gradient of the hidden states is formed in the same pass, so
that under a frozen embedding no array of [V, targets] is built either. Under a
trained one the logits of a chunk are kept for its gradient: those of a single
chunk where the gradient [V, D] itself will stand, tile by tile in its place.

With p = softmax(logits) and y the target: d nll / d logits = p - onehot(y)
(times 1 - (logits / cap)^2 under a soft cap). With label smoothing e (arXiv
1512.00567) the target is (1 - e) onehot(y) + e / V, in both.

On a mesh each device has its rows of the vocabulary, forever, and its rows of
the batch. Devices that share both split and exchange hidden states, never the
embedding: see _Group.
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
from mt.gemma import sharding

# Sizes of a single chunk, and of one of several, in 18ths of the largest.
_ALONE = (6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
_OF_SEVERAL = (12, 14, 16)
_PARTS, _MULTIPLE = 18, 16


@dataclasses.dataclass(frozen=True)
class _Options:
  cap: float | None
  smoothing: float
  chunk: int
  tile: int
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

  def parts(self):
    """How many devices share the vocabulary."""
    return lax.axis_size(self.vocab) if self.vocab else 1

  def sharers(self):
    """How many of them have rows of their own."""
    return lax.axis_size(self.shared) if self.shared else 1

  def max(self, x):
    return lax.pmax(x, self.vocab) if self.vocab else x

  def sum_apart(self, x):
    return lax.psum(x, self.apart) if self.apart else x


def chunk_widths(
  chunk: int, mesh: Mesh | None, several: bool = False
) -> list[int]:
  """How many targets a chunk can have: few sizes, each is compiled.

  Fewer targets cost little anyway, and one of several chunks has more than half
  of `chunk`. On a mesh, where compiling takes longer, there is one size.

  Args:
    chunk: most targets at once.
    mesh: of several devices.
    several: fewer sizes, for what is more than one chunk.
  """
  chex.assert_scalar_positive(chunk)
  if mesh is not None:
    return [chunk]
  part = -(-chunk // (_PARTS * _MULTIPLE)) * _MULTIPLE
  parts = _OF_SEVERAL if several else _ALONE
  return [*(n * part for n in parts if n * part < chunk), chunk]


def target_nll(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  target_mask: jax.Array,
  *,
  weight: jax.Array | float = 1.0,
  final_softcap: float | None = None,
  smoothing: float = 0.0,
  chunk: int = 288,
  tile: int = 2048,
  logits_dtype: jnp.dtype = jnp.float32,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Weighted sum of the target tokens' negative log-likelihoods, in nats.

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
    weight: what the sum is multiplied with, one over the number of targets for
      their mean. Here it costs nothing; multiplied with the result, it would
      cost a pass over the embedding's gradient.
    final_softcap: the model's cap on logits.
    smoothing: of the labels, from 0 to below 1; with more than 0 the sum is of
      cross-entropies with the smoothed labels.
    chunk: most targets at once; where B * (L - 1) is more, or more than D, a
      trained embedding takes chunk * V * 4 bytes.
    tile: most rows of the vocabulary in one product.
    logits_dtype: of logits and their exponentials.
    mesh: of several devices, see mt/gemma/sharding.py; `chunk` is of each.

  Returns:
    Scalar float32.
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
  options = _Options(final_softcap, smoothing, chunk, tile, dtype, mesh, b)
  weight = jnp.asarray(weight, jnp.float32)
  return _masked_nll(inputs, embedding, targets, mask, weight, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _masked_nll(inputs, embedding, targets, mask, weight, options):
  """[M, D], [V, D], [M], [M], scalar -> scalar."""
  args = inputs, embedding, targets, mask, weight
  return _evaluate(options, False, False, *args)[0]


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
    in_specs=(of_rows, of_vocab, of_rows, of_rows, PartitionSpec()),
    out_specs=(
      PartitionSpec(),
      of_rows if want_inputs else (),
      of_vocab if want_embedding else (),
    ),
    check_vma=False,  # Nothing is differentiated through it.
  )(*args)


def _scan_chunks(
  options,
  want_inputs,
  want_embedding,
  group,
  inputs,
  embedding,
  targets,
  mask,
  weight,
):
  """`_evaluate` on what a device has of each argument."""
  (m, d), v = inputs.shape, len(embedding)
  largest = min(options.chunk, m)
  # Target rows first; index m (out of bounds) fills up the last chunk.
  index = jnp.nonzero(mask, size=m + largest, fill_value=m)[0]
  start = (
    jnp.zeros((), jnp.float32),
    jnp.zeros((m, d), jnp.float32) if want_inputs else (),
    jnp.zeros((v, d), jnp.float32) if want_embedding else (),
  )

  def one_chunk(chunk, inside, i, carry):
    """`inside`: the logits are kept in d_embedding, which is still empty."""
    total, d_inputs, d_embedding, kept = carry
    rows = lax.dynamic_slice_in_dim(index, i * chunk, chunk)
    valid = group.gather(rows < m)
    h = group.gather(inputs.at[rows].get(mode='fill', fill_value=0))
    y = group.gather(targets.at[rows].get(mode='fill', fill_value=0))
    room = d_embedding if inside else kept
    seen, room = _one_pass(options, want_inputs, group, embedding, h, y, room)
    e = options.smoothing
    wanted = seen.picked if not e else (1 - e) * seen.picked + e * seen.mean
    total += jnp.sum(jnp.where(valid, seen.lse - wanted, 0.0))
    if want_inputs:
      d_h = group.scatter_sum(seen.d_h * weight)
      d_inputs = d_inputs.at[rows].set(d_h, mode='drop')
    if want_embedding:  # Rows that fill up a chunk add nothing: their h is 0.
      before = None if inside else d_embedding
      d_embedding = _outer(options, group, weight, seen.lse, h, y, room, before)
    return total, d_inputs, d_embedding, () if inside else room

  # Who exchanges takes part in each chunk, be it empty.
  most = group.max(jnp.sum(mask))
  chunks = (most + largest - 1) // largest
  each = (most + chunks - 1) // jnp.maximum(chunks, 1)

  def all_chunks(chunk, inside, start):
    kept = ()
    if want_embedding and not inside:
      kept = jnp.zeros((v, chunk * group.sharers()), options.logits_dtype)
    run = functools.partial(one_chunk, chunk, inside)
    return lax.fori_loop(0, chunks, run, (*start, kept))[:3]

  # Sizes of a chunk, and whether its logits stand inside the gradient: those of
  # a single one that is no wider than D do, all others beside it.
  mesh = options.mesh
  sizes = [(w, False) for w in chunk_widths(largest, mesh)]
  if want_embedding and mesh is None:
    sizes = [(w, True) for w, _ in sizes if w <= d]
    if m > d or m > options.chunk:
      several = chunk_widths(largest, mesh, several=True)
      sizes += [(w, False) for w in several]
  widths, inside = (jnp.array(x) for x in zip(*sizes, strict=True))
  usable = (widths >= each) & (~inside | (chunks <= 1))
  chosen = jnp.argmax(usable)  # The first.
  run = [functools.partial(all_chunks, *size) for size in sizes]
  total, d_inputs, d_embedding = lax.switch(chosen, run, start)
  d_embedding = group.sum_apart(d_embedding) if want_embedding else ()
  return weight * group.sum_apart(total), d_inputs, d_embedding


class _Seen(NamedTuple):
  """What one pass over the vocabulary leaves of t targets."""

  lse: jax.Array  # [t], log of the sum of all exponentials.
  picked: jax.Array  # [t], the targets' own logits.
  mean: jax.Array  # [t], of all logits; 0 without label smoothing.
  d_h: jax.Array | tuple  # [t, D], of this device's rows of the vocabulary.


def _tile(options, v):
  """The size of the tiles of a vocabulary of v, all equal."""
  return v // next(n for n in range(-(-v // options.tile), v + 1) if v % n == 0)


def _first_row(group, v):
  """The number of the first of the v rows of the vocabulary that are here."""
  return lax.axis_index(group.vocab) * v if group.vocab else 0


def _slope(raw, cap):
  """d softcap(raw) / d raw."""
  return 1.0 if cap is None else 1.0 - jnp.square(jnp.tanh(raw / cap))


def _one_pass(options, want_d_h, group, embedding, h, y, room):
  """Sums over the vocabulary, a tile at a time, relative to the top so far.

  As attention does it (arXiv 2112.05682, 2205.14135) with the embedding as keys
  and as values.

  Returns:
    _Seen, and `room` [V, t or more], unless it is (), with the logits before
    the cap in its first t columns.
  """
  (v, d), t, cap = embedding.shape, len(h), options.cap
  tile = _tile(options, v)
  offset = _first_row(group, v)

  def one_tile(i, carry):
    top, norm, picked, total, d_h, d_mean, room = carry
    part = lax.dynamic_slice_in_dim(embedding, i * tile, tile).astype(h.dtype)
    # [tile, t]: the vocabulary first is what a CPU multiplies fastest.
    raw = jnp.einsum(
      'vd,td->vt', part, h, preferred_element_type=options.logits_dtype
    )
    logits = attention.softcap(raw, cap)
    new_top = jnp.maximum(top, jnp.max(logits, axis=0))
    shrink = jnp.exp(top - new_top)
    exps = jnp.exp(logits - new_top)
    norm = norm * shrink + jnp.sum(exps, axis=0)
    at = y - offset - i * tile
    found = jnp.take_along_axis(logits, at[None], axis=0, mode='clip')[0]
    picked += jnp.where((at >= 0) & (at < tile), found, 0.0)
    if options.smoothing:
      total += jnp.sum(logits, axis=0)
    if want_d_h and options.smoothing and cap is None:
      d_mean += jnp.sum(part.astype(jnp.float32), axis=0)
    elif want_d_h and options.smoothing:
      slope = _slope(raw, cap).astype(h.dtype)
      d_mean += jnp.einsum(
        'vt,vd->td', slope, part, preferred_element_type=jnp.float32
      )
    if want_d_h:
      weights = (exps * _slope(raw, cap)).astype(h.dtype)
      d_h = d_h * shrink[:, None] + jnp.einsum(
        'vt,vd->td', weights, part, preferred_element_type=jnp.float32
      )
    if not isinstance(room, tuple):
      raw = raw.astype(room.dtype)
      room = lax.dynamic_update_slice(room, raw, (i * tile, 0))
    return new_top, norm, picked, total, d_h, d_mean, room

  zeros = jnp.zeros(t, options.logits_dtype)
  d_h = jnp.zeros((t, d), jnp.float32) if want_d_h else ()
  d_mean = d_h if options.smoothing else ()
  start = (zeros - jnp.inf, zeros, zeros, zeros, d_h, d_mean, room)
  top, norm, picked, total, d_h, d_mean, room = lax.fori_loop(
    0, v // tile, one_tile, start
  )
  picked = group.sum(picked)
  whole = v * group.parts()
  mean = group.sum(total) / whole
  here, top = top, group.max(top)
  norm = group.sum(norm * jnp.exp(here - top))
  lse = jnp.log(norm) + top
  if want_d_h:
    at = y - offset
    own = (at >= 0) & (at < v)
    e_y = jnp.take(embedding, at, axis=0, mode='clip').astype(jnp.float32)
    # The slope at a logit that is capped already.
    slope = 1.0 if cap is None else 1.0 - jnp.square(picked / cap)
    own = (1 - options.smoothing) * own * slope
    d_h = d_h * jnp.exp(here - lse)[:, None] - e_y * own[:, None]
    if options.smoothing:
      d_h -= options.smoothing / whole * d_mean
  return _Seen(lse, picked, mean, d_h), room


def _outer(options, group, weight, lse, h, y, room, before):
  """d nll / d embedding [V, D] of t targets, a tile at a time.

  It is added to `before`; where that is None, it takes the place of the logits
  in `room` [V, D].
  """
  (v, _), t = room.shape, len(h)
  tile = _tile(options, v)
  offset = _first_row(group, v)

  def one_tile(i, out):
    raw = out if before is None else room
    raw = lax.dynamic_slice(raw, (i * tile, 0), (tile, t))
    raw = raw.astype(options.logits_dtype)
    onehot = jnp.arange(tile)[:, None] == y - offset - i * tile
    wanted = (1 - options.smoothing) * onehot
    if options.smoothing:
      wanted += options.smoothing / (v * group.parts())
    g = jnp.exp(attention.softcap(raw, options.cap) - lse) - wanted
    g = (g * _slope(raw, options.cap) * weight).astype(h.dtype)
    part = jnp.einsum('vt,td->vd', g, h, preferred_element_type=jnp.float32)
    if before is not None:
      part += lax.dynamic_slice_in_dim(out, i * tile, tile)
    return lax.dynamic_update_slice_in_dim(out, part, i * tile, 0)

  start = room if before is None else before
  return lax.fori_loop(0, v // tile, one_tile, start)


def _masked_nll_fwd(inputs, embedding, targets, mask, weight, options):
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
    weight.value,
  )
  protos = (inputs.value[:0], embedding.value[:0])  # Only their dtypes.
  return total, (d_inputs, d_embedding, protos)


def _masked_nll_bwd(options, residuals, g):
  del options
  d_inputs, d_embedding, (inputs, embedding) = residuals
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return (None,) * 5
  return (
    None
    if isinstance(d_inputs, tuple)
    else (g * d_inputs).astype(inputs.dtype),
    None
    if isinstance(d_embedding, tuple)
    else (g * d_embedding).astype(embedding.dtype),
    None,
    None,
    None,
  )


_masked_nll.defvjp(_masked_nll_fwd, _masked_nll_bwd, symbolic_zeros=True)
