"""What a run would take, told before it starts, by the target's compiler.

  python train.py --config=configs/….py --plan --on=h100

The programs of a run (mt/train/programs.py) are compiled from shapes alone;
nothing is read, downloaded or computed. Without --on they are compiled for the
devices here; a CPU's compiler stands in for as many devices as the mesh has,
which is a guess: it partitions as the others do, but has no bfloat16, so that
activations and what is sent count up to twice.

Each run asks for less, by arithmetic on shapes: whether a step can fit at all,
before anything is read or compiled (`check_memory`).
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
import sys

import jax
from jax.extend import backend
from jax.sharding import Mesh
import ml_collections
import psutil

from mt.base import errors
from mt.base import journal
from mt.base import screen
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import alternatives
from mt.train import machine
from mt.train import programs
from mt.train import roofline
from mt.train import settings
from mt.train import targets

_SHOWN = 10  # Kernels of each program, those that are alike as one.
# Of version 2 and 1: limit, in use, and in which file under which key it says
# what of that is dropped where memory is short: files that were read.
_CGROUPS = (
  ('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
  (
    'memory/memory.limit_in_bytes',
    'memory/memory.usage_in_bytes',
    'memory/memory.stat',
    'total_inactive_file',
  ),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The programs of a run, and what to change if one does not fit."""

  target: targets.Target
  used: int  # Devices of the target, by the mesh.
  programs: list[programs.Program]
  alternatives: list[str]

  @property
  def fits(self) -> bool:
    return not _too_large(self.programs, self.target)


def run(
  config: ml_collections.ConfigDict, on: str = '', as_json: bool = False
) -> None:
  """Prints what a run with `config` would take.

  Args:
    config: of the run.
    on: see targets.compile_only; '' for the devices here.
    as_json: print one JSON object on stdout, and all else on stderr.

  Raises:
    errors.UserError: no such target; the mesh or the batch does not fit it.
  """
  out = sys.stderr if as_json else sys.stdout
  with contextlib.redirect_stdout(out):
    settings.check(config)
    target = targets.compile_only(on) if on else here(config.mesh)
    plan = make_plan(config, target)
  if as_json:
    print(json.dumps(to_json(plan)))
    screen.check()


def here(mesh: ml_collections.ConfigDict) -> targets.Target:
  """The devices of this machine; of CPUs as many as the mesh has."""
  first = jax.devices()[0]
  number = math.prod(max(mesh[a], 1) for a in sharding.MESH_AXES)
  if first.platform == 'cpu' and number > len(jax.devices()):
    backend.clear_backends()
    jax.config.update('jax_num_cpu_devices', number)
  # On an accelerator it is what JAX has set apart for the process.
  usable = available() if first.platform != 'cpu' else 0.9 * available()
  chip = targets.chip_of(first.device_kind)
  return targets.Target(first.device_kind, jax.devices(), usable, chip)


def make_plan(
  config: ml_collections.ConfigDict, target: targets.Target
) -> Plan:
  """Compiles a run's programs for a target, and says what each takes."""
  kind, asked = target.devices[0].device_kind, config
  config = machine.resolve(asked, target.platform, kind, target.usable)
  machine.say_chosen(asked, config)
  machine.check_attention(config, target.platform)
  machine.say_attention(config, programs.model_size(config.weights))
  machine.set_precision(config)
  mesh = sharding.make_mesh(config.mesh, target.devices)
  used, there = 1 if mesh is None else mesh.size, len(target.devices)
  journal.say(
    f'{target.name}: {used} of {there} devices, {_size(target.usable)} of each '
    'usable'
  )
  if target.platform == 'cpu':
    journal.say(
      'a guess: compiled for CPUs; `make plan ON=h100` asks an accelerator'
    )
  made = []
  for program in programs.compile_run(config, target):
    made.append(program)
    journal.say(describe(program, target))
  tried = list(find_alternatives(config, target, made))
  for sentence in tried:
    journal.say(sentence)
  return Plan(target, used, made, tried)


def describe(program: programs.Program, target: targets.Target) -> str:
  """A program for a person: verdict, memory, traffic, and what takes time."""
  kernels, total = program.kernels, program.bytes['total']
  verdict = 'fits' if total <= target.usable else 'DOES NOT FIT'
  timed = roofline.seconds(kernels)
  estimate = f'about {timed * 1e3:.2f} ms' if timed else 'no estimate of time'
  kinds = ', '.join(f'{k} {n / 1e9:.3f}' for k, n in program.bytes.items())
  lines = [
    f'{program.name}: {_size(total)}, {verdict}; {estimate}; compiled in '
    f'{program.compile_seconds:.0f} s',
    f'  GB: {kinds}',
  ]
  if sent := _sent(program):
    lines.append(f'  collectives: {sent / 1e9:.3f} GB to each device')
  if hidden := roofline.seconds([k for k in kernels if k.opaque]):
    lines.append(
      f'  {hidden * 1e3:.2f} ms are of custom kernels, by their bytes alone'
    )
  alike = collections.Counter()  # Layers of a decoding step are no loop.
  for k in kernels:
    alike[k.name, k.seconds] += k.times
  costs = [
    (times * each, times, each, name) for (name, each), times in alike.items()
  ]
  for cost, times, each, name in sorted(costs, reverse=True)[:_SHOWN]:
    if cost:
      lines.append(
        f'  {cost * 1e3:9.3f} ms = {times:5} x {each * 1e6:8.1f} us  {name}'
      )
  return '\n'.join(lines)


def to_json(plan: Plan) -> dict:
  """The plan for a program; bytes and seconds are of one device."""

  def one(p):
    return {
      'name': p.name,
      'seconds': roofline.seconds(p.kernels) or None,
      'bytes': p.bytes['total'],
      'bytes_by_kind': {k: v for k, v in p.bytes.items() if k != 'total'},
      'bytes_received': _sent(p),
      'compile_seconds': p.compile_seconds,
      'fits': p.bytes['total'] <= plan.target.usable,
    }

  return {
    'target': plan.target.name,
    'fits': plan.fits,
    'guess': plan.target.platform == 'cpu',
    'devices': plan.used,
    'usable_bytes': plan.target.usable,
    'programs': [one(p) for p in plan.programs],
    'alternatives': plan.alternatives,
  }


def _sent(program):
  return sum(k.sent * k.times for k in program.kernels)


def _too_large(made, target):
  return [p for p in made if p.bytes['total'] > target.usable]


def find_alternatives(
  config: ml_collections.ConfigDict,
  target: targets.Target,
  made: list[programs.Program],
) -> Iterator[str]:
  """Knobs with which the programs that do not fit would, a sentence each."""
  cfg = programs.model_size(config.weights)
  mesh = sharding.make_mesh(config.mesh, target.devices)
  too_large = [p.name for p in _too_large(made, target)]
  for stage in (programs.TRAINING, programs.DECODING):
    failed = tuple(name for name in stage if name in too_large)
    if not failed:
      continue
    training, names = stage == programs.TRAINING, ', '.join(failed)

    def fits(other, failed=failed, training=training):
      if training and needed(cfg, other, mesh) > target.usable:
        return False  # No need to compile it.
      tried = programs.compile_run(other, target, failed)
      return all(p.bytes['total'] <= target.usable for p in tried)

    shards = sharding.row_shards(mesh)
    found = alternatives.find(config, shards, training, fits)
    for change in found:
      flags = ' '.join(f'--config.{k}={v}' for k, v in change.items())
      yield f'{names}: fits with {flags} (tried)'
    if not found:
      yield (
        f'{names}: nothing that was tried fits; a smaller weights.size or a '
        'larger mesh.fsdp, on more devices, may'
      )


def available(root: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Bytes that a device of this process can still give.

  `root` is where Linux tells the limits of this process's control group.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    return stats.get('bytes_limit', 1 << 62) - stats.get('bytes_in_use', 0)
  free = psutil.virtual_memory().available
  for *names, stat, key in _CGROUPS:
    try:
      limit, used = (int((root / name).read_text('utf-8')) for name in names)
    except (OSError, ValueError):  # There is none, or it is 'max'.
      continue
    with contextlib.suppress(OSError):
      lines = (root / stat).read_text('utf-8').splitlines()
      used -= int(dict(line.split() for line in lines).get(key, 0))
    free = min(free, limit - used)
  return free // len(jax.local_devices())  # They share it.


def needed(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> int:
  """Bytes on one device: state, gradients, and what the backward pass reads.

  Of the latter only what no compiler can leave out: the input of each layer
  and, as `train.remat` says, the result of its last product, or what all its
  products with weights read. With a pattern in `train.parts` that may be
  nothing.
  """
  train = config.train
  state = programs.abstract_state(cfg, config, mesh)
  total = programs.bytes_of(state) + programs.bytes_of(state.trained)
  if train.parts not in ('all', 'blocks', 'lora'):
    return total
  rows = train.batch_size // train.micro_batches // sharding.row_shards(mesh)
  width = 0  # Of all layers together.
  for stack in cfg.stacks():
    c, one = stack.cfg, cfg.embed_dim
    if train.remat == 'narrow':
      one += c.embed_dim
    elif train.remat != 'full':
      one += c.embed_dim + c.num_heads * c.head_dim + c.hidden_dim
    width += c.num_layers * one
  item = 2 if train.dtype == 'bfloat16' else 4
  return total + rows * config.data.length * width * item


def check_memory(
  cfg: sizes.ModelConfig, config: ml_collections.ConfigDict, mesh: Mesh | None
) -> None:
  """Refuses a config that cannot fit, with the three knobs that save most."""
  need, free = needed(cfg, config, mesh), available()
  if need <= free:
    return
  saved, rows = [], config.train.batch_size // sharding.row_shards(mesh)
  for knob, value in (
    ('train.micro_batches', rows),
    ('train.remat', 'full'),
    ('train.parts', 'lora'),
    ('optim.name', 'adafactor'),
    ('train.frozen_dtype', 'bfloat16'),
  ):
    other = alternatives.changed(config, {knob: value})
    less = need - needed(cfg, other, mesh)
    if less > 0:
      saved.append((less, f'{knob}={value} (saves {_size(less)})'))
  ways = [text for _, text in sorted(saved, reverse=True)[:3]]
  raise errors.UserError(
    f'a step needs {_size(need)} of memory at the least, and {_size(free)} are '
    f'free; {" or ".join(ways) or "a smaller weights.size"} would help, and so '
    'would a smaller train.batch_size or data.length.'
  )


def _size(number):
  return f'{number / 1e9:,.1f} GB'
