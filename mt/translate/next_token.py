"""From logits to the next tokens: the best, a random draw, no repetitions.

V vocabulary, M hypotheses, T the most tokens that one may have.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp


def top(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """lax.top_k over the vocabulary: logits [V, M] -> values and tokens [k, M].

  Of equal ones the first token comes first.
  """
  chex.assert_shape(logits, (None, None))
  values, tokens = lax.platform_dependent(
    logits,
    tpu=lambda x: tuple(lax.top_k(x.T, k)),  # It would copy the tiles, twice.
    default=lambda x: _top_of_tiles(x, k),
  )
  return values.T, tokens.T


def _top_of_tiles(logits, k):
  """lax.top_k of the columns.

  The k best of the vocabulary are in the k tiles of it whose own best are the
  highest: one pass finds these, far faster on a CPU than argmax.
  """
  tiles = _tiles(logits, -jnp.inf)
  _, tile, m = tiles.shape
  best = lax.top_k(jnp.max(tiles, 1).T, min(k, len(tiles)))[1]  # [M, tiles]
  best = jnp.sort(best)  # So that the first token comes first.
  found = jnp.take_along_axis(tiles, best.T[:, None], 0)  # [tiles, tile, M]
  values, at = lax.top_k(found.reshape(-1, m).T, k)
  return values, jnp.take_along_axis(best, at // tile, 1) * tile + at % tile


def keep_probable(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Logits [V, M] with -inf for what is not to be drawn: top_k, then top_p.

  Tokens as probable as the last one of the top k (0 for all), or of the top p
  (Holtzman et al., arXiv 1904.09751), stay too.
  """
  chex.assert_shape(logits, (None, None))
  if 0 < top_k < len(logits):
    least = lax.top_k(logits.T, top_k)[0][:, -1]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  if top_p == 1.0:
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
    stays = jnp.sum(jnp.where(above, probs, 0.0), 0) < top_p
    return jnp.where(stays, low, middle + 1), jnp.where(stays, middle, high)

  high = jnp.ones(logits.shape[1]).view(jnp.int32)  # Of probability 1.
  _, least = lax.fori_loop(0, 30, halve, (jnp.zeros_like(high), high))
  return jnp.where(probs >= least.view(jnp.float32), logits, -jnp.inf)


def pick(logits: jax.Array, drawn: jax.Array) -> jax.Array:
  """The token at which the probabilities up to it come to more than `drawn`.

  With random numbers [M] from 0 to 1 these are samples of logits [V, M]: one
  number for each hypothesis, not one for each logit. The tile of the vocabulary
  is found first, then the token in it, so that few float32 are added up. No
  token of probability 0 is ever picked.
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
  # The last one that is not 0, where rounding leaves no sum above the goal.
  last = len(parts) - 1 - jnp.argmax(parts[::-1] > 0, 0)
  at = jnp.where(jnp.any(above, 0), jnp.argmax(above, 0), last)
  before = jnp.take_along_axis(upto - parts, at[None], 0)[0]
  return at, goal - before


def _tiles(x, filler):
  """[V, M] as [tiles, tile, M]: few of them, whatever divides V."""
  v, m = x.shape
  tile = next((n for n in range(512, 63, -1) if v % n == 0), 512)
  filled = jnp.pad(x, ((0, -v % tile), (0, 0)), constant_values=filler)
  return filled.reshape(-1, tile, m)


def discourage(
  logits: jax.Array,
  tokens: jax.Array,
  made: jax.Array,
  no_repeat_ngram: int,
  repetition_penalty: float,
) -> jax.Array:
  """Logits [V, M] against repetitions, as CTranslate2 and transformers have it.

  With no_repeat_ngram = n a hypothesis gets no token that would end an n-gram
  which it has already; 0 allows all. With repetition_penalty = p logits of
  tokens which it has are divided by p where positive, else multiplied with it
  (CTRL, arXiv 1909.05858). Its own tokens count, not those of the prompt.

  Args:
    logits: [V, M] float32.
    tokens: [M, T] int32 of each hypothesis.
    made: [M] int32, how many of them it has.
    no_repeat_ngram: n.
    repetition_penalty: p.
  """
  dims = chex.Dimensions()
  dims['VM'], dims['_T'] = logits.shape, tokens.shape
  chex.assert_shape(tokens, dims['MT'])
  chex.assert_shape(made, dims['M'])
  made, n = made[:, None], no_repeat_ngram
  place, column = jnp.arange(dims.T), jnp.arange(dims.M)[:, None]
  if repetition_penalty != 1.0:
    at = jnp.where(place < made, tokens, dims.V)
    x = logits.at[at, column].get(mode='fill', fill_value=0)
    x = x * repetition_penalty ** jnp.where(x > 0, -1.0, 1.0)
    logits = logits.at[at, column].set(x, mode='drop')
  if n:
    # Token t repeats if the n - 1 before it are the last n - 1 that were made.
    repeats = (place >= n - 1) & (place < made)
    for i in range(1, n):
      last = jnp.take_along_axis(tokens, jnp.maximum(made - i, 0), 1)
      repeats &= jnp.roll(tokens, i, 1) == last
    at = jnp.where(repeats, tokens, dims.V)
    logits = logits.at[at, column].set(-jnp.inf, mode='drop')
  return logits
