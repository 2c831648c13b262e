"""The time of a program, counted in its text: against sums by hand."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import pytest

from mt.train import roofline
from mt.train import targets

H100, V5E = targets.CHIPS['h100'], targets.CHIPS['v5e']
RATE = 0.85 * 3.352e12  # Bytes a second.


def _flops(text, trips=1):
  found = roofline.kernels(text, None, trips)
  assert roofline.seconds(found) == 0  # Without a chip.
  return sum(k.flops * k.times for k in found)


def _compiled(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


def _program(*lines, more=''):
  body = '\n'.join(f'  {line}' for line in lines)
  return (
    f'HloModule m\n{more}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n'
  )


def test_loops_count_as_often_as_they_run():
  def f(x, w):
    y = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]
    stop = jnp.int32(jnp.sum(y))  # The compiler cannot know it.
    return lax.fori_loop(0, stop, lambda i, c: c @ w, y)

  text = _compiled(f, jnp.zeros((8, 16)), jnp.zeros((16, 16)))
  one = 2 * 8 * 16 * 16
  assert _flops(text, 0) == 7 * one
  assert _flops(text, 5) == 12 * one


@pytest.mark.parametrize('counter', ['s32', 'u32'])
def test_a_loop_that_ends_at_a_constant(counter):
  """A TPU's compiler counts the parts of what it sends with u32."""
  more = f"""
%body (p: {counter}[]) -> {counter}[] {{
  %p = {counter}[] parameter(0)
  %a = f32[8] constant(0)
  ROOT %b = f32[8] negate(%a)
}}

%condition (q: {counter}[]) -> pred[] {{
  %q = {counter}[] parameter(0)
  %n = {counter}[] constant(16)
  ROOT %c = pred[] compare(%q, %n), direction=LT
}}
"""
  loop = '%w = f32[8] while(%x), condition=%condition, body=%body'
  text = _program('%x = f32[8] parameter(0)', loop, more=more)
  assert [k.times for k in roofline.kernels(text, None)] == [16]


def test_of_a_conditional_the_slowest_branch_counts():
  def f(x, w):
    def wide(x):
      return x @ w @ w.T @ w

    return lax.cond(x[0, 0] > 0, lambda x: x @ w, wide, x)

  text = _compiled(f, jnp.zeros((8, 16)), jnp.zeros((16, 16)))
  assert _flops(text) == 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
  'line, sent',
  [
    ('all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}', 32 * 3),
    ('all-reduce(%x), replica_groups=[2,4]<=[8]', 2 * 32 * 0.75),
    ("reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", 24),
    ("all-to-all(%x), replica_groups=mesh['a'=8] {'a':(1)2}", 16),
    ('collective-permute(%x), source_target_pairs={{0,1}}', 32),
    ('all-reduce-start(%x, %y), replica_groups={{0,1}}', 64),
    ('all-reduce-done(%x)', 0),
    ('add(%x, %x)', 0),
  ],
)
def test_what_collectives_send(line, sent):
  text = _program(
    '%x = f32[8]{0} parameter(0)',
    '%y = f32[8]{0} parameter(1)',
    f'%z = (f32[8]{{0}}, f32[8]{{0}}) {line}',
  )
  found = roofline.kernels(text, H100)
  assert sum(k.sent for k in found) == sent
  if sent:
    assert found[0].seconds == pytest.approx(sent / 450e9 + 3e-6)


def test_traffic_of_a_compiled_program():
  mesh = jax.make_mesh(
    (8,),
    ('a',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices(),
  )
  split = NamedSharding(mesh, PartitionSpec('a'))
  whole = NamedSharding(mesh, PartitionSpec())
  gather = jax.jit(lambda x: x + 1, in_shardings=split, out_shardings=whole)
  text = gather.lower(jnp.zeros((64, 32))).compile().as_text()
  found = roofline.kernels(text, None)
  assert sum(k.sent for k in found) == 64 * 32 * 4 * 7 / 8


def test_a_kernel_takes_its_products_or_its_bytes():
  text = _program(
    '%x = bf16[4096,4096]{1,0} parameter(0)',
    '%big = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, '
    'rhs_contracting_dims={0}, metadata={op_name="jit(f)/layer/dot_general"}',
    '%row = bf16[1,4096]{1,0} slice(%x), slice={[0:1], [0:4096]}',
    '%one = bf16[1,4096]{1,0} dot(%row, %x), lhs_contracting_dims={1}',
    '%t = f32[4096,4096]{1,0} convert(%x)',
    '%tf32 = f32[4096,4096]{1,0} dot(%t, %t), lhs_contracting_dims={1}',
  )
  big, row, one, _, tf32 = roofline.kernels(text, H100)
  assert big.name == 'dot bf16[4096,4096] layer/dot_general'
  assert big.flops == 2 * 4096**3
  assert big.seconds == pytest.approx(2 * 4096**3 / (0.75 * 989e12) + 3e-6)
  assert row.moved == 2 * 2 * 4096  # Not all that it is a slice of.
  assert one.seconds == pytest.approx((4096**2 + 8192) * 2 / RATE + 3e-6)
  assert tf32.seconds == pytest.approx(2 * big.seconds - 3e-6)


@pytest.mark.parametrize('op', ['fusion', 'fusion-start'])
def test_a_fusion_reads_slices_and_writes_in_place(op):
  fused = """
%fused (p: f32[18,1024], q: s32[], u: f32[1,1024]) -> f32[18,1024] {
  %p = f32[18,1024]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %u = f32[1,1024]{1,0} parameter(2)
  %old = f32[1,1024]{1,0} dynamic-slice(%p, %q, %q)
  %new = f32[1,1024]{1,0} add(%old, %u)
  ROOT %put = f32[18,1024]{1,0} dynamic-update-slice(%p, %new, %q, %q)
}
"""
  text = _program(
    '%x = f32[18,1024]{1,0} parameter(0)',
    '%i = s32[] parameter(1)',
    '%u = f32[1,1024]{1,0} parameter(2)',
    f'ROOT %y = f32[18,1024] {op}(%x, %i, %u), kind=kLoop, calls=%fused',
    more=fused,
  )
  (kernel,) = roofline.kernels(text, H100)
  # Slice and update read, slice written; and the index.
  assert kernel.moved == 3 * 4 * 1024 + 4


def test_custom_calls():
  text = _program(
    '%x = bf16[512,256]{1,0} parameter(0)',
    '%y = (bf16[512,256]{1,0}, s8[128]{0}) custom-call(%x, %x), '
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    '%z = bf16[512,256]{1,0} custom-call(%x), custom_call_target="mosaic_gpu"',
  )
  gemm, attention = roofline.kernels(text, H100)
  assert gemm.flops == 2 * 512 * 256 * 256 and not gemm.opaque
  assert attention.opaque and attention.name.startswith('mosaic_gpu bf16')
  assert attention.seconds == pytest.approx(2 * 2 * 512 * 256 / RATE + 3e-6)


def test_a_tpu_takes_the_cycles_of_its_compiler():
  fused = """
%spread (p: bf16[8]) -> bf16[64] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]
}
"""
  cycles = 'calls=%spread, backend_config={"estimated_cycles":"1500"}'
  text = _program(
    '%x = bf16[8]{0} parameter(0)',
    f'%a = bf16[64]{{0}} fusion(%x), kind=kLoop, {cycles}',
    f'%b = bf16[64]{{0}} fusion(%x), kind=kLoop, {cycles}',
    '%c = bf16[8]{0} all-reduce(%x), replica_groups={{0,1}}',
    '%d = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"',
    '%e = bf16[8]{0} custom-call(), custom_call_target="AllocateBuffer"',
    more=fused,
  )
  a, b, c, d, e = roofline.kernels(text, V5E)
  assert a.seconds == b.seconds == 1500 / 1.5e9
  # One collective, spread over two fusions and hidden behind them.
  assert (a.sent, b.sent) == (16 * 7, 0)
  assert c.seconds == 16 / 200e9
  assert d.opaque and d.seconds == pytest.approx(32 / (0.85 * 0.819e12))
  assert not e.opaque and e.seconds == 0
