"""What the machine can do, for `make bench`: float32 products, reading memory.

Products are of the shapes of Gemma 3 270M, through jax.jit, best of several.
"""

import time

import jax
import jax.numpy as jnp

from tests.benchmarks.sides import side

_D, _F, _V = 640, 2048, 262_144


def _best(run, rounds=5):
  """The least seconds of some runs, after one that compiles."""
  jax.block_until_ready(run())
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


def _product(m, k, n):
  """FLOP/s of [m, k] x [k, n]."""
  a, b, f = jnp.ones((m, k)), jnp.ones((k, n)), jax.jit(jnp.matmul)
  return 2 * m * k * n / _best(lambda: f(a, b))


def _bandwidth():
  """Bytes/s, of reading or of reading and writing in place."""
  x, v = jnp.ones((_V, _D)), jnp.ones(_D)
  read = jax.jit(jnp.matmul)
  seconds = [_best(lambda: read(x, v))]
  change = jax.jit(lambda x: x + 1, donate_argnums=0)

  def in_place():
    nonlocal x
    x = change(x)
    return x

  seconds.append(_best(in_place) / 2)
  return x.nbytes / min(seconds)


def _measure(job):
  shapes = (2048, _D, _F), (2048, _F, _D), (512, _D, _V), (_F, _F, _F)
  answer = {'gemm': max(_product(*shape) for shape in shapes)}
  # In a decoding step of so many rows, whichever side comes first.
  for rows in (job['batch'], job['batch'] * job['beam']):
    for name, wide in (('head', _V), ('block', _F)):
      answer[f'{name}_{rows}'] = max(
        _product(rows, _D, wide), _product(wide, _D, rows)
      )
  return answer | {'bandwidth': _bandwidth()}


if __name__ == '__main__':
  side.main({'roof': _measure})
