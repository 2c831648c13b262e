"""A batch whose rows are given to the next prompt as soon as they are free.

Prompts wait in a queue, longest first, so that no long one is left alone at the
end. A few of them are read together (`prefill`) and put into free rows; then
all rows take steps until enough are free again. When a shorter cache would do,
all move into one; when the queue is empty and few rows are left, they move into
a smaller batch. So finished rows cost next to nothing, and the shapes, each
compiled once, are few:

  prefill  by prompts and width      (batch / 4, 32 · 2^i)
  steps    by rows and cache slots   (batch / 4^i, 128 · 2^i)

If there are many prompts, all of that is compiled before the first of them is
read: a long job does not stop to compile in its middle.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mt.base import compiling
from mt.gemma import model
from mt.gemma import sharding
from mt.gemma import sizes
from mt.translate import decode
from mt.translate import search as search_lib

_SMALLEST_WIDTH = 32
_SMALLEST_SLOTS = 128
_SLOTS_EACH = 1024  # Cache slots for each of batch_size.
_MANY = 16  # Prompts for each of batch_size.


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is to be continued.

  Attributes:
    tokens: at least one.
    limit: most tokens to make, at least 1.
    number: decides its draws, if it is sampled.
  """

  tokens: Sequence[int]
  limit: int
  number: int = 0

  @property
  def slots(self) -> int:
    """Cache slots that it may come to need."""
    return len(self.tokens) + self.limit


@dataclasses.dataclass(frozen=True)
class Hypothesis:
  """A continuation.

  Attributes:
    tokens: without the one that ended it.
    end: the token that ended it, or None at the limit.
    logp: natural log-probability, that of `end` included.
    score: what the search ranks by.
  """

  tokens: list[int]
  end: int | None
  logp: float
  score: float


Batch = tuple[decode.Cache, search_lib.State]  # Of M rows, of B sentences.

# (params, prompts, on_done) -> the n best hypotheses of each prompt, best
# first. `params` as decode.unstack returns them; on_done is called with the
# number of prompts that are done.
Decoder = Callable[..., list[list[Hypothesis]]]


def bucket(length: int, smallest: int = _SMALLEST_WIDTH) -> int:
  """The next power of two, `smallest` at least."""
  chex.assert_scalar_positive(length)
  return max(smallest, 1 << (length - 1).bit_length())


def _slots(prompt):
  """Of the shortest cache that will do."""
  return bucket(prompt.slots, _SMALLEST_SLOTS)


def _levels(prompts):
  """The lengths that the cache takes, one after the other."""
  return sorted({_slots(p) for p in prompts}, reverse=True)


def batch_sizes(batch_size: int) -> list[int]:
  """All rows, a quarter of them, a quarter of those, …, 1."""
  chex.assert_scalar_positive(batch_size)
  out = [batch_size]
  while out[-1] > 1:
    out.append(max(1, out[-1] // 4))
  return out


def make_decoder(
  cfg: sizes.ModelConfig,
  search: search_lib.Search,
  stop_ids: Sequence[int],
  *,
  batch_size: int,
  dtype: jnp.dtype = jnp.float32,
  mesh: Mesh | None = None,
) -> Decoder:
  """See Decoder; each shape is compiled once.

  Args:
    cfg: the model's shape.
    search: see Search.
    stop_ids: tokens that end a hypothesis, at least one.
    batch_size: most prompts at once. They are fewer where
      prompts * search.width * slots would exceed 1024 * batch_size.
    dtype: of the activations and the cache.
    mesh: where the parameters are, if not on one device. The cache is split
      over it; every process has all of what is decoded.
  """
  stops = np.array(stop_ids, np.int32)
  chex.assert_rank(stops, 1)
  steps = batch_sizes(batch_size)

  def capacity(slots):
    most = batch_size * _SLOTS_EACH // (slots * search.width)
    return next((n for n in steps if n <= most), 1)

  def group_of(size):
    """How many prompts are read together."""
    return max(1, size // 4)

  def places(size, slots):
    """Where a batch lives, for jax.jit."""
    if mesh is None:
      return {}
    rows = size * search.width
    axes, units = ('rows', 'slots', 'kv_heads', 'head'), cfg.num_kv_heads
    cache = sharding.place(mesh, axes, (rows, slots, units, cfg.head_dim))
    return {'out_shardings': (cache, sharding.whole(mesh))}

  @functools.cache
  def maker(size, slots):
    def empty():
      return _empty(cfg, search, size, slots, dtype)

    return compiling.jit_once(empty, **places(size, slots))

  @functools.cache
  def reader(group, width):
    del group, width  # One compilation for each of them.

    def prefill(params, tokens):
      return decode.prefill(cfg, params, tokens, dtype)

    return compiling.jit_once(prefill)

  @functools.cache
  def putter(size, slots, group, width):
    del group, width
    put = functools.wraps(_put)(functools.partial(_put, search))
    return compiling.jit_once(put, donate_argnums=0, **places(size, slots))

  @functools.cache
  def mover(size, slots, new_size, new_slots):
    del size, slots

    def move(batch, rows, taken):
      return _move(search, batch, rows, taken, new_slots)

    return compiling.jit_once(move, **places(new_size, new_slots))

  @functools.cache
  def stepper(size, slots):
    def run(batch, params, floor):
      step = functools.partial(decode.step, cfg, params)
      return search_lib.run(search, step, *batch, stops, floor)

    return compiling.jit_once(run, donate_argnums=0, **places(size, slots))

  def fill(params, batch, shape, chosen, free):
    """Reads the chosen prompts, a group at most, into free rows."""
    group = group_of(shape[0])
    width = bucket(max(len(p.tokens) for p in chosen))
    tokens = np.zeros((group, width), np.int32)
    # A row that is not there takes what fills up the group.
    rows = np.full(group, shape[0], np.int32)
    lengths, limits = np.ones(group, np.int32), np.zeros(group, np.int32)
    numbers = np.zeros(group, np.int32)
    for n, p in enumerate(chosen):
      tokens[n, : len(p.tokens)] = p.tokens
      rows[n], lengths[n] = free[n], len(p.tokens)
      limits[n], numbers[n] = p.limit, p.number
    new = reader(group, width)(params, tokens)
    put = putter(*shape, group, width)
    return put(batch, new, tokens, rows, lengths, limits, numbers)

  rehearsed = set()

  def rehearse(params, prompts):
    """Compiles what so many prompts will need, the largest shapes first.

    It goes through the shapes as `decode_all` does, without taking a step.
    """
    needs = frozenset((_slots(p), bucket(len(p.tokens))) for p in prompts)
    if needs in rehearsed:
      return
    rehearsed.add(needs)
    full = [(capacity(slots), slots) for slots in _levels(prompts)]
    most, shortest = full[-1]
    shapes = full + [(n, shortest) for n in steps if n < most]
    batch = maker(*shapes[0])()
    for before, shape in zip([shapes[0], *shapes], shapes, strict=False):
      size, slots = shape
      if shape != before:
        rows = np.zeros(size, np.int32)
        batch = mover(*before, *shape)(batch, rows, np.int32(0))
      widths = {w for s, w in needs if s <= slots and shape in full}
      for width in sorted(widths):
        nothing = Prompt([0] * width, 0)
        batch = fill(params, batch, shape, [nothing], [0])
      batch = stepper(*shape)(batch, params, np.int32(size))

  def decode_all(
    params: model.Params,
    prompts: Sequence[Prompt],
    on_done: Callable[[int], None] = lambda done: None,
  ) -> list[list[Hypothesis]]:
    waiting = sorted(range(len(prompts)), key=lambda i: -prompts[i].slots)
    if len(prompts) >= _MANY * batch_size:
      rehearse(params, prompts)
    out: list[list[Hypothesis]] = [[] for _ in prompts]
    batch, levels = None, _levels(prompts)  # The first is the cache's length.
    owners: list[int | None] = []  # The prompt of each row.
    while waiting or any(i is not None for i in owners):
      taken = [row for row, i in enumerate(owners) if i is not None]
      free = [row for row, i in enumerate(owners) if i is None]
      need = [_slots(prompts[i]) for i in owners if i is not None]
      need += [_slots(prompts[i]) for i in waiting[:1]]
      # One level at a time, so that few moves are compiled.
      slots, shorter = levels[0], levels[:2][-1]
      wanted = shorter if shorter >= max(need) else slots
      most = min(capacity(wanted), len(taken) + len(waiting))
      size = min(n for n in steps if n >= most)

      if (size, wanted) != (len(owners), slots):
        rows = np.array(taken + [0] * (size - len(taken)), np.int32)
        if batch is None:
          batch = maker(size, wanted)()
        else:
          move = mover(len(owners), slots, size, wanted)
          batch = move(batch, rows, np.int32(len(taken)))
        owners = [owners[row] for row in taken] + [None] * (size - len(taken))
        levels = levels[levels.index(wanted) :]
        continue

      enough = min(group_of(len(owners)), len(waiting))
      if waiting and len(free) >= enough:
        chosen, waiting = waiting[:enough], waiting[enough:]
        for row, i in zip(free, chosen, strict=False):
          owners[row] = i
        chosen = [prompts[i] for i in chosen]
        shape = len(owners), slots
        batch = fill(params, batch, shape, chosen, free)
        continue

      if not waiting:  # Until the rest fits into a smaller batch.
        floor = max((n for n in steps if n < len(owners)), default=0)
      else:  # Until a group fits in.
        floor = len(owners) - enough
      batch = stepper(len(owners), slots)(batch, params, np.int32(floor))
      state = jax.device_get(batch[1])
      for row in taken:
        if not state.live[row].any():
          out[owners[row]] = _hypotheses(search, stops, state, row)
          owners[row] = None
      on_done(len(prompts) - len(waiting) - sum(i is not None for i in owners))
    return out

  return decode_all


def _empty(cfg, search, size, slots, dtype) -> Batch:
  zeros = jnp.zeros(size, jnp.int32)
  cache = decode.empty_cache(cfg, size * search.width, slots, dtype)
  return cache, search_lib.start(search, zeros, zeros, zeros + 1, zeros, slots)


def _places(search, rows):
  """Rows of sentences -> rows of the cache."""
  return (rows[:, None] * search.width + jnp.arange(search.width)).reshape(-1)


def _put(search, batch, new, tokens, rows, lengths, limits, numbers) -> Batch:
  """Gives rows [G] to the prompts [G, P] whose cache is `new`."""
  cache, state = batch
  g, p = tokens.shape
  last = tokens[jnp.arange(g), lengths - 1]
  begun = search_lib.start(
    search, numbers, last, lengths, limits, state.tokens.shape[-1]
  )
  places = _places(search, rows)

  def put(old, new):
    new = jnp.repeat(new, search.width, 0)
    return old.at[places, :p].set(new, mode='drop')

  return jax.tree.map(put, cache, new), jax.tree.map(
    lambda old, new: old.at[rows].set(new, mode='drop'), state, begun
  )


def _move(search, batch, rows, taken, slots) -> Batch:
  """Moves `rows` into a batch of their own; the first `taken` of them live.

  It has as many slots, or fewer.
  """
  cache, state = batch
  places = _places(search, rows)
  cache = jax.tree.map(lambda x: x[places, :slots], cache)
  state = jax.tree.map(lambda x: x[rows], state)
  state = dataclasses.replace(
    state,
    tokens=state.tokens[..., :slots],
    live=state.live & (jnp.arange(len(rows)) < taken)[:, None],
  )
  return cache, state


def _hypotheses(search, stop_ids, state, row) -> list[Hypothesis]:
  scores = np.asarray(
    search_lib.score(search, state.logp[row], state.counts[row])
  )
  out = []
  for w in np.argsort(-scores, kind='stable')[: search.n_best]:
    if np.isneginf(scores[w]):  # Fewer hypotheses than wanted.
      break
    tokens = state.tokens[row, w, : state.counts[row, w]].tolist()
    end = tokens.pop() if tokens[-1] in stop_ids else None
    out.append(
      Hypothesis(tokens, end, float(state.logp[row, w]), float(scores[w]))
    )
  return out
