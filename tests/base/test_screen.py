"""No print ends a program: ascii, a full disk, closed streams, gone readers."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_ASCII = {'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii:strict'}
_TALKS = """
import os, pathlib, sys
from absl import logging
import tqdm
from mt.base import cli, journal, screen
def main(_):
  assert not sys.stdin.buffer.read1(9)
  print('Salut 😂' * 9000)
  journal.say('é 🔥')
  print('é 🔥', file=sys.stderr)
  logging.error('🔥')
  list(tqdm.tqdm([1, 2], desc='🔥'))
  pathlib.Path(os.environ['RESULT']).write_text('done')
  screen.check()
cli.run(main)
"""


@pytest.mark.parametrize(
  'redirect, code',
  [
    ('</dev/null 2>&1 | cat', 0),
    ('</dev/null 2>/dev/full | head -c 5', 0),  # Has what it wanted.
    ('<&- >&- 2>&-', 2),
  ],
)
def test_what_is_shown_ends_nothing(tmp_path, redirect, code):
  path = tmp_path / 'result'
  done = subprocess.run(
    ['bash', '-c', f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}']
    + [sys.executable, _TALKS],
    cwd=ROOT,
    env=os.environ | _ASCII | {'RESULT': str(path)},
    capture_output=True,
  )
  assert path.read_text() == 'done'
  assert done.returncode == code, done.stdout
  if redirect.endswith('cat'):
    assert done.stdout.count(b'Salut \\U0001f602') == 9000
    assert b'\\xe9 \\U0001f525\n' in done.stdout


_CONFIG = """
from tests.runs import small
def get_config():
  c = small.get_config()
  c.data.source = c.data.valid = {0}
  c.train.max_steps = c.log.every = 1
  return c
"""
_DOORS = """
import os, runpy, sys
from absl import flags
codes = []
for command in open(sys.argv[1], encoding='utf-8').read().splitlines():
  name, *sys.argv[1:] = command.split(' ')
  sys.argv[0] = name
  try:
    runpy.run_module(name, run_name='__main__', alter_sys=True)
  except SystemExit as e:
    codes.append(e.code or 0)
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    for flag in list(found):
      if module.endswith(('__main__.py', 'train.py')):
        delattr(flags.FLAGS, flag.name)
  flags.FLAGS.unparse_flags()
open(os.environ['RESULT'], 'w', encoding='utf-8').write(str(codes))
"""


def test_each_command_leaves_its_results(tmp_path):
  """With an ascii locale, stdout on a full disk and stderr closed."""
  text = tmp_path / 'text.tsv'
  text.write_text('ngl 😂 this\tc’est 😂 ça\n' * 9, encoding='utf-8')
  config = tmp_path / 'config.py'
  config.write_text(_CONFIG.format(repr(str(text))), encoding='utf-8')
  config = f'--config={config}'
  run = f'--workdir={tmp_path / "run"}'
  commands = {
    ('train', run, config): (0, 'run/scores.json'),
    ('mt.evaluate', run): (0, 'run/evaluation/valid.json'),
    ('mt.translate', run, f'--input={text}', f'--output={tmp_path}/o'): (
      0,
      'o',
    ),
    ('mt.export', run, f'--out={tmp_path}/hf'): (0, 'hf/model.safetensors'),
    # Nothing but what they print is their result.
    ('mt.translate', run, f'--input={text}'): (2, 'text.tsv'),
    ('mt.data', config): (2, 'text.tsv'),
  }
  listed = tmp_path / 'commands'
  listed.write_text('\n'.join(' '.join(c) for c in commands), 'utf-8')
  result = tmp_path / 'codes'
  subprocess.run(
    ['bash', '-c', 'exec "$0" -c "$1" "$2" >/dev/full 2>&-']
    + [sys.executable, _DOORS, str(listed)],
    cwd=ROOT,
    env=os.environ | _ASCII | {'RESULT': str(result)},
  )
  codes = result.read_text()
  assert codes == str([code for code, _ in commands.values()])
  for _, path in commands.values():
    assert (tmp_path / path).exists(), path


def _text_without_encoding(path):
  """Calls that take the locale's encoding for a file's."""
  for call in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if not isinstance(call, ast.Call):
      continue
    name = ast.unparse(call.func).split('.')[-1]
    given = [ast.unparse(arg) for arg in call.args]
    if any(k.arg in ('encoding', None) for k in call.keywords):
      continue
    of_open = ast.unparse(call.func) in ('open', 'os.fdopen') and not any(
      'b' in g for g in given[1:]
    )
    of_path = name == 'read_text' and not given
    if of_open or of_path or (name == 'write_text' and len(given) < 2):
      yield f'{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}'


def test_files_have_an_encoding():
  paths = [ROOT / 'train.py', *ROOT.glob('mt/**/*.py')]
  paths += ROOT.glob('configs/*.py')
  found = [line for path in paths for line in _text_without_encoding(path)]
  assert not found
