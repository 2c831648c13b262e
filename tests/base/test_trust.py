"""What is installed, what can run code, what is sent anywhere."""

import ast
import pathlib
import re
import sys

import pytest
import requests

from mt.train import run as run_lib

ROOT = pathlib.Path(__file__).parents[2]

# What runs code that stands in a file, or starts another program.
_MODULES = {
  'cloudpickle',
  'code',
  'ctypes',
  'dill',
  'joblib',
  'marshal',
  'pickle',
  'pty',
  'runpy',
  'shelve',
  'subprocess',
  'yaml',
}
_CALLS = {'eval', 'exec', 'compile', '__import__'}
_OF_OS = re.compile(
  r'(exec|spawn)[lv]p?e?|posix_spawnp?|popen|system|startfile'
)
_ALLOWED = {
  # Of the libraries that are loaded already, it calls malloc_trim.
  'compiling.py': ['ctypes'],
  # train.preempt_command, out of --config, never out of a run's folder.
  'signals.py': ['subprocess', 'shell'],
  # The project's own environment for COMET.
  'comet.py': ['subprocess'],
}
_KEYWORDS = {'allow_pickle', 'shell', 'weights_only', 'trust_remote_code'}


def _dangers(source: str):
  """Whatever in a program can run what a file says."""
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    yield from (n for n in names if n.split('.')[0] in _MODULES)
    if isinstance(node, ast.Name) and node.id in _CALLS:
      yield node.id
    if (
      isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id == 'os'
      and _OF_OS.fullmatch(node.attr)
    ):
      yield f'os.{node.attr}'
    if (
      isinstance(node, ast.Call)
      and re.search('ctypes|DLL|LoadLibrary', ast.unparse(node.func))
      and ast.unparse(node) != 'ctypes.CDLL(None)'
    ):
      yield ast.unparse(node.func)
    if isinstance(node, ast.keyword) and node.arg in _KEYWORDS:
      yield node.arg


@pytest.mark.parametrize(
  'source, found',
  [
    ('import pickle as p', ['pickle']),
    ('from subprocess import run', ['subprocess']),
    ('x = eval(text)', ['eval']),
    ('run = exec', ['exec']),
    ('os.system(x)', ['os.system']),
    ('os.execvp(x, y)', ['os.execvp']),
    ('ctypes.CDLL("x.so"); ctypes.CDLL(None)', ['ctypes.CDLL']),
    ('CDLL(x); y.LoadLibrary(x)', ['CDLL', 'y.LoadLibrary']),
    ('np.load(f, allow_pickle=True)', ['allow_pickle']),
    ('re.compile(x); model.eval(); os.path.exists(x); os._exit(2)', []),
  ],
)
def test_what_counts_as_dangerous(source, found):
  assert list(_dangers(source)) == found


def test_no_file_is_run_as_code_and_no_program_started():
  files = [*ROOT.glob('mt/**/*.py'), ROOT / 'train.py']
  assert len(files) > 40
  for file in files:
    found = list(_dangers(file.read_text('utf-8')))
    assert found == _ALLOWED.get(file.name, []), file


_PIN = r"([\w.-]+)==([\w.]+)(?: ?; python_(?:full_)?version ([<>]=? '3.12'))?"


def _pins(text):
  """(package, version, of which Python); names as package indexes have them."""
  return {
    (re.sub('[-_.]+', '-', name).lower(), *rest)
    for name, *rest in re.findall(f'^{_PIN}', text, re.M)
  }


@pytest.mark.parametrize('name', ['requirements', 'requirements-plan'])
def test_each_file_of_each_pinned_package_has_its_hash(name):
  lock = (ROOT / f'{name}.lock').read_text('utf-8')
  wanted = _pins((ROOT / f'{name}.txt').read_text('utf-8'))
  assert _pins(lock) == wanted, 'make lock'
  # Nothing but pins and hashes: no address that something might come from.
  for entry in re.split(r'\n(?=\S)', lock.strip()):
    pin, *hashes = entry.split(' \\\n')
    assert re.fullmatch(_PIN, pin), pin
    assert hashes, pin
    for each in hashes:
      assert re.fullmatch(r' +--hash=sha256:[0-9a-f]{64}', each), each
  makefile = (ROOT / 'Makefile').read_text('utf-8')
  assert '--no-deps --require-hashes' in makefile


_blocked = []  # A hook stays as long as its process: this turns it on.
_NETWORK = re.compile(r'socket\.(bind|connect|get.*info|gethostby.*|send.*)')


def _refuse_network(event, args):
  if _blocked and _NETWORK.fullmatch(event):
    _blocked.append((event, args))
    raise OSError(f'{event}{args}: nothing is to be sent')


def test_a_run_sends_nothing(debug_config, tmp_path):
  debug_config.train.max_steps = 1
  debug_config.eval.texts = ('Hello!',)
  sys.addaudithook(_refuse_network)
  _blocked.append(True)
  try:
    run_lib.run(debug_config, tmp_path)
    assert _blocked == [True]
    with pytest.raises(OSError, match='nothing is to be sent'):
      requests.get('http://127.0.0.1:9', timeout=1)
  except OSError as e:
    raise AssertionError(_blocked) from e
  finally:
    _blocked.clear()
  assert (tmp_path / 'scores.json').exists()
