"""Greedy, sampled and beam search, as pure functions.

Of the model they know one function, which reads a token of each hypothesis and
gives logits and a cache; of the cache, nothing. How the next tokens are taken
from logits is in mt/translate/next_token.py.

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

from mt.translate import next_token

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
  no_repeat_ngram: int = 0  # See next_token.discourage.
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
  # [B, W, T] int32: token n of hypothesis w was read by hypothesis
  # ancestors[b, w, n], so that a beam copies no cache; w itself from `made` on.
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


def advance(
  search: Search, state: State, logits: jax.Array, stop_ids: jax.Array
) -> State:
  """The state with the tokens that follow from logits [V, M] float32."""
  dims, stop_ids = state.dims(), jnp.asarray(stop_ids)
  chex.assert_shape(logits, dims['*M'])
  logits = next_token.discourage(
    logits,
    state.tokens.reshape(dims['MT']),
    jnp.repeat(state.made, dims.W),
    search.no_repeat_ngram,
    search.repetition_penalty,
  )
  if search.temperature:
    tokens = _draw(search, state, logits)
  elif search.beam == 1:
    tokens = next_token.top(logits, 1)[1][0]
  else:
    return _beam(search, state, logits, stop_ids)
  gain = jnp.take_along_axis(logits, tokens[None], 0)[0]
  gain = (gain - jax.nn.logsumexp(logits, 0)).reshape(dims['BW'])
  logp, tokens = state.logp + gain, tokens.reshape(dims['BW'])
  return _append(state, tokens, logp, state.live, stop_ids)


def _append(state, tokens, logp, longer, stop_ids):
  """Adds a token [B, W] to each hypothesis for which `longer` [B, W] holds."""
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
  logits = logits / search.temperature
  logits = next_token.keep_probable(logits, search.top_k, search.top_p)
  return next_token.pick(logits, drawn)


def score(search: Search, logp: jax.Array, counts: jax.Array) -> jax.Array:
  """What hypotheses are ranked by; see Search.length_penalty."""
  chex.assert_equal_shape([logp, counts])
  return logp / jnp.maximum(counts, 1).astype(float) ** search.length_penalty


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
  gain, token = next_token.top(others, dims.k)
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
