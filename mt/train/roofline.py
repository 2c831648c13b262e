"""How long a compiled program should take on a chip, kernel by kernel.

It reads the program's text (HLO, `compiled.as_text()`). For a GPU a kernel
takes the longer of two times, its products at three quarters of the peak for
their dtype and its bytes at 85 % of the memory's bandwidth, and 3 us of launch.
For a TPU it takes the cycles that the compiler wrote beside it. Collectives
take what they receive at the link's rate, as if nothing ran meanwhile; those
that a TPU's compiler fused with products are hidden behind them.

A loop's kernels count as often as it runs; of a conditional's branches the
slowest counts. The estimate finds what is slow and compares two programs: no
figure of it was checked on a device.
"""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

from mt.train import targets

_PEAK_SHARE, _BANDWIDTH_SHARE, _LAUNCH = 0.75, 0.85, 3e-6

_ARRAY = re.compile(r'\b(pred|bf16|[csuf]\d+(?:e\w+)?)\[([\d,]*)\]')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(
  r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)$'
)
_FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'partition-id', 'replica-id', 'iota',
)  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')
_IN_PLACE = ('dynamic-update-slice', 'scatter')
_SAME_VALUES = ('bitcast', 'convert', 'reshape', 'copy', 'transpose')

# Of the bytes of its operands, what a device receives in a group of n.
_SENT = {
  'all-gather': lambda n: n - 1,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}


class Kernel(NamedTuple):
  """One instruction that is launched, `times` in a run of the program."""

  name: str  # Where it comes from in the code, and what it makes.
  times: int
  seconds: float  # Of one launch; 0 without a chip.
  flops: float  # In products, two for each multiplication.
  moved: float  # Bytes read and written.
  sent: float = 0.0  # Bytes that the device receives in collectives.
  opaque: bool = False  # A custom call: its products are not known.


class _Instruction(NamedTuple):
  root: bool
  name: str
  type: str
  op: str
  operands: list[str]  # Names.
  number: str  # Of a parameter or a constant.
  attributes: str


class _Program(NamedTuple):
  computations: dict[str, dict[str, _Instruction]]
  chip: targets.Chip | None
  unknown_trips: int


def kernels(
  text: str, chip: targets.Chip | None, unknown_trips: int = 1
) -> list[Kernel]:
  """All that a program launches.

  Args:
    text: of the compiled program.
    chip: what it is compiled for; without one there are no seconds.
    unknown_trips: how often a loop runs whose number is not in the text.
  """
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif current is not None and (found := _LINE.match(line)):
      root, name, shape, op, inner, attributes = found.groups()
      operands = re.findall(r'%([\w.\-]+)', inner)
      # Such a fusion runs beside others, until its `fusion-done`.
      op = 'fusion' if op == 'fusion-start' else op
      current[name] = _Instruction(
        bool(root), name, shape, op, operands, inner, attributes
      )
  return _walk(_Program(computations, chip, unknown_trips), entry)


def seconds(found: list[Kernel]) -> float:
  """That all of them take; 0 without a chip."""
  return sum(k.seconds * k.times for k in found)


def _walk(program, name, times=1):
  """The kernels of a computation that runs so many times."""
  found, channels = [], set()
  computation = program.computations[name]
  for i in computation.values():
    if i.op in _FREE or i.op.endswith('-done'):
      continue
    if i.op == 'while':
      trips = _trips(program, i)
      found += _walk(program, _called(i, 'body'), times * trips)
    elif i.op == 'conditional':
      branches = [_walk(program, b, times) for b in _branches(i)]
      found += max(branches, key=lambda b: (seconds(b), _total_flops(b)))
    elif i.op in ('call', 'async-start'):
      found += _walk(program, _called(i, 'to_apply', 'calls'), times)
    else:
      sent = sum(_sent(program, i, computation, channels))
      found.append(_kernel(program, i, computation, sent, times))
  return found


def _total_flops(found):
  return sum(k.flops * k.times for k in found)


def _called(i, *keys):
  """The computation that the first of these attributes names."""
  return re.search(rf'\b(?:{"|".join(keys)})=%?([\w.\-]+)', i.attributes)[1]


def _branches(i):
  if found := re.search(r'branch_computations=\{([^}]*)\}', i.attributes):
    return re.findall(r'%([\w.\-]+)', found[1])
  return [_called(i, f'{b}_computation') for b in ('true', 'false')]


def _trips(program, loop):
  """How often a loop runs: said, or the one number it is compared with."""
  known = re.search(r'known_trip_count"?:?\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = program.computations[_called(loop, 'condition')].values()
  bounds = {
    int(i.number)
    for i in condition
    if i.op == 'constant' and i.type.startswith(('s32[]', 'u32[]'))
  }
  return bounds.pop() if len(bounds) == 1 else program.unknown_trips


def _kernel(program, i, computation, sent, times):
  """The cost of one instruction."""
  chip, products = program.chip, list(_products(program, i, computation))
  opaque = i.op == 'custom-call' and not products
  if i.op == 'fusion':
    moved = _fusion_bytes(program.computations[_called(i, 'calls')])
  elif i.op == 'dynamic-update-slice':
    moved = 2 * _bytes(computation[i.operands[1]].type)
  elif i.op in _SLICES:
    moved = 2 * _bytes(i.type)
  else:
    moved = _bytes(i.type) + _operand_bytes(i, computation)
  if chip and chip.clock:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    opaque = opaque and '"tpu_custom_call"' in i.attributes
    taken = moved / (chip.bandwidth * _BANDWIDTH_SHARE) if opaque else 0.0
    taken = int(cycles[1]) / chip.clock if cycles else taken
    taken += 0 if i.op == 'fusion' else sent / chip.link
  elif chip:
    speed = {'f32': chip.flops / 2, 's8': chip.flops * 2}
    compute = sum(n / speed.get(dtype, chip.flops) for dtype, n in products)
    memory = 0 if sent else moved / (chip.bandwidth * _BANDWIDTH_SHARE)
    taken = max(compute / _PEAK_SHARE, memory, sent / chip.link) + _LAUNCH
  else:
    taken = 0.0
  flops = sum(n for _, n in products)
  return Kernel(_name(i), times, taken, flops, moved, sent, opaque)


def _name(i):
  """Such as: fusion bf16[8,512,640] while/body/dot_general."""
  found = re.search(r'op_name="([^"]*)"', i.attributes)
  noise = r'jit\(\w+\)/|closed_call/|checkpoint/|rematted_computation/'
  path = re.sub(noise, '', found[1]) if found else i.name
  target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
  made = _ARRAY.search(i.type)
  return f'{target[1] if target else i.op} {made[0] if made else ""} {path}'


def _numbers(text):
  return [int(n) for n in text.split(',') if n]


def _bytes(shape):
  """Of an array or of a tuple of them."""

  def width(dtype):
    return 1 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0]) / 8

  return sum(
    width(dtype) * math.prod(_numbers(dims))
    for dtype, dims in _ARRAY.findall(shape)
  )


def _operand_bytes(i, computation):
  return sum(_bytes(computation[o].type) for o in set(i.operands))


def _products(program, i, computation) -> Iterator[tuple[str, float]]:
  """(dtype, FLOPs) of each matrix product in an instruction."""
  if i.op == 'dot' or (i.op == 'custom-call' and '"__cublas' in i.attributes):
    left, made = computation[i.operands[0]].type, i.type
    (dtype, left), (_, made) = (_ARRAY.search(t).groups() for t in (left, made))
    over = re.search(
      r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', i.attributes
    )[1].replace('"', '')
    depth = math.prod(_numbers(left)[n] for n in _numbers(over))
    yield dtype, 2.0 * depth * math.prod(_numbers(made))
  elif i.op == 'fusion':
    inner = program.computations[_called(i, 'calls')]
    for x in inner.values():
      yield from _products(program, x, inner)


def _fusion_bytes(inner):
  """Bytes that a fusion reads and writes."""
  read = sum(_read(x, inner) for x in inner.values() if x.op == 'parameter')
  return read + _written(next(x for x in inner.values() if x.root), inner)


def _read(x, inner):
  """Bytes that are read of a parameter: the slices, where it takes slices."""
  total = 0
  for user in (i for i in inner.values() if x.name in i.operands):
    first = user.operands[0] == x.name
    if user.op in _SLICES and first:
      total += _bytes(user.type)
    elif user.op in _SAME_VALUES and _bytes(user.type) >= _bytes(x.type) / 4:
      total += _read(user, inner)
    elif not (user.op in _IN_PLACE and first):
      return _bytes(x.type)
  return min(total, _bytes(x.type))


def _written(i, inner):
  """Bytes that a fusion writes: the update, where it updates a slice."""
  if i.op == 'tuple':
    return sum(_written(inner[o], inner) for o in i.operands)
  if i.op == 'dynamic-update-slice':
    return _bytes(inner[i.operands[1]].type)
  if i.op == 'scatter':
    return 3 * _bytes(inner[i.operands[-1]].type)
  if i.op in ('bitcast', 'convert'):
    below = inner[i.operands[0]]
    if below.op == 'dynamic-update-slice':
      return _written(below, inner)
  return _bytes(i.type)


def _sent(program, i, computation, channels) -> Iterator[float]:
  """Bytes received in a collective, or in those that a fusion has.

  A TPU's compiler spreads one over several fusions; its channel is the same.
  """
  op = i.op.removesuffix('-start')
  if op in _SENT:
    channel = re.search(r'channel_id=(\d+)', i.attributes)
    if channel is None or channel[1] not in channels:
      share = _SENT[op](_group_size(i.attributes))
      yield _operand_bytes(i, computation) * share
    if channel:
      channels.add(channel[1])
  elif i.op == 'fusion':
    inner = program.computations[_called(i, 'calls')]
    for x in inner.values():
      yield from _sent(program, x, inner, channels)


def _group_size(attributes):
  """Devices that take part in one collective."""
  if found := re.search(r'groups=mesh\[(.*?)\] *\{(.*?)\}', attributes):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or axes[name]) for name, part in parts)
  if found := re.search(r'groups=\[\d+,(\d+)\]', attributes):
    return int(found[1])
  if found := re.search(r'groups=\{\{([\d,]*)\}', attributes):
    return found[1].count(',') + 1
  return 2  # collective-permute has pairs.
