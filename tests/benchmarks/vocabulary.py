"""Products with the embedding, rows first or V first, side by side.

python -m tests.benchmarks.vocabulary
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from mt.gemma import loss

V, D = 262_144, 640


def best_of(functions, *args, rounds=7):
  """Median seconds of each function, taken in turns."""
  compiled = {name: jax.jit(f) for name, f in functions.items()}
  for f in compiled.values():
    jax.block_until_ready(f(*args))
  times = {name: [] for name in compiled}
  for _ in range(rounds):
    for name, f in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*args))
      times[name].append(time.perf_counter() - start)
  return {name: float(np.median(t)) for name, t in times.items()}


def main():
  key = jax.random.key(0)
  table = jax.random.normal(key, (V, D)) * 0.05
  hidden = jax.random.normal(key, (16, D))
  heads = {
    'rows first': lambda e, h: jnp.argmax(jnp.einsum('bd,vd->bv', h, e), 1),
    'V first': lambda e, h: jnp.argmax(jnp.einsum('vd,bd->vb', e, h), 0),
  }
  for name, seconds in best_of(heads, table, hidden).items():
    rate = 2 * V * D * 16 / seconds / 1e9
    print(
      f'decoding head, 16 rows, {name}: {seconds:.3f} s, {rate:.0f} GFLOP/s'
    )

  hidden = jax.random.normal(key, (1, 256, D))
  tokens = jax.random.randint(key, (1, 256), 0, V)
  mask = (jnp.arange(256) >= 100) & (jnp.arange(256) < 233)
  weights = mask[None].astype(jnp.float32)

  def gradient(chunk):
    return lambda e, h: jax.value_and_grad(
      lambda x: loss.target_nll(x, e, tokens, weights, chunk=chunk),
      has_aux=True,
    )(h)

  chunks = {c: gradient(c) for c in (16, 32, 48, 64, 72, 96, 136)}
  for chunk, seconds in best_of(chunks, table, hidden).items():
    rate = 4 * V * D * 133 / seconds / 1e9
    print(
      f'loss and gradient, 133 targets, chunks of {chunk}: {seconds:.3f} s, '
      f'{rate:.0f} GFLOP/s useful'
    )


if __name__ == '__main__':
  main()
