"""Work and traffic of a compiled program, counted in its text.

XLA's own cost analysis counts the body of a loop once; here it counts as often
as it runs. The text is HLO's, as `compiled.as_text()` gives it: computations of
one instruction a line, `%name = shape opcode(operands), attributes`.
"""

import dataclasses
import functools
import math
import re

import chex

_BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'f16': 2,
  'bf16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
_ARRAY = re.compile(r'\b(' + '|'.join(_BYTES) + r')\[([\d,]*)\]')
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')

# Of the bytes of its result, what a device receives in a group of n.
_SENT = {
  'all-gather': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program on one device.

  Attributes:
    flops: in matrix products, two for each multiplication.
    sent: bytes that the device receives in collectives.
  """

  flops: float = 0.0
  sent: float = 0.0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(self.flops + other.flops, self.sent + other.sent)

  def times(self, number: int) -> 'Cost':
    return Cost(self.flops * number, self.sent * number)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  rest: str  # Operands and attributes.


def _dims(shape):
  found = _ARRAY.search(shape)
  return [int(n) for n in found[2].split(',') if n] if found else []


def _bytes(shape):
  return sum(
    _BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n)
    for dtype, dims in _ARRAY.findall(shape)
  )


def _group_size(rest):
  """Devices that take part in one collective."""
  if found := re.search(r'replica_groups=mesh\[(.*?)\] *\{(.*?)\}', rest):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or axes[name]) for name, part in parts)
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return found[1].count(',') + 1
  return 2  # collective-permute has pairs.


def _attribute(rest, *names):
  for name in names:
    if found := re.search(rf'\b{name}=%?([\w.\-]+)', rest):
      return found[1]
  return None


def cost(text: str, unknown_trips: int) -> Cost:
  """Counts a whole program.

  Args:
    text: of the compiled program.
    unknown_trips: how often a loop runs whose number is not in the text.

  Raises:
    ValueError: the text is no HLO.
  """
  chex.assert_scalar_non_negative(unknown_trips)
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations[head[1]] = []
      entry = head[1] if line.startswith('ENTRY') else entry
    elif current is not None and (found := _LINE.match(line)):
      current.append(_Instruction(*found.groups()))
  if entry is None:
    raise ValueError('no ENTRY computation: this is not the text of an HLO')

  @functools.cache
  def of(name):
    shapes = {i.name: i.shape for i in computations[name]}
    return sum((one(i, shapes) for i in computations[name]), Cost())

  def one(i, shapes):
    if i.opcode == 'dot':
      left = re.search(r'%([\w.\-]+)', i.rest)[1]
      over = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
      dims = _dims(shapes[left])
      depth = math.prod(dims[int(n)] for n in over.split(',') if n)
      return Cost(flops=2.0 * depth * math.prod(_dims(i.shape)))
    if i.opcode in _SENT:
      return Cost(sent=_bytes(i.shape) * _SENT[i.opcode](_group_size(i.rest)))
    if i.opcode == 'while':
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
      body = of(_attribute(i.rest, 'body'))
      return body.times(int(trips[1]) if trips else unknown_trips)
    if i.opcode == 'conditional':
      branches = re.search(r'branch_computations=\{(.*?)\}', i.rest)
      names = (
        [n.strip(' %') for n in branches[1].split(',')]
        if branches
        else [
          _attribute(i.rest, 'true_computation'),
          _attribute(i.rest, 'false_computation'),
        ]
      )
      return max((of(n) for n in names), key=lambda c: (c.flops, c.sent))
    if i.opcode in ('fusion', 'call'):
      return of(_attribute(i.rest, 'calls', 'to_apply'))
    return Cost()

  return of(entry)
