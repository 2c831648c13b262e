"""What all commands share: --help, --traceback, refused flags."""

import pathlib
import subprocess
import sys
import types

import pytest

from configs import default
from mt.base import cli

ROOT = pathlib.Path(__file__).parents[2]
STUB = [
  types.SimpleNamespace(path='seed', default=0, doc='Of the order.'),
  types.SimpleNamespace(
    path='data.columns', default=(), doc='Where texts stand:\n' + 'word ' * 40
  ),
]

# All commands in one process: loading what they need takes seconds.
_HELP = """
import runpy, sys, types
from absl import flags
from configs import default
knob = types.SimpleNamespace(path='seed', default=0, doc='Of the order.')
default.KNOBS = getattr(default, 'KNOBS', [knob])
for name in ('mt.translate', 'mt.evaluate', 'mt.export', 'mt.data', 'train'):
  sys.argv = [name, '--help']
  print('command', name)
  try:
    runpy.run_module(name, run_name='__main__', alter_sys=True)
  except SystemExit as e:
    print('exit', e.code)
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    for flag in list(found):
      if module.endswith(('__main__.py', 'train.py')):
        delattr(flags.FLAGS, flag.name)
"""


def test_each_command_lists_its_own_flags():
  done = subprocess.run(
    [sys.executable, '-c', _HELP], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  _, *shown = done.stdout.split('command ')
  shown = {text.split('\n')[0]: text for text in shown}
  expected = {
    'mt.translate': ('workdir', 'input', 'beam', 'n_best=1', 'top_p', 'json'),
    'mt.evaluate': ('workdir', 'split=valid', 'against', 'pairs'),
    'mt.export': ('workdir', 'to=hf', 'out', 'dtype=float32', 'base'),
    'mt.data': ('config=', 'plot'),
    'train': ('config=configs/', 'workdir', 'plan', 'coordinator'),
  }
  assert shown.keys() == expected.keys()
  for name, flags in expected.items():
    text = shown[name]
    assert text.endswith('exit 0\n')
    for flag in (*flags, 'traceback'):
      assert f'\n  --{flag}' in text, (name, flag)
    assert 'verbosity' not in text and 'log_dir' not in text
    assert max(map(len, text.split('\n'))) <= 100
    assert ('--config.seed=0' in text) == (name in ('mt.data', 'train'))


def test_help_lists_each_knob_with_its_comment(monkeypatch):
  monkeypatch.setattr(default, 'KNOBS', STUB, raising=False)
  lines = cli.help_of_knobs().split('\n')
  assert lines[:4] == [
    '  --config.seed=0',
    '      Of the order.',
    '',
    '  --config.data.columns=()',
  ]
  assert lines[4].startswith('      Where texts stand: word word')
  assert len(lines) > 6 and max(map(len, lines)) <= 80


_MAIN = """
from mt.base import cli, errors
def main(_):
  try:
    open('/no such file')
  except OSError as e:
    raise errors.{error}('a\\nb: none.') from e
cli.run(main)
"""


def _end(error, *flags):
  return subprocess.run(
    [sys.executable, '-c', _MAIN.format(error=error), *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_a_user_error_is_one_sentence_or_a_traceback():
  done = _end('UserError')
  assert (done.returncode, done.stderr) == (2, 'error: a\\nb: none.\n')
  for error in ('UserError', 'ExitNow'):
    done = _end(error, '--traceback')
    assert done.returncode == 2
    assert done.stderr.endswith('error: a\\nb: none.\n')
    assert 'FileNotFoundError' in done.stderr and 'line 5, in' in done.stderr


def test_a_bug_keeps_its_traceback():
  done = _end('NoSuchName')
  assert done.returncode == 1
  assert 'FileNotFoundError' in done.stderr
  assert 'AttributeError' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  'flag, code, word', [('--no_such=1', 1, 'no_such'), ('word', 2, "'word'")]
)
def test_what_is_no_flag_is_refused(flag, code, word):
  done = _end('UserError', flag)
  assert done.returncode == code and done.stdout == ''
  assert done.stderr.count('\n') == 1 and word in done.stderr
