"""docs/tutorial.ipynb runs from its first cell to its last."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / 'docs' / 'tutorial.ipynb'


def _cells():
  return [
    cell
    for cell in json.loads(NOTEBOOK.read_text('utf-8'))['cells']
    if cell['cell_type'] == 'code'
  ]


def test_it_runs_on_the_debug_model(tmp_path):
  """In a process of its own, without Jupyter; a figure is not shown."""
  code = '\n'.join(''.join(cell['source']) for cell in _cells())
  script = tmp_path / 'tutorial.py'
  script.write_text(code, 'utf-8')
  environment = os.environ | {'TUTORIAL_MODEL': 'debug', 'MPLBACKEND': 'agg'}
  done = subprocess.run(
    [sys.executable, script],
    cwd=NOTEBOOK.parent,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  losses = [
    float(line.split()[-1])
    for line in done.stdout.splitlines()
    if line.startswith('step')
  ]
  assert len(losses) == 4 and losses[-1] < losses[0]


def test_its_outputs_are_kept():
  """Of the 270M, pictures among them, and no error."""
  kept = [output for cell in _cells() for output in cell['outputs']]
  assert all(cell['outputs'] or cell['execution_count'] for cell in _cells())
  assert not [x for x in kept if x['output_type'] == 'error']
  pictures = [x for x in kept if 'image/png' in x.get('data', {})]
  assert len(pictures) == 2
  text = ''.join(''.join(x.get('text', '')) for x in kept)
  assert '268.1 million parameters' in text
  assert f'{ROOT}/' not in NOTEBOOK.read_text('utf-8')
