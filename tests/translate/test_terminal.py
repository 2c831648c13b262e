"""The command `python -m mt.translate`."""

import functools
import io
import json
import os
import pathlib
import pty
import select
import subprocess
import sys
import types

from absl import flags
import pytest

from configs import debug
from configs import default
from mt.base import errors
from mt.train import run as run_lib
from mt.translate import __main__ as terminal
from mt.translate import search as search_lib
from mt.translate import translator
from tests.fixtures.refusal import refusal

ROOT = pathlib.Path(__file__).parents[2]
QUICK = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def _parse(*given):
  own = flags.FlagValues()
  terminal.define_flags(own)
  own(['translate', '--workdir=w', *given])
  return own.flag_values_dict()


VALUES = _parse()
LINES = [
  'a\u2028b\x85c\x0c',
  '',
  ' é "\t',
  'd\re',
  '🔥👩‍👩‍👧',
  'مرحبا بالعالم',
  'I know it is fine. ' * 526 + 'Right?',  # 10,000 characters.
  'last',
]


class _Shouting:
  """A translator that shouts, and of `twice` has two translations."""

  def __init__(self, calls):
    self.calls = calls

  def n_best(self, params, texts, first):
    self.calls.append((len(texts), first))
    return [
      [translator.Translation(t.upper(), -0.5, -1.5)] * (1 + (t == 'twice'))
      for t in texts
    ]


@pytest.fixture
def command(monkeypatch):
  """Runs the command with that translator: (output, calls)."""
  config, calls = default.get_config(), []

  def run(given=b'', **values):
    out = io.BytesIO()
    stdin = types.SimpleNamespace(
      buffer=io.BytesIO(given), isatty=lambda: False
    )
    with monkeypatch.context() as m:
      for module, name, stand_in in (
        (terminal.run_folder, 'read_config', lambda folder: config),
        (terminal.checkpoint, 'find_step', lambda folder, which: (7, 'step 7')),
        (terminal.checkpoint, 'load_finetuned', lambda *_: (config, None, {})),
        (terminal.decode, 'unstack', lambda params, dtype: params),
        (translator, 'from_config', lambda *_, search: _Shouting(calls)),
        (terminal.compiling, 'keep_compiled_programs', lambda: None),
        (sys, 'stdin', stdin),
        (sys, 'stdout', types.SimpleNamespace(buffer=out)),
      ):
        m.setattr(module, name, stand_in)
      calls.clear()
      terminal.run(VALUES | values)
    return out.getvalue().decode(), calls.copy()

  return run


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_lines_stay_apart_and_in_order(command, monkeypatch, end):
  monkeypatch.setattr(terminal, '_CHUNK', 3)
  out, calls = command(end.join(LINES).encode())
  assert out == ''.join(line.upper() + '\n' for line in LINES)
  assert calls == [(3, 0), (3, 3), (2, 6)]
  assert command(b'') == ('', [])
  assert command(b'\n\n') == ('\n\n', [(2, 0)])


def test_json_lines(command):
  out, _ = command('Hé\n\ntwice\n'.encode(), json=True)
  assert 'HÉ' in out  # Real characters.
  one, empty, two = map(json.loads, out.splitlines())
  said = {'text': 'HÉ', 'score': -0.5, 'log_probability': -1.5}
  assert one == {'source': 'Hé', 'translations': [said]}
  assert empty['source'] == empty['translations'][0]['text'] == ''
  assert len(two['translations']) == 2


def test_files(command, tmp_path):
  given, made = tmp_path / 'in.txt', tmp_path / 'out.txt'
  given.write_bytes('\n'.join(LINES).encode())
  out, _ = command(b'not this', input=str(given), output=str(made))
  assert out == ''
  assert made.read_bytes().decode() == ''.join(x.upper() + '\n' for x in LINES)
  # Into the file that is read.
  command(input=str(given), output=str(given))
  assert given.read_bytes() == made.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in.txt', 'out.txt']


def test_a_file_is_whole_or_not_there(command, tmp_path, monkeypatch):
  monkeypatch.setattr(terminal, '_CHUNK', 1)
  made = tmp_path / 'out.txt'
  bad = 'good\ncafé\n'.encode('latin-1')
  for before in (None, 'of before'):
    if before:
      made.write_text(before)
    refusal(
      lambda: command(bad, output=str(made)),
      'standard input, line 2',
      'not UTF-8',
    )
    assert (made.read_text() if made.exists() else None) == before
    assert len(list(tmp_path.iterdir())) == bool(before)


def test_files_that_cannot_be_used(command, tmp_path):
  missing = tmp_path / 'missing'
  refusal(
    lambda: command(input=str(missing)), missing, '--input', 'No such file'
  )
  refusal(lambda: command(input=str(tmp_path)), tmp_path, '--input')
  refusal(lambda: command(output=str(tmp_path)), tmp_path, '--output')
  bad = tmp_path / 'latin.txt'
  bad.write_bytes(b'a\nb\n\xff\n')
  refusal(lambda: command(input=str(bad)), bad, 'line 3', 'not UTF-8')


# The search.


def _search(of_run=1, /, **values):
  config = default.get_config()
  config.decode.beam, config.decode.length_penalty = of_run, 0.5
  return terminal.read_search(VALUES | values, config.decode)


def test_flags_come_before_the_config():
  search = search_lib.Search
  assert _search() == search(length_penalty=0.5)
  assert _search(4) == search(beam=4, length_penalty=0.5)
  assert _search(4, beam=2) == search(beam=2, length_penalty=0.5)
  assert _search(4, length_penalty=0.0) == search(beam=4, length_penalty=0.0)
  assert _search(4, n_best=3, json=True).n_best == 3
  # Drawing takes the place of the run's beam.
  drawn = {'temperature': 0.7, 'top_k': 5, 'top_p': 0.9, 'seed': 3}
  assert _search(4, **drawn) == search(length_penalty=0.5, **drawn)
  assert _search(n_best=9, json=True, temperature=1.0).width == 9


@pytest.mark.parametrize(
  'values, words',
  [
    ({'beam': 2, 'temperature': 1.0}, ('--beam is 2', '--temperature')),
    ({'n_best': 3, 'json': True}, ('--n_best is 3', '--beam=3')),
    ({'n_best': 2, 'beam': 2}, ('--n_best is 2', '--json')),
  ],
)
def test_flags_that_cannot_be(values, words):
  refusal(lambda: _search(**values), *words)


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--beam=0', 'a positive integer'),
    ('--length_penalty=-1', 'a non-negative number'),
    ('--n_best=0', 'a positive integer'),
    ('--temperature=-0.1', 'a non-negative number'),
    ('--top_k=-1', 'a non-negative integer'),
    ('--top_p=0', 'more than 0, at most 1'),
    ('--top_p=1.1', 'more than 0, at most 1'),
    ('--seed=-1', '4294967295'),
    ('--top=5', 'top_k'),
  ],
)
def test_flags_out_of_bounds(flag, words):
  with pytest.raises(flags.Error, match=words):
    _parse(flag)


def test_what_has_no_effect_is_said(capsys):
  assert _search(top_k=5).top_k == 5
  told = '--top_k has no effect without --temperature above 0'
  assert told in capsys.readouterr().err


# The command itself, on a run of the debug model.


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, quick_compilation):
  config = debug.get_config()
  config.train.max_steps = 2
  config.train.batch_size = 2
  config.optim.learning_rate = 0.2  # So that checkpoints differ.
  config.eval.loss_pairs = config.eval.translate_pairs = 2
  config.eval.translate_every = config.eval.chrf_pairs = 0
  config.eval.patience = 0
  config.decode.max_ratio = 0.02
  config.checkpoint.every = 1
  folder = tmp_path_factory.mktemp('run')
  run_lib.run(config, folder)
  return folder


def _say(workdir, tmp_path, lines, **values):
  given, made = tmp_path / 'in', tmp_path / 'out'
  given.write_text('\n'.join(lines), 'utf-8')
  names = {'workdir': workdir, 'input': str(given), 'output': str(made)}
  terminal.run(VALUES | names | values)
  return made.read_text('utf-8').removesuffix('\n').split('\n')


def test_every_line_comes_through_in_its_place(workdir, tmp_path):
  given = [line[:200] for line in LINES]
  asked = {'json': True, 'beam': 2, 'n_best': 2, 'length_penalty': 0.0}
  lines = [json.loads(x) for x in _say(workdir, tmp_path, given, **asked)]
  assert [x['source'] for x in lines] == given
  for line in lines:
    found = line['translations']
    assert len(found) == (2 if line['source'] else 1)
    scores = [t['score'] for t in found]
    assert scores == sorted(scores, reverse=True)
    assert scores == [t['log_probability'] for t in found]
    assert all('\n' not in t['text'] for t in found)


def test_checkpoints_and_samples_by_flag(workdir, tmp_path):
  say = functools.partial(_say, workdir, tmp_path, ['I cannot believe it'])
  last = say()
  assert say(checkpoint='2') == last != say(checkpoint='1')
  drawn = say(temperature=2.0, seed=1)
  assert drawn != last and drawn == say(temperature=2.0, seed=1)
  assert say(checkpoint='last') == last
  refusal(lambda: say(checkpoint='3'), workdir, 'step 3', '1, 2 expected')
  refusal(lambda: say(checkpoint='-3'), "--checkpoint is '-3'", 'best, last')
  words = 'eval.translate_every=0', '--checkpoint=last', '1, 2 expected'
  refusal(lambda: say(checkpoint='best'), workdir, *words)


def test_a_reader_that_leaves(workdir):
  """As `… | head -1` does: no traceback, no complaint."""
  read, write = os.pipe()
  os.close(read)
  with open(write, 'wb') as out:
    done = subprocess.run(
      [sys.executable, '-m', 'mt.translate', f'--workdir={workdir}'],
      input=b'a\nb\n',
      cwd=ROOT,
      env=QUICK,
      stdout=out,
      stderr=subprocess.PIPE,
    )
  told = b'checkpoint: step 2, the last\n'
  assert (done.returncode, done.stderr) == (0, told)


def test_a_prompt_on_a_terminal(workdir):
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-m', 'mt.translate', f'--workdir={workdir}', '--json'],
    stdin=theirs,
    stdout=theirs,
    stderr=subprocess.DEVNULL,
    cwd=ROOT,
    env=QUICK | {'TERM': 'dumb', 'PYTHONUTF8': '1'},
  )
  os.close(theirs)
  seen = b''

  def until(text):
    nonlocal seen
    while text not in seen:
      assert select.select([ours], [], [], 120)[0], seen
      part = os.read(ours, 4096)
      assert part, seen
      seen += part
    seen = seen.split(text, 1)[1]

  try:
    until(b'> ')
    os.write(ours, 'Hé 🔥\n'.encode())
    # Answered at once, while the terminal is still open.
    until('{"source": "Hé 🔥", "translations"'.encode())
    until(b'> ')
    os.write(ours, b'\n')
    until(b'{"source": "", "translations"')
    until(b'> ')
    os.write(ours, b'\x04')  # Ctrl-D.
    assert process.wait(60) == 0
  finally:
    process.kill()
    os.close(ours)


def test_a_run_from_before_there_were_beams(workdir, tmp_path):
  config = json.loads((workdir / 'config.json').read_text())
  del config['decode']['beam'], config['decode']['length_penalty']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  read = terminal.run_folder.read_config(tmp_path)
  assert read == terminal.run_folder.read_config(workdir)
  with pytest.raises(errors.UserError, match='no checkpoint'):
    terminal.run(VALUES | {'workdir': str(tmp_path), 'input': __file__})
