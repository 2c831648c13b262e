"""Work and traffic of a compiled program, counted in its text.

XLA's own cost analysis counts the body of a loop once; here it counts as often
as it runs. The text is HLO's, as `compiled.as_text()` gives it: computations of
one instruction a line, `%name = shape opcode(operands), attributes`.
"""

import functools
import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r'\b(pred|[subf]{1,2}(?:8|16|32|64))\[([\d,]*)\]')
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


class Cost(NamedTuple):
  """Of one run of a program on one device."""

  flops: float = 0.0  # In matrix products, two for each multiplication.
  sent: float = 0.0  # Bytes that the device receives in collectives.


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  rest: str  # Operands and attributes.


def _numbers(text):
  return [int(n) for n in text.split(',') if n]


def _bytes(shape):
  """Of an array or of a tuple of them: f32, bf16, s8; `pred` is a byte."""
  return sum(
    int(dtype.strip('predsubf') or 8) // 8 * math.prod(_numbers(dims))
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


def _called(rest, *names):
  """The computation that the first of these attributes names."""
  return re.search(rf'\b(?:{"|".join(names)})=%?([\w.\-]+)', rest)[1]


def _parse(text):
  """The instructions of each computation; the name of the one that is run."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations[head[1]] = []
      entry = head[1] if line.startswith('ENTRY') else entry
    elif current is not None and (found := _LINE.match(line)):
      current.append(_Instruction(*found.groups()))
  return computations, entry


def cost(text: str, unknown_trips: int) -> Cost:
  """Counts a whole program.

  Args:
    text: of the compiled program.
    unknown_trips: how often a loop runs whose number is not in the text.
  """
  computations, entry = _parse(text)

  @functools.cache
  def of(name):
    shapes = {i.name: i.shape for i in computations[name]}
    costs = [one(i, shapes) for i in computations[name]]
    return Cost(sum(c.flops for c in costs), sum(c.sent for c in costs))

  def one(i, shapes):
    if i.opcode == 'dot':
      left = shapes[re.search(r'%([\w.\-]+)', i.rest)[1]]
      dims = _numbers(_ARRAY.search(left)[2])
      over = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
      depth = math.prod(dims[n] for n in _numbers(over))
      made = math.prod(_numbers(_ARRAY.search(i.shape)[2]))
      return Cost(flops=2.0 * depth * made)
    if i.opcode in _SENT:
      return Cost(sent=_bytes(i.shape) * _SENT[i.opcode](_group_size(i.rest)))
    if i.opcode == 'while':
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
      trips = int(known[1]) if known else unknown_trips
      body = of(_called(i.rest, 'body'))
      return Cost(body.flops * trips, body.sent * trips)
    if i.opcode == 'conditional':
      branches = re.search(r'branch_computations=\{(.*?)\}', i.rest)
      names = (
        [n.strip(' %') for n in branches[1].split(',')]
        if branches
        else [_called(i.rest, f'{b}_computation') for b in ('true', 'false')]
      )
      return max(map(of, names))
    if i.opcode in ('fusion', 'call'):
      return of(_called(i.rest, 'calls', 'to_apply'))
    return Cost()

  return of(entry)
