"""No import of ours loads TensorFlow, kauldron, torch or clu."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Never imported: a program of the environment that has torch.
COMET = ROOT / 'mt' / 'evaluate' / 'comet_program.py'
BANNED = ('tensorflow', 'kauldron', 'torch', 'clu', 'tensorflow_datasets')


def modules():
  files = [*ROOT.glob('mt/**/*.py'), *ROOT.glob('configs/*.py')]
  assert len(files) > 60
  return sorted(
    '.'.join(f.relative_to(ROOT).with_suffix('').parts).removesuffix(
      '.__init__'
    )
    for f in [*files, ROOT / 'train.py']
    if f != COMET
  )


def test_every_module_imports_without_tensorflow():
  code = (
    f'import importlib, sys\n'
    f'for name in {modules()!r}: importlib.import_module(name)\n'
    f'loaded = {{m.split(".")[0] for m in sys.modules}}\n'
    f'print(sorted(loaded & set({BANNED!r})))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_requirements_are_pinned_and_without_tensorflow():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  pins = [x.split('#')[0].strip() for x in lines]
  pins = [x for x in pins if x]
  assert all(x.count('==') == 1 for x in pins)
  names = {x.split('==')[0].lower() for x in pins}
  assert len({re.sub('==[^;]*', '', x).lower() for x in pins}) == len(pins)
  assert not names & set(BANNED)


def test_the_map_names_files_and_all_of_mt():
  """What stands first in an indented line of it, before two spaces."""
  text = (ROOT / 'mt' / '__init__.py').read_text()
  named = re.findall(r'^  (?:  )?([\w/]+)  +\S', text, re.M)
  assert len(named) >= 10
  files = [*ROOT.glob('mt/**/*.py'), *ROOT.glob('*.py')]
  paths = [f'/{f.relative_to(ROOT).with_suffix("")}' for f in files]
  for name in named:
    assert any(path.endswith(f'/{name}') for path in paths), name
  for path in paths:
    if path.startswith('/mt/') and '__' not in path:
      assert any(path.endswith(f'/{name}') for name in named), path
