"""x @ w in forms that CPUs and TPUs are fast at: the numbers are the same."""

import chex
import jax
import jax.numpy as jnp


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """x @ w: [B, L, in], [in, out] -> [B, L, out].

  Autodiff would form the gradient of `w` as [out, in] and transpose it, which
  is slow on a CPU (docs/measurements.md); here `x` is transposed instead.
  """
  return x @ w


def _matmul_fwd(x, w):
  # What nobody differentiates by, such as a frozen `w`, costs no gradient.
  kept = x.value if w.perturbed else None, w.value if x.perturbed else None
  return x.value @ w.value, kept


def _matmul_bwd(kept, g):
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  d_w = None if x is None else jnp.einsum('bli,blo->io', x, g)
  return None if w is None else g @ w.T, d_w


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def of_heads(
  x: jax.Array, w: jax.Array, heads: tuple[int, int] | None = None
) -> jax.Array:
  """x @ w where heads are axes of the product, so that nothing is reshaped.

  A TPU, whose arrays are in tiles of two axes, copies an activation that is
  reshaped (docs/measurements.md).

  Args:
    x: [B, L, in], or [B, H, L, A] if `in` is heads and their width.
    w: [in, out].
    heads: (H, A), if `out` is heads and their width.

  Returns:
    [B, L, out], or [B, H, L, A].
  """
  chex.assert_rank([x, w], [{3, 4}, 2])
  x_axes, in_axes, in_shape = 'bli', 'i', w.shape[:1]
  if x.ndim == 4:
    x_axes, in_axes, in_shape = 'bhli', 'hi', (x.shape[1], x.shape[3])
  y_axes, out_axes, out_shape = 'blo', 'o', w.shape[1:]
  if heads:
    y_axes, out_axes, out_shape = 'bnlo', 'no', heads
  w = w.astype(x.dtype).reshape(*in_shape, *out_shape)
  return jnp.einsum(f'{x_axes},{in_axes}{out_axes}->{y_axes}', x, w)
