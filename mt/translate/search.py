"""Greedy, sampled and beam search, as pure functions.

Of the model they know one function, which reads a token of each hypothesis and
gives logits and a cache; of the cache, nothing.

  B sentences, W hypotheses of each, M = B * W rows of the model, V vocabulary,
  T the most tokens that a hypothesis may have.

Beam search is the one whose beam shrinks (Marian, arXiv 1804.00344): at every
step the W - f best continuations stay, f being the hypotheses that have ended.
Those stay as well. A sentence is done when all have ended, or earlier, when no
living one can still come among the n best: its log-probability only falls, so
that its score cannot exceed log-probability / limit^length_penalty.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

Cache = Any
# (cache, and of a State: last, start, made, ancestors) ->
# (logits [V, M] float32, cache).
Step = Callable[
  [Cache, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Cache]
]


@dataclasses.dataclass(frozen=True)
class Search:
  """How the next tokens are chosen."""

  beam: int = 1  # Hypotheses at once; 1 is greedy.
  # A hypothesis of n tokens, the one that ends it included, has the score
  # log-probability / n^length_penalty.
  length_penalty: float = 1.0
  n_best: int = 1  # Hypotheses wanted; at most `beam`, unless sampled.
  temperature: float = 0.0  # Above 0, tokens are drawn, from p^(1/temperature).
  top_k: int = 0  # Drawn from so many most probable tokens only; 0 for all.
  top_p: float = 1.0  # From the fewest of these that have so much probability.
  seed: int = 0  # Of the draws.
  no_repeat_ngram: int = 0  # See `discourage`.
  repetition_penalty: float = 1.0

  @property
  def width(self) -> int:  # W.
    return self.n_best if self.temperature else self.beam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Where a search has got to."""

  numbers: jax.Array  # [B] int32, of the sentences, for their draws.
  start: jax.Array  # [B] int32, position of the prompt's last token.
  limits: jax.Array  # [B] int32, most tokens; 0 for a row without a sentence.
  made: jax.Array  # [B] int32, steps so far.
  last: jax.Array  # [B, W] int32, the token to be read next.
  tokens: jax.Array  # [B, W, T] int32, zero after the end.
  counts: jax.Array  # [B, W] int32, tokens, the one that ends it included.
  logp: jax.Array  # [B, W] float32, of those; -inf where there is none.
  live: jax.Array  # [B, W] bool, not ended yet.
  # [B, W, T] int32, the place of the hypothesis which read the n-th of the
  # tokens that this one goes on from; from `made` on, its own place.
  ancestors: jax.Array

  def dims(self) -> chex.Dimensions:
    b, w, t = self.tokens.shape
    return chex.Dimensions(B=b, W=w, M=b * w, T=t)


def start(
  search: Search,
  numbers: jax.Array,
  last: jax.Array,
  lengths: jax.Array,
  limits: jax.Array,
  width: int,
) -> State:
  """Before the first step; `width` is T, the other arguments are [B] int32.

  `last` is the last token of each prompt, `lengths` counts its tokens, at least
  1; `limits` are at most T.
  """
  dims = chex.Dimensions(B=len(last), W=search.width, T=width)
  chex.assert_shape([numbers, last, lengths, limits], dims['B'])
  # A beam's first step has one hypothesis to go on from, the empty one.
  place = jnp.arange(dims.W) < (dims.W if search.temperature else 1)
  live = place & (limits > 0)[:, None]
  return State(
    numbers=numbers,
    start=lengths - 1,
    limits=limits,
    made=jnp.zeros(dims['B'], jnp.int32),
    last=jnp.repeat(last[:, None], dims.W, 1),
    tokens=jnp.zeros(dims['BWT'], jnp.int32),
    counts=jnp.zeros(dims['BW'], jnp.int32),
    logp=jnp.where(live, jnp.float32(0), -jnp.inf),
    live=live,
    ancestors=_own_places(dims),
  )


def _own_places(dims):
  return jnp.broadcast_to(jnp.arange(dims.W)[:, None], dims['BWT'])


def score(search: Search, logp: jax.Array, counts: jax.Array) -> jax.Array:
  """What hypotheses are ranked by; see Search.length_penalty."""
  chex.assert_equal_shape([logp, counts])
  return logp / jnp.maximum(counts, 1).astype(float) ** search.length_penalty


def top(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """lax.top_k over the vocabulary: logits [V, M] -> values and tokens [k, M].

  Of equal ones the first token comes first. The k best of the vocabulary are
  among those of the k best tiles of it, each ranked by its own best: one pass
  for their maxima, ten times as fast on a CPU as argmax (BUILD_NOTES.md).
  """
  chex.assert_shape(logits, (None, None))
  tiles = _tiles(logits, -jnp.inf)
  _, tile, m = tiles.shape
  best = lax.top_k(jnp.max(tiles, 1).T, min(k, len(tiles)))[1]  # [M, tiles]
  best = jnp.sort(best)  # So that the first token comes first.
  found = jnp.take_along_axis(tiles, best.T[:, None], 0)  # [tiles, tile, M]
  values, at = lax.top_k(found.reshape(-1, m).T, k)
  tokens = jnp.take_along_axis(best, at // tile, 1) * tile + at % tile
  return values.T, tokens.T


def keep_probable(search: Search, logits: jax.Array) -> jax.Array:
  """Logits [V, M] with -inf for what is not to be drawn: top_k, then top_p.

  Tokens as probable as the last one of the top k, or of the top p (Holtzman et
  al., arXiv 1904.09751), stay too.
  """
  chex.assert_shape(logits, (None, None))
  if 0 < search.top_k < len(logits):
    least = lax.top_k(logits.T, search.top_k)[0][:, -1]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  if search.top_p == 1.0:
    return logits
  # A token stays if those more probable than it have less than top_p together.
  # The least probability for which this holds is found by bisection over the
  # bits of float32, which are ordered as the numbers are: 30 passes, exact, and
  # much faster than sorting a large vocabulary.
  probs = jax.nn.softmax(logits, 0)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    above = probs > middle.view(jnp.float32)
    stays = jnp.sum(jnp.where(above, probs, 0.0), 0) < search.top_p
    return jnp.where(stays, low, middle + 1), jnp.where(stays, middle, high)

  high = jnp.ones(logits.shape[1]).view(jnp.int32)  # Of probability 1.
  _, least = lax.fori_loop(0, 30, halve, (jnp.zeros_like(high), high))
  return jnp.where(probs >= least.view(jnp.float32), logits, -jnp.inf)


def discourage(search: Search, state: State, logits: jax.Array) -> jax.Array:
  """Logits [V, M] against repetitions, as CTranslate2 and transformers have it.

  With no_repeat_ngram = n a hypothesis gets no token that would end an n-gram
  which it has already. With repetition_penalty = p logits of tokens which it
  has are divided by p where positive, else multiplied with it (CTRL, arXiv
  1909.05858). Its own tokens count, not those of the prompt.
  """
  dims, n = state.dims(), search.no_repeat_ngram
  chex.assert_shape(logits, dims['*M'])
  vocab, column = len(logits), jnp.arange(dims.M)[:, None]
  tokens = state.tokens.reshape(dims['MT'])
  made = jnp.repeat(state.made, dims.W)[:, None]
  place = jnp.arange(dims.T)
  if search.repetition_penalty != 1.0:
    at = jnp.where(place < made, tokens, vocab)
    x = logits.at[at, column].get(mode='fill', fill_value=0)
    x = x * search.repetition_penalty ** jnp.where(x > 0, -1.0, 1.0)
    logits = logits.at[at, column].set(x, mode='drop')
  if n:
    # Token t repeats if the n - 1 before it are the last n - 1 that were made.
    repeats = (place >= n - 1) & (place < made)
    for i in range(1, n):
      last = jnp.take_along_axis(tokens, jnp.maximum(made - i, 0), 1)
      repeats &= jnp.roll(tokens, i, 1) == last
    at = jnp.where(repeats, tokens, vocab)
    logits = logits.at[at, column].set(-jnp.inf, mode='drop')
  return logits


def _draw(search, state, logits):
  """Tokens [M], drawn from logits [V, M].

  A draw depends on the seed, the sentence's number, the hypothesis' place and
  the step, and on nothing that stands in the batch with it.
  """
  dims = state.dims()

  def draw(number, place, made):
    key = jax.random.key(search.seed)
    for n in (number, place, made):
      key = jax.random.fold_in(key, n)
    return jax.random.uniform(key)

  drawn = jax.vmap(draw)(
    jnp.repeat(state.numbers, dims.W),
    jnp.tile(jnp.arange(dims.W), dims.B),
    jnp.repeat(state.made, dims.W),
  )
  return pick(keep_probable(search, logits / search.temperature), drawn)


def pick(logits: jax.Array, drawn: jax.Array) -> jax.Array:
  """The token at which the probabilities up to it come to more than `drawn`.

  With numbers [M] from 0 to 1 these are samples of logits [V, M]: of 262,144
  in a tenth of the time that a number for each logit takes on a CPU. The tile
  of the vocabulary is found first, then the token in it, so that few float32
  are added up. No token of probability 0 is ever picked.
  """
  chex.assert_shape(logits, (None, *drawn.shape))
  tiles = _tiles(jnp.exp(logits - jnp.max(logits, 0)), 0.0)
  sums = tiles.sum(1)
  tile, left = _first_above(sums, drawn * sums.sum(0))
  found = jnp.take_along_axis(tiles, tile[None, None], 0)[0]
  return tile * tiles.shape[1] + _first_above(found, left)[0]


def _first_above(parts, goal):
  """Where sums of the first parts [n, M] exceed a goal [M]; the rest of it."""
  upto = jnp.cumsum(parts, 0)
  above = (upto > goal) & (parts > 0)
  last = len(parts) - 1 - jnp.argmax(parts[::-1] > 0, 0)  # For want of digits.
  at = jnp.where(jnp.any(above, 0), jnp.argmax(above, 0), last)
  before = jnp.take_along_axis(upto - parts, at[None], 0)[0]
  return at, goal - before


def _tiles(x, filler):
  """[V, M] as [tiles, tile, M]: few of them, whatever divides V."""
  v, m = x.shape
  tile = next((n for n in range(512, 63, -1) if v % n == 0), 512)
  filled = jnp.pad(x, ((0, -v % tile), (0, 0)), constant_values=filler)
  return filled.reshape(-1, tile, m)


def _append(state, tokens, logp, longer, stop_ids):
  """Adds a token to each hypothesis for which `longer` holds: [B, W] all."""
  made = state.made + jnp.any(state.live, 1)
  ended = jnp.isin(tokens, stop_ids) | (made >= state.limits)[:, None]
  at = jnp.arange(state.tokens.shape[2]) == state.made[:, None, None]
  at &= longer[..., None]
  return dataclasses.replace(
    state,
    made=made,
    last=tokens,
    tokens=jnp.where(at, tokens[..., None], state.tokens),
    counts=state.counts + longer,
    logp=jnp.where(longer, logp, state.logp),
    live=longer & ~ended,
  )


def _candidates(state, logits, stop_ids):
  """What may become of a sentence's hypotheses: C = W + W + W * k candidates.

  The first W are the ended hypotheses as they are. The next W are the living
  ones, each ended by its most probable stop token; the others do not count, so
  that no text comes twice. The rest goes on with the k best other tokens.

  Returns the parent that each comes from, [C] int32, and its token and logp,
  [B, C] int32 and float32, -inf where there is no such candidate.
  """
  dims, norm = state.dims(), jax.nn.logsumexp(logits, 0)
  dims.k = min(dims.W, len(logits))
  ends = logits[stop_ids]
  is_end = jnp.zeros(len(logits), bool).at[stop_ids].set(True)
  others = jnp.where(is_end[:, None], -jnp.inf, logits)
  end_token = stop_ids[jnp.argmax(ends, 0)].reshape(dims['BW'])
  end_gain = (jnp.max(ends, 0) - norm).reshape(dims['BW'])
  gain, token = top(others, dims.k)
  gain = (gain - norm).T.reshape(dims['BWk'])
  ended = jnp.where(state.live, -jnp.inf, state.logp)
  alive = jnp.where(state.live, state.logp, -jnp.inf)
  grown = (alive[..., None] + gain).reshape(dims['B(Wk)'])
  logp = jnp.concatenate([ended, alive + end_gain, grown], 1)
  tokens = [state.last, end_token, token.T.reshape(dims['B(Wk)'])]
  place = jnp.arange(dims.W)
  parent = jnp.concatenate([place, place, jnp.repeat(place, dims.k)])
  return parent, jnp.concatenate(tokens, 1), logp


def _end_early(search, state):
  """Gives up living hypotheses that cannot come among the n best any more."""
  scores = score(search, state.logp, state.counts)
  ended = jnp.where(state.live, -jnp.inf, scores)
  last_wanted = lax.top_k(ended, search.n_best)[0][:, -1]
  best_alive = jnp.max(jnp.where(state.live, state.logp, -jnp.inf), 1)
  hope = last_wanted < score(search, best_alive, state.limits)
  live = state.live & hope[:, None]
  logp = jnp.where(state.live & ~live, -jnp.inf, state.logp)
  return dataclasses.replace(state, logp=logp, live=live)


def _beam(search, state, logits, stop_ids):
  """`advance` with the best continuations of all hypotheses of a sentence."""
  dims = state.dims()
  parent, token, logp = _candidates(state, logits, stop_ids)
  # All that have ended stay; the best of the others take the other places.
  ended = (jnp.arange(logp.shape[1]) < dims.W) & (logp > -jnp.inf)
  _, chosen = lax.top_k(jnp.where(ended, jnp.inf, logp), dims.W)
  parent = parent[chosen]
  token, logp = (jnp.take_along_axis(x, chosen, 1) for x in (token, logp))
  longer = (chosen >= dims.W) & (logp > -jnp.inf)
  read = jnp.arange(dims.T) <= state.made[:, None, None]
  ancestors = jnp.take_along_axis(state.ancestors, parent[..., None], 1)
  state = dataclasses.replace(
    state,
    tokens=jnp.take_along_axis(state.tokens, parent[..., None], 1),
    counts=jnp.take_along_axis(state.counts, parent, 1),
    logp=logp,
    ancestors=jnp.where(read, ancestors, _own_places(dims)),
  )
  return _end_early(search, _append(state, token, logp, longer, stop_ids))


def advance(
  search: Search, state: State, logits: jax.Array, stop_ids: jax.Array
) -> State:
  """One step, with logits [V, M] float32."""
  dims, stop_ids = state.dims(), jnp.asarray(stop_ids)
  chex.assert_shape(logits, dims['*M'])
  logits = discourage(search, state, logits)
  if search.temperature:
    tokens = _draw(search, state, logits)
  elif search.beam == 1:
    tokens = top(logits, 1)[1][0]
  else:
    return _beam(search, state, logits, stop_ids)
  gain = jnp.take_along_axis(logits, tokens[None], 0)[0]
  gain = (gain - jax.nn.logsumexp(logits, 0)).reshape(dims['BW'])
  logp, tokens = state.logp + gain, tokens.reshape(dims['BW'])
  return _append(state, tokens, logp, state.live, stop_ids)


def run(
  search: Search,
  step: Step,
  cache: Cache,
  state: State,
  stop_ids: jax.Array,
  floor: jax.Array | int = 0,
) -> tuple[Cache, State]:
  """Takes steps until at most `floor` sentences are not done.

  `step` is the model. `stop_ids` end a hypothesis: [n] int32, at least one.
  """

  def unfinished(carry):
    return jnp.sum(jnp.any(carry[1].live, 1)) > floor

  def body(carry):
    cache, s = carry
    logits, cache = step(cache, s.last, s.start, s.made, s.ancestors)
    return cache, advance(search, s, logits, stop_ids)

  return lax.while_loop(unfinished, body, (cache, state))
