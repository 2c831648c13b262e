"""No import of ours loads TensorFlow, kauldron, torch or clu."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
BANNED = ('tensorflow', 'kauldron', 'torch', 'clu', 'tensorflow_datasets')


def modules():
  files = [*ROOT.glob('mt/**/*.py'), *ROOT.glob('configs/*.py')]
  assert len(files) > 60
  return sorted(
    '.'.join(f.relative_to(ROOT).with_suffix('').parts).removesuffix(
      '.__init__'
    )
    for f in [*files, ROOT / 'train.py']
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
  assert len(names) == len(pins)
  assert not names & set(BANNED)


def test_the_map_names_every_module():
  text = (ROOT / 'mt' / '__init__.py').read_text()
  for file in ROOT.glob('mt/**/*.py'):
    if not file.stem.startswith('__'):
      assert f'\n  {file.stem} ' in text, file.stem
