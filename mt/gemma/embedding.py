"""Token vectors, looked up where the rows of their table are.

On a mesh each device has its rows of the vocabulary, see mt/gemma/sharding.py;
the table never moves.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt.gemma import sharding


def embed(
  table: jax.Array,
  tokens: jax.Array,
  dtype: jnp.dtype,
  mesh: Mesh | None = None,
  width: int | None = None,
) -> jax.Array:
  """Token vectors times sqrt(D): [V, D], [B, L] int32 -> [B, L, D].

  `width` is of the vectors, where a row of the table has several.
  """
  chex.assert_rank([table, tokens], 2)
  scale = jnp.sqrt(float(width or table.shape[-1])).astype(dtype)
  vocab = sharding.split_over(mesh, 'vocab', table.shape[0])
  if not vocab:
    return table[tokens].astype(dtype) * scale
  rows = sharding.split_over(mesh, 'rows', tokens.shape[0])
  shared = tuple(a for a in vocab if a in rows)
  others = tuple(a for a in vocab if a not in rows)

  def look_up(part, tokens):
    # The table stays where it is. Each device looks for the tokens of all who
    # share its rows; one of them finds a token, all others add zeros.
    if shared:
      tokens = lax.all_gather(tokens, shared, tiled=True)
    at = tokens - lax.axis_index(vocab) * part.shape[0]
    here = (at >= 0) & (at < part.shape[0])
    x = part[jnp.where(here, at, 0)].astype(dtype)
    x = jnp.where(here[..., None], x, 0)
    if shared:
      x = lax.psum_scatter(x, shared, tiled=True)
    return lax.psum(x, others)

  look_up = jax.shard_map(
    look_up,
    mesh=mesh,
    in_specs=(PartitionSpec(vocab), PartitionSpec(rows)),
    out_specs=PartitionSpec(rows),
  )
  return look_up(table, tokens) * scale


def add_grad(
  d_table: jax.Array, tokens: jax.Array, d_x: jax.Array, mesh: Mesh | None
) -> jax.Array:
  """Adds the gradient of `embed` to one that is there, in its memory.

  Args:
    d_table: [V, D], so far.
    tokens: [B, L] int32.
    d_x: [B, L, D], gradient of the token vectors.
    mesh: as in `embed`.

  Returns:
    [V, D].
  """
  dims = chex.Dimensions()
  dims['VD'], dims['BL'] = d_table.shape, tokens.shape
  chex.assert_shape(d_x, dims['BLD'])
  d_x = d_x * jnp.sqrt(float(dims.D)).astype(d_x.dtype)
  vocab = sharding.split_over(mesh, 'vocab', dims.V)
  rows = sharding.split_over(mesh, 'rows', dims.B)

  def add(part, tokens, d_x):
    if rows:
      tokens = lax.all_gather(tokens, rows, tiled=True)
      d_x = lax.all_gather(d_x, rows, tiled=True)
    at = tokens - (lax.axis_index(vocab) * len(part) if vocab else 0)
    at = jnp.where((at >= 0) & (at < len(part)), at, len(part))
    return part.at[at].add(d_x.astype(part.dtype), mode='drop')

  if mesh is None:
    return add(d_table, tokens, d_x)
  by_rows, by_vocab = PartitionSpec(rows or None), PartitionSpec(vocab or None)
  return jax.shard_map(
    add,
    mesh=mesh,
    in_specs=(by_vocab, by_rows, by_rows),
    out_specs=by_vocab,
    check_vma=False,  # Nothing is differentiated through it.
  )(d_table, tokens, d_x)
