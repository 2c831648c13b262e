"""Attention of packed rows by another's fused kernel, or by our own products.

A fused kernel (FlashAttention, arXiv 2205.14135) never writes [B, H, L, L] to
memory, forward or backward:

  xla      mt/gemma/attention.py: plain products, what the others are tested by
  tokamax  NVIDIA GPUs: OpenXLA's kernels, in Mosaic on Hopper and Blackwell, in
           Triton on older ones. Each query is told its first key, which says
           segments, window and causality at once: no mask exists, but for the
           one of [B, L, L] booleans that Triton's backward pass makes.
  splash   TPUs: JAX's own kernel, with segment ids and static windows

Heads of more than 256, which Gemma 4 has in its global layers, are left to xla.

cuDNN's attention is left out: through JAX it takes a mask as a dense bias, and
without one it would see over the borders of segments.
"""

from collections.abc import Callable
import functools

import chex
import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from mt.gemma import attention
from mt.gemma import sharding
from mt.gemma.sizes import ModelConfig

IMPLEMENTATIONS = ('xla', 'tokamax', 'splash')

# (q [B, H, L, A], k, v [B, K, L, A], kind of layer) -> [B, H, L, A]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_WIDEST_HEAD = 256  # Of a fused kernel.
_SPLASH_BLOCK = 512  # Most queries and keys in a block; 128 at least.


def against(cfg: ModelConfig, implementation: str) -> str:
  """Which layers are left to xla, if this is their shape, and why; or ''."""
  if implementation != 'xla' and cfg.head_dim > _WIDEST_HEAD:
    return (
      f'layers with heads of {cfg.head_dim}: {implementation} takes '
      f'{_WIDEST_HEAD} at most'
    )
  capped = implementation == 'tokamax' and cfg.attn_softcap is not None
  if capped and not _has_mosaic():
    return 'all layers: tokamax has no gradient under a soft cap on this card'
  return ''


def _has_mosaic():
  from tokamax._src import gpu_utils  # Only where it is wanted.

  return gpu_utils.is_sm90() or gpu_utils.is_sm100()  # Hopper, Blackwell.


def make_attend(
  cfg: ModelConfig,
  implementation: str,
  segment_ids: jax.Array,
  mesh: Mesh | None = None,
) -> Attend:
  """Attention within the segments of a batch, for all layers.

  Args:
    cfg: the model's shape.
    implementation: one of IMPLEMENTATIONS.
    segment_ids: [B, L] int32, each segment in one piece.
    mesh: of several devices, see mt/gemma/sharding.py.
  """
  chex.assert_rank(segment_ids, 2)
  implementation = 'xla' if against(cfg, implementation) else implementation
  if implementation == 'splash':
    return lambda q, k, v, kind: _on_mesh(
      cfg, mesh, functools.partial(_splash, cfg), q, k, v, segment_ids, kind
    )
  first = attention.first_keys(cfg, segment_ids)
  if implementation == 'xla':
    return lambda q, k, v, kind: attention.causal_attend(
      cfg, q, k, v, first[kind]
    )
  return lambda q, k, v, kind: _on_mesh(
    cfg, mesh, functools.partial(_tokamax, cfg), q, k, v, first[kind], kind
  )


def _on_mesh(cfg, mesh, run, q, k, v, seen, kind):
  """A kernel cannot be partitioned: each device runs it on what it has."""
  dims = cfg.dims()
  dims['B_L'] = q.shape[:3]
  chex.assert_shape(q, dims['BHLA'])
  chex.assert_shape([k, v], dims['BKLA'])
  chex.assert_shape(seen, dims['BL'])
  if mesh is None:
    return run(q, k, v, seen, kind)
  rows = sharding.split_over(mesh, 'rows', dims.B) or None
  heads = sharding.split_over(mesh, 'heads', dims.H) or None
  kv_heads = sharding.split_over(mesh, 'kv_heads', dims.K) or None
  if dims.K > 1 and kv_heads is None:
    heads = None  # A query head stays where its key head is.
  spec = PartitionSpec
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(
      spec(rows, heads),
      *(spec(rows, kv_heads),) * 2,
      spec(rows),
      spec(),
    ),
    out_specs=spec(rows, heads),
    check_vma=False,  # The kernels do not say over what they vary.
  )(q, k, v, seen, kind)


def _tokamax(cfg, q, k, v, first, kind):
  del kind  # `first` is this layer's.
  from tokamax._src.ops.attention import api
  from tokamax._src.ops.attention import base

  # The public function has no first keys: a dense mask would be needed.
  mask = base.Mask(is_causal=True, k_start=first[:, None])
  options = {'mask': mask, 'logits_scale': 1.0}
  places_first = [x.swapaxes(1, 2) for x in (q, k, v)]
  if _has_mosaic():
    out = api.IMPLEMENTATIONS['mosaic_gpu'](
      *places_first, logits_soft_cap=cfg.attn_softcap, **options
    )
  else:
    out = _triton()(*places_first, **options)
  return out.swapaxes(1, 2)


def _triton():
  """Its kernels in blocks that fit into 99 KB of shared memory.

  That is what a core of most cards has; with tokamax's own blocks, heads of 256
  in bfloat16 take 104, forward and backward.
  """
  from tokamax._src.ops.attention import pallas_triton as forward
  from tokamax._src.ops.attention import pallas_triton_vjp as backward

  speed = {'num_stages': 2, 'num_warps': 4}
  names = 'block_m1', 'block_n1', 'block_m2', 'block_n2'
  return forward.PallasTritonFlashAttention(
    config=forward.Config(block_q=64, block_k=32, **speed),
    vjp=backward.PallasTritonFlashAttentionVjp(
      config=backward.Config(**dict.fromkeys(names, 32), **speed)
    ),
  )


def _splash(cfg, q, k, v, segments, kind):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  b, h, length, a = q.shape
  groups = h // k.shape[1]
  q = q.reshape(b, -1, groups, length, a)  # Those of a key head: its kernel's.
  block = next(
    n for n in range(min(_SPLASH_BLOCK, length), 0, -128) if length % n == 0
  )
  blocks = splash.BlockSizes(*[block] * 8)

  def run(mask):
    kernel = splash.make_splash_mqa_single_device(
      splash.MultiHeadMask([mask] * groups),
      block_sizes=blocks,
      attn_logits_soft_cap=cfg.attn_softcap,
    )
    one_head = jax.vmap(kernel, (0, 0, 0, None))  # Of the keys.
    return jax.vmap(one_head)(q, k, v, splash.SegmentIds(segments, segments))

  shape = length, length
  if cfg.window is None or cfg.window >= length:
    out = run(splash.CausalMask(shape))
  else:
    out = lax.cond(
      kind == 1,
      lambda: run(splash.CausalMask(shape)),
      lambda: run(splash.LocalMask(shape, (cfg.window - 1, 0), 0)),
    )
  return out.reshape(b, h, length, a)
