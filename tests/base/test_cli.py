"""What all commands share: --help, --traceback, refused flags."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from configs import default

ROOT = pathlib.Path(__file__).parents[2]
# All commands in one process: loading what they need takes seconds.
_HELP = """
import runpy, sys
from absl import flags
for name in ('mt.translate', 'mt.evaluate', 'mt.export', 'mt.data', 'train'):
  sys.argv = [name, '--help']
  print('####', name)
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
  _, *shown = done.stdout.split('#### ')
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
    knobs = default.KNOBS if name in ('mt.data', 'train') else ()
    assert text.count('\n  --config.') == len(knobs)
    words = ' '.join(text.split())
    for knob in knobs:
      assert f' --config.{knob.path}' in words
      assert ' '.join(knob.doc.split()) in words


_MAIN = """
from mt.base import cli, errors
def main(_):
  try:
    open('/no such file')
  except OSError as e:
    raise errors.{error}('a\\nb: none.') from e
cli.run(main)
"""


def _end(error, *flags, program=_MAIN, **environment):
  no_home = {'HOME', 'XDG_CACHE_HOME'}
  kept = {k: v for k, v in os.environ.items() if k not in no_home}
  return subprocess.run(
    [sys.executable, '-c', program.format(error=error), *flags],
    cwd=ROOT,
    env=kept | environment,
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


_CONFIG = """
from mt.base import cli
cli.define_config()
cli.run(lambda _: cli.read_config())
"""


@pytest.mark.parametrize(
  'flag, code, words',
  [
    ('--no_such=1', 1, 'no_such'),
    ('word', 2, "'word'"),
    ('--config=none.py', 2, '--config=none.py: cannot read it (No such'),
    ('--config=configs', 2, '--config=configs: cannot read it (Is a'),
    ('--config=configs/large.py', 2, "no attribute 'get_config'"),
    (f'--config={"x" * 300}', 2, 'cannot read it (File name too long)'),
    ('--config.seed=x', 1, '--config.seed=x: invalid'),
    # With the nearest knob.
    ('--config.optim.learning_rat=1', 2, 'did you mean optim.learning_rate?'),
    ('--config.max_steps=1', 2, 'did you mean train.max_steps?'),
  ],
)
def test_flags_are_refused_in_one_line(flag, code, words):
  done = _end('', flag, program=_CONFIG)
  assert done.returncode == code and done.stdout == ''
  assert done.stderr.count('\n') == 1 and words in done.stderr


def test_a_bug_in_a_config_file_shows_its_line(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from configs import default\n'
    'def get_config():\n'
    '  c = default.get_config()\n'
    '  c.data.lenght = 5\n'
  )
  done = _end('', f'--config={path}', program=_CONFIG)
  assert done.returncode == 1
  assert f'"{path}", line 4' in done.stderr and '"length"' in done.stderr


_FIRST_TOUCH = """
import os, pwd, sys
what = {error!r}
pwd.getpwuid = dict().__getitem__  # The user has no name.
from mt.base import cache, cli
def main(_):
  if what == 'jax':
    import jax
    jax.numpy.zeros(2) + 1
  if what.isdigit():
    raise OSError(int(what), os.strerror(int(what)), '/x/y')
  if what == 'home':
    cache.cache_dir()
  if what == 'bug':
    import jax
    raise RuntimeError('mine')
cli.run(main)
"""


@pytest.mark.parametrize(
  'what, environment, words',
  [
    ('jax', {'JAX_PLATFORMS': 'cuda'}, "JAX_PLATFORMS='cuda' (no such device)"),
    ('jax', {'JAX_PLATFORMS': 'abc'}, "backend 'abc'"),
    (errno.ENOSPC, {}, "No space left on device: '/x/y'; make room"),
    (errno.EACCES, {}, "Permission denied: '/x/y'; check the path"),
    (errno.ENAMETOOLONG, {}, "File name too long: '/x/y'; check the path"),
    ('home', {}, 'set HOME or XDG_CACHE_HOME'),
  ],
)
def test_what_the_machine_lacks_is_a_sentence(what, environment, words):
  done = _end(str(what), program=_FIRST_TOUCH, **environment)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.count('\n') == 1 and words in done.stderr, done.stderr


def test_a_bug_is_not_taken_for_the_machine():
  done = _end('bug', program=_FIRST_TOUCH)
  assert done.returncode == 1
  assert done.stderr.endswith('RuntimeError: mine\n')
