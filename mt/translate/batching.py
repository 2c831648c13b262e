"""Continuous batching: a row takes the next prompt as soon as it is free.

Prompts wait in a queue, longest first, so that no long one is left alone at the
end. A group of them is read together (decode.prefill) and put into free rows
(`insert`); then all rows take steps (`decode`) until enough are free again.
When a shorter cache would do, or the queue is empty and few rows are left, the
rows move into a smaller batch (`resize`). So finished rows cost next to
nothing, and the shapes are few:

  prefill  by prompts and width      (batch / 4, 32 * 2^i)
  decode   by rows and cache slots   (batch / 4^i, 128 * 2^i)

`jax.jit` compiles each once in the life of the process, for equal Settings.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.translate import decode as decode_lib
from mt.translate import kv_cache
from mt.translate import search as search_lib

_SMALLEST_WIDTH = 32
SMALLEST_SLOTS = 128
_SLOTS_EACH = 1024  # Cache slots for each of batch_size.

Batch = tuple[kv_cache.Cache, search_lib.State]  # Of B sentences.


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all batches of a job have in common."""

  cfg: sizes.ModelConfig
  search: search_lib.Search
  stop_ids: tuple[int, ...]  # Tokens that end a hypothesis, at least one.
  # Most sentences at once; fewer where sentences * slots would exceed
  # 1024 * batch_size.
  batch_size: int
  dtype: str = 'float32'  # Of the activations and the cache.
  # Where the parameters are, if not on one device. The cache is split over it;
  # every process has all of what is decoded.
  mesh: Mesh | None = None
  pieces: int | None = None  # Of the tokenizer, see decode.step.
  never: tuple[int, ...] = ()  # Pieces that no text has, see decode.step.

  @property
  def batch_sizes(self) -> list[int]:
    """All rows, a quarter of them, a quarter of those, …, 1."""
    out = [self.batch_size]
    while out[-1] > 1:
      out.append(max(1, out[-1] // 4))
    return out

  def most_rows(self, slots: int) -> int:
    """Most sentences at once, of so many cache slots for each."""
    room = self.batch_size * _SLOTS_EACH // slots
    return next((n for n in self.batch_sizes if n <= room), 1)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is to be continued."""

  tokens: Sequence[int]  # At least one.
  limit: int  # Most tokens to make, at least 1.
  number: int = 0  # Decides its draws, if it is sampled.

  def slots(self, width: int) -> int:
    """Of the cache, that so many hypotheses may come to need."""
    return len(self.tokens) + (self.limit + 1) * width - 2


@dataclasses.dataclass(frozen=True)
class Hypothesis:
  """A continuation."""

  tokens: list[int]  # Without the one that ended it.
  end: int | None  # The token that ended it, or None at the limit.
  logp: float  # Natural log-probability, that of `end` included.
  score: float  # What the search ranks by.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
  """G prompts that are read together, but for the last token of each."""

  tokens: jax.Array  # [G, P] int32, right-aligned.
  last: jax.Array  # [G] int32, the last tokens: the first step reads them.
  lengths: jax.Array  # [G] int32, tokens of each, with the last: at least 1.
  limits: jax.Array  # [G] int32; 0 for what only fills up the group.
  numbers: jax.Array  # [G] int32, see Prompt.
  rows: jax.Array  # [G] int32, where they go; beyond the batch: nowhere.


def _place(settings, batch):
  """Says where a batch lives on the mesh, if there is one."""
  if settings.mesh is None:
    return batch
  cache, state = batch
  put = functools.partial(
    sharding.constrain, mesh=settings.mesh, axes=kv_cache.AXES
  )
  kv = {x: jax.tree.map(put, cache[x]) for x in 'kv'}
  whole = sharding.whole(settings.mesh)
  time, state = lax.with_sharding_constraint((cache['time'], state), whole)
  return kv | {'time': time}, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init(settings: Settings, size: int, slots: int) -> Batch:
  """A batch of `size` free rows."""
  zeros, search = jnp.zeros(size, jnp.int32), settings.search
  width = slots // search.width
  state = search_lib.start(search, zeros, zeros, zeros + 1, zeros, width)
  cache = kv_cache.empty(
    settings.cfg, size, slots, settings.dtype, search.width
  )
  return _place(settings, (cache, state))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
  settings: Settings, batch: Batch, group: Group, new: kv_cache.Cache
) -> Batch:
  """The batch, which is consumed, with a group that `prefill` has read."""
  cache, state = batch
  chex.assert_equal_shape_prefix([group.tokens, group.last, group.lengths], 1)
  begun = search_lib.start(
    settings.search,
    group.numbers,
    group.last,
    group.lengths,
    group.limits,
    state.dims().T,
  )
  cache = kv_cache.insert(cache, new, group.rows, settings.search.width)
  state = jax.tree.map(
    lambda old, new: old.at[group.rows].set(new, mode='drop'), state, begun
  )
  return _place(settings, (cache, state))


@functools.partial(jax.jit, static_argnums=(0, 4))
def resize(
  settings: Settings, batch: Batch, rows: jax.Array, taken: int, slots: int
) -> Batch:
  """Rows [B] int32 of a batch in one of their own, of as many slots or fewer.

  The first `taken` go on, the others are free.
  """
  cache, state = batch
  chex.assert_shape(rows, (None,))
  width = slots // settings.search.width
  cache = kv_cache.resize(cache, rows, slots, settings.search.width)
  state = jax.tree.map(lambda x: x[rows], state)
  state = dataclasses.replace(
    state,
    tokens=state.tokens[..., :width],
    ancestors=state.ancestors[..., :width],
    live=state.live & (jnp.arange(len(rows)) < taken)[:, None],
  )
  return _place(settings, (cache, state))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def decode(
  settings: Settings, batch: Batch, params: parameters.Params, floor: int
) -> Batch:
  """Takes steps until at most `floor` sentences run; the batch is consumed."""
  step = functools.partial(
    decode_lib.step,
    settings.cfg,
    params,
    mesh=settings.mesh,
    pieces=settings.pieces,
    never=settings.never,
  )
  stops = jnp.array(settings.stop_ids, jnp.int32)
  batch = search_lib.run(settings.search, step, *batch, stops, floor)
  return _place(settings, batch)


@dataclasses.dataclass
class Schedule:
  """Which prompts wait, and which are in which row: what the host knows."""

  waiting: list[int]  # Numbers of prompts, the longest first.
  taken: dict[int, int]  # Row -> its prompt; the other rows are free.
  size: int = 0  # Rows of the batch.
  slots: int = 0  # Of its cache.

  def group(self) -> int:  # How many prompts are to be read together next.
    return min(max(1, self.size // 4), len(self.waiting))


def bucket(length: int, smallest: int = _SMALLEST_WIDTH) -> int:
  """The next power of two, `smallest` at least."""
  return max(smallest, 1 << (length - 1).bit_length())


def _fit(settings, prompts, schedule, batch):
  """The batch in the smallest shape that will do for what is left."""
  taken, waiting = schedule.taken, schedule.waiting
  width, present = settings.search.width, [*taken.values(), *waiting[:1]]
  need = max(prompts[i].slots(width) for i in present)
  slots = bucket(need, SMALLEST_SLOTS)
  most = min(settings.most_rows(slots), len(taken) + len(waiting))
  size = min(n for n in settings.batch_sizes if n >= most)
  if (size, slots) == (schedule.size, schedule.slots):
    return batch
  schedule.size, schedule.slots = size, slots
  schedule.taken = dict(enumerate(taken.values()))
  if batch is None:
    return init(settings, size, slots)
  rows = np.array([*taken, *[0] * (size - len(taken))], np.int32)
  return resize(settings, batch, rows, np.int32(len(taken)), slots)


def _fill(settings, params, prompts, schedule, batch):
  """The batch with the next group of prompts in free rows."""
  size, n = schedule.size, schedule.group()
  rows = [row for row in range(size) if row not in schedule.taken][:n]
  chosen, schedule.waiting = schedule.waiting[:n], schedule.waiting[n:]
  schedule.taken |= zip(rows, chosen, strict=True)
  members = [prompts[i] for i in chosen]
  width = bucket(max(len(p.tokens) - 1 for p in members))
  empty = max(1, size // 4) - n
  members += [Prompt([0], limit=0)] * empty
  int32 = functools.partial(np.array, dtype=np.int32)
  group = Group(
    tokens=int32(
      [[*[0] * (width + 1 - len(p.tokens)), *p.tokens[:-1]] for p in members]
    ),
    last=int32([p.tokens[-1] for p in members]),
    lengths=int32([len(p.tokens) for p in members]),
    limits=int32([p.limit for p in members]),
    numbers=int32([p.number for p in members]),
    rows=int32(rows + [size] * empty),
  )
  cfg, dtype = settings.cfg, settings.dtype
  read = group.lengths - 1
  new = decode_lib.prefill(cfg, params, group.tokens, read, dtype)
  return insert(settings, batch, group, new)


def _floor(settings, schedule):
  """How few sentences are to run when `decode` ends."""
  if schedule.waiting:  # The next group fits in.
    return schedule.size - schedule.group()
  smaller = [n for n in settings.batch_sizes if n < schedule.size]
  return max(smaller, default=0)


def _hypotheses(settings, state, row):
  """The n best of a sentence that is done."""
  search, logp, counts = settings.search, state.logp[row], state.counts[row]
  scores = np.asarray(search_lib.score(search, logp, counts))
  out = []
  for w in np.argsort(-scores, kind='stable')[: search.n_best]:
    if np.isneginf(scores[w]):  # Fewer hypotheses than wanted.
      break
    tokens = state.tokens[row, w, : counts[w]].tolist()
    end = tokens.pop() if tokens[-1] in settings.stop_ids else None
    out.append(Hypothesis(tokens, end, float(logp[w]), float(scores[w])))
  return out


def decode_all(
  settings: Settings,
  params: parameters.Params,
  prompts: Sequence[Prompt],
  on_done: Callable[[int], None] = lambda done: None,
) -> list[list[Hypothesis]]:
  """The n best hypotheses of each prompt, best first.

  `params` are as decode.unstack returns them; `on_done` is called with the
  number of prompts that are done.
  """
  found: list[list[Hypothesis]] = [[] for _ in prompts]
  width = settings.search.width
  order = sorted(range(len(prompts)), key=lambda i: -prompts[i].slots(width))
  schedule, batch = Schedule(waiting=order, taken={}), None
  while schedule.waiting or schedule.taken:
    batch = _fit(settings, prompts, schedule, batch)
    while 0 < schedule.group() <= schedule.size - len(schedule.taken):
      batch = _fill(settings, params, prompts, schedule, batch)
    floor = np.int32(_floor(settings, schedule))
    batch = decode(settings, batch, params, floor)
    state = jax.device_get(batch[1])
    for row, i in list(schedule.taken.items()):
      if not state.live[row].any():
        found[i] = _hypotheses(settings, state, row)
        del schedule.taken[row]
    on_done(len(prompts) - len(schedule.waiting) - len(schedule.taken))
  return found
