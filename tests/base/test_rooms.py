"""The rooms of mt/ import one way only: each those below it, in no circle."""

import ast
import itertools
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
# From the lowest; what no room is, is a front door.
ROOMS = (
  'configs',
  'base',
  'gemma',
  'data',
  'weights',
  'translate',
  'evaluate',
  'train',
)
FRONT_DOORS = len(ROOMS)
FILES = [
  ROOT / 'train.py',
  *sorted(ROOT.glob('configs/*.py')),
  *sorted(ROOT.glob('mt/**/*.py')),
]


def _name(file, root=ROOT):
  """mt/base/files.py -> mt.base.files"""
  parts = file.relative_to(root).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {_name(file): file for file in FILES}


def _level(module):
  parts = module.split('.')
  if parts[-1] == '__main__':
    return FRONT_DOORS
  room = parts[1] if parts[0] == 'mt' and len(parts) > 1 else parts[0]
  return ROOMS.index(room) if room in ROOMS else FRONT_DOORS


def _imports(source, modules):
  """(module, line) of whatever a program imports, inside functions too."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in modules else node.module, node.lineno


IMPORTS = {
  name: list(_imports(file.read_text('utf-8'), MODULES))
  for name, file in MODULES.items()
}


def _ours(name):
  return [(m, line) for m, line in IMPORTS[name] if m in MODULES]


def _at(name, line):
  return f'{MODULES[name].relative_to(ROOT)}:{line}'


def test_the_reader_of_imports():
  source = (
    'import os.path, jax\n'
    'from mt.base import files\n'
    'def f():\n'
    '  from mt.base.files import write\n'
  )
  assert list(_imports(source, {'mt.base.files'})) == [
    ('os.path', 1),
    ('jax', 1),
    ('mt.base.files', 2),
    ('mt.base.files', 4),
  ]
  levels = [
    _level(m) for m in ('configs.debug', 'mt.base.files', 'mt.train.loop')
  ]
  assert levels == [0, 1, 7]
  for door in ('train', 'mt.export.__main__', 'mt.data.__main__'):
    assert door in MODULES
  assert _level('mt.export.hf') == _level('mt.data.__main__') == FRONT_DOORS


def test_rooms_import_only_what_is_below_them():
  bad = [
    f'{_at(name, line)}: imports {module}'
    for name in MODULES
    for module, line in _ours(name)
    if _level(module) > _level(name)
    or (_level(module) == FRONT_DOORS and module != 'mt')
  ]
  assert not bad, '\n'.join(bad)


def test_configs_import_configs_alone():
  bad = [
    f'{_at(name, line)}: imports {module}'
    for name in MODULES
    for module, line in IMPORTS[name]
    if name.startswith('configs') and module.startswith('mt')
  ]
  assert not bad, '\n'.join(bad)


def _circle(graph):
  """Modules that import each other in a ring, the first one twice; or []."""
  done = set()

  def visit(name, path):
    if name in path:
      return [*path[path.index(name) :], name]
    if name in done:
      return []
    for module in graph[name]:
      if found := visit(module, [*path, name]):
        return found
    done.add(name)
    return []

  return next((c for name in graph if (c := visit(name, []))), [])


def test_no_circle():
  assert _circle({'a': ['b'], 'b': ['c', 'd'], 'c': [], 'd': ['b']}) == [
    'b',
    'd',
    'b',
  ]
  circle = _circle({n: [m for m, _ in _ours(n)] for n in MODULES})
  lines = [
    f'{_at(a, next(line for m, line in _ours(a) if m == b))}: imports {b}'
    for a, b in itertools.pairwise(circle)
  ]
  assert not circle, '\n'.join(lines)


def test_gemma_needs_jax_chex_and_numpy_alone():
  known = {'jax', 'chex', 'numpy', 'mt'} | sys.stdlib_module_names
  bad = [
    f'{_at(name, line)}: imports {module}'
    for name in MODULES
    for module, line in IMPORTS[name]
    if name.startswith('mt.gemma') and module.split('.')[0] not in known
  ]
  assert not bad, '\n'.join(bad)


def test_gemma_asks_for_no_backend():
  bad = [
    f'{_at(name, node.lineno)}: asks for the backend'
    for name, file in MODULES.items()
    if name.startswith('mt.gemma')
    for node in ast.walk(ast.parse(file.read_text('utf-8')))
    if isinstance(node, ast.Attribute) and node.attr == 'default_backend'
  ]
  assert not bad, '\n'.join(bad)
