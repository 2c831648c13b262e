"""Keys and values of what has been read, and which of them a token sees.

All rows write into the same slot: what is read at time t stands in slot t mod S
until it is written over. A row's prompt is put into the slots before the time
of its first step. So the age of a slot says how far back its token is, and a
layer with a window has no more slots than its window has tokens. A row sees no
slot that is older than its text, so it can be given to another sentence at any
time.

The W hypotheses of a beam are W slots of their row at each step. They share
their prompt and are never copied: a list says whose tokens each goes on from.
"""

import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mt.gemma import attention
from mt.gemma import sharding
from mt.gemma import sizes

# k, v: [B, K, S, A] of each layer that has its own; time: [] int32, how many
# slots have been written so far.
Cache = dict[str, Any]
AXES = ('rows', 'kv_heads', 'slots', 'head')


def empty(
  cfg: sizes.ModelConfig,
  rows: int,
  slots: int,
  dtype: jnp.dtype,
  width: int | None = None,
) -> Cache:
  """A cache of zeros, S slots for each of B rows.

  Heads come first, as products want them: a GPU's compiler would have a copy of
  another order beside it.

  Args:
    cfg: the model's shape.
    rows: B.
    slots: S; of layers with a window fewer, if `width` is given: as many as
      tokens of so many hypotheses can be seen at once.
    dtype: of keys and values.
    width: W.
  """
  layers = {n: stack.cfg for stack in cfg.stacks() for n in stack.layers}
  own = [n for n in sorted(layers) if not layers[n].sharing_layers]

  def zeros(n):
    c, most = layers[n], slots
    if width:
      most = min(slots, attention.windows(cfg)[cfg.kind(n)] * width)
    return jnp.zeros((rows, c.num_kv_heads, most, c.head_dim), dtype)

  cache = {x: tuple(map(zeros, own)) for x in 'kv'}
  return cache | {'time': jnp.int32(0)}


def _ring(slots, width):
  """How many slots are used in turn: each step takes `width` of them."""
  return slots - slots % width


def write(
  kv: tuple[jax.Array, jax.Array],
  new: tuple[jax.Array, jax.Array],
  time: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of a layer with those of L tokens, read at `time`.

  Args:
    kv: two of [B, K, S, A].
    new: two of [B, K, L, A].
    time: [] int32, a multiple of L.
    mesh: over which they are split.
  """
  chex.assert_equal_shape_prefix([*kv, *new], 2)
  slot = time % _ring(kv[0].shape[2], new[0].shape[2])
  update = lax.dynamic_update_slice_in_dim

  def by_row(old, new, slot):
    slots = jnp.broadcast_to(slot, len(old))
    return jax.vmap(functools.partial(update, axis=1))(old, new, slots)

  def one(old, new):
    # A CPU's compiler would write all rows at once into copies; a TPU's makes
    # a loop of writing row by row.
    return lax.platform_dependent(
      old,
      sharding.constrain(new, mesh, AXES),
      slot,
      cpu=by_row,
      default=functools.partial(update, axis=2),
    )

  # Else a TPU's compiler fuses one layer with the next until its own stack
  # overflows (a prefill of 4 x 128 tokens of the 270M, libtpu 0.0.42).
  return lax.optimization_barrier(tuple(map(one, kv, new)))


def seen(
  cfg: sizes.ModelConfig,
  cache: Cache,
  start: jax.Array,
  made: jax.Array,
  ancestors: jax.Array,
) -> dict[str, jax.Array]:
  """Which slots each hypothesis sees, once its next token is written.

  Args:
    cfg: the model's shape.
    cache: before that.
    start, made, ancestors: see decode.step.

  Returns:
    Kind of layer, see ModelConfig.kind -> [B, W, S] bool.
  """
  chex.assert_equal_shape_prefix([start, made, ancestors], 1)
  # Layers of a kind have as many slots.
  slots = {cfg.kind(n): k.shape[2] for n, k in enumerate(cache['k'])}
  text = start, made, ancestors
  return {
    kind: _seen(*text, cache['time'], s, attention.windows(cfg)[kind])
    for kind, s in slots.items()
  }


def _seen(start, made, ancestors, time, slots, window):
  _, width, most = ancestors.shape
  ring, slot = _ring(slots, width), jnp.arange(slots)
  age = (time + width - 1 - slot) % ring  # In slots.
  back = age // width  # In steps.
  # Of the tokens that hypotheses have read; older slots have the prompt's.
  read = back <= made[:, None]
  of_prompt = age - (made[:, None] + 1) * (width - 1)
  distance = jnp.where(read, back, of_prompt)  # In positions.
  text = (distance <= (start + made)[:, None]) & (distance < window)
  text = (text & (slot < ring))[:, None]
  if width == 1:
    return text
  n = jnp.clip(made[:, None] - back, 0, most - 1)[:, None]
  own = jnp.take_along_axis(ancestors, n, 2) == width - 1 - age % width
  return text & (own | ~read[:, None])


def insert(cache: Cache, new: Cache, rows: jax.Array, width: int) -> Cache:
  """The cache with texts that `prefill` has read, as if read just now.

  Args:
    cache: of B rows.
    new: of G rows.
    rows: [G] int32, where they go; beyond B: nowhere.
    width: W.
  """
  chex.assert_shape(new['k'][0], (len(rows), None, None, None))
  time = cache['time']

  def put(old, new):
    slots, most = old.shape[2], new.shape[2]
    # A slot of the age 0 gets the newest. What is older than all is not seen.
    age = (time - 1 - jnp.arange(slots)) % _ring(slots, width)
    new = jnp.take(new, jnp.maximum(most - 1 - age, 0), axis=2)
    return old.at[rows].set(new, mode='drop')

  kv = {x: jax.tree.map(put, cache[x], new[x]) for x in 'kv'}
  return kv | {'time': time}


def resize(cache: Cache, rows: jax.Array, slots: int, width: int) -> Cache:
  """These rows [B] int32 in a cache of as many slots or fewer; W is `width`."""
  chex.assert_rank(rows, 1)
  time = cache['time']

  def move(x):
    old, most = _ring(x.shape[2], width), min(x.shape[2], slots)
    new, slot = _ring(most, width), jnp.arange(most)
    if new < old:
      written = time - 1 - (time - 1 - slot) % new
      x = jnp.take(x, written % old, axis=2)
    return x[rows, :, :most]

  # One after the other: they would take the memory of all at once.
  moved, before = {'k': [], 'v': []}, ()
  for name, arrays in moved.items():
    for x in cache[name]:
      x, _ = lax.optimization_barrier((x, before))
      arrays.append(before := move(x))
  return {k: tuple(v) for k, v in moved.items()} | {'time': time}
