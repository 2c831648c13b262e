"""The rooms of mt/ import one way only: each those below it, in no circle."""

import ast
import graphlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
# From the lowest; what no room is, is a front door, which nobody imports.
ROOMS = (
  *('configs', 'base', 'gemma', 'data'),
  *('weights', 'translate', 'evaluate', 'train'),
)
FRONT_DOOR = len(ROOMS)


def _name(file):
  """mt/base/files.py -> mt.base.files"""
  name = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
  return name.removesuffix('.__init__')


FILES = [*ROOT.glob('configs/*.py'), *ROOT.glob('mt/**/*.py')]
TREES = {
  _name(file): ast.parse(file.read_text('utf-8'))
  for file in [ROOT / 'train.py', *FILES]
}


def _level(module):
  room, *rest = module.removeprefix('mt.').split('.')
  if module != 'train' and room in ROOMS and rest[-1:] != ['__main__']:
    return ROOMS.index(room)
  return FRONT_DOOR


def _imports(tree, modules=TREES):
  """Whatever a program imports, inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in modules else node.module


IMPORTS = {name: set(_imports(tree)) for name, tree in TREES.items()}


def test_the_reader_of_imports():
  source = (
    'import os.path, jax\n'
    'from mt.base import files\n'
    'def f():\n'
    '  from mt.base.files import write\n'
  )
  found = list(_imports(ast.parse(source), {'mt.base.files'}))
  assert found == ['os.path', 'jax', 'mt.base.files', 'mt.base.files']
  rooms = 'configs.debug', 'mt.base', 'mt.base.files', 'mt.train.loop'
  assert [_level(m) for m in rooms] == [0, 1, 1, 7]
  for door in ('train', 'mt.export.__main__', 'mt.data.__main__'):
    assert door in TREES and _level(door) == FRONT_DOOR


def test_rooms_import_only_what_is_below_them():
  for name, imported in IMPORTS.items():
    for module in imported & TREES.keys() - {'mt'}:
      highest = min(_level(name), FRONT_DOOR - 1)
      assert _level(module) <= highest, f'{name} imports {module}'


def test_no_circle():
  """Else graphlib raises a CycleError, with the modules."""
  graph = {name: found & TREES.keys() for name, found in IMPORTS.items()}
  assert set(graphlib.TopologicalSorter(graph).static_order()) == set(TREES)


def test_configs_and_gemma_need_little():
  for name, imported in IMPORTS.items():
    if name.startswith('configs'):
      assert not [m for m in imported if m.startswith('mt')], name
    if name.startswith('mt.gemma'):
      known = {'jax', 'chex', 'numpy', 'mt'} | sys.stdlib_module_names
      known |= {'tokamax'} if name == 'mt.gemma.fused' else set()
      assert {m.split('.')[0] for m in imported} <= known, name
      for node in ast.walk(TREES[name]):
        assert getattr(node, 'attr', '') != 'default_backend', name


def test_the_core_is_read_in_its_order():
  """None of the files of the reading order imports one that comes later."""
  parts = ast.get_docstring(TREES['mt']).split('\n\n')
  (order,) = [part for part in parts if '  data/template ' in part]
  names = [f'mt.{line.split()[0]}' for line in order.splitlines()]
  names = [name.replace('/', '.') for name in names]
  assert len([line for line in order.splitlines() if line[2] != ' ']) == 12
  for i, name in enumerate(names):
    assert not IMPORTS[name] & {*names[i + 1 :]}, name
