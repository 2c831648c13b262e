"""The command `python -m mt.translate`, with a translator that stands in.

With a run of its own: tests/runs/test_run.py and test_best.py.
"""

import bz2
from concurrent import futures
import dataclasses
import functools
import gzip
import io
import json
import os
import pty
import re
import select
import sys
import termios
import threading
import types
from typing import Any

import pytest

from configs import default
from mt.base import journal
from mt.base import screen
from mt.translate import __main__ as terminal
from mt.translate import batching
from mt.translate import search as search_lib
from mt.translate import translator
from tests.fixtures.refusal import refusal

VALUES = {
  'workdir': 'w',
  'checkpoint': '',
  'input': '',
  'output': '',
  'json': False,
  'key': '',
  'pair': '',
  'beam': None,
  'length_penalty': None,
  'n_best': 1,
  'temperature': 0.0,
  'top_k': None,
  'top_p': None,
  'seed': None,
  'mbr': None,
  'comet': '',
  'n': None,
  'no_repeat_ngram': None,
  'repetition_penalty': None,
}
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


@dataclasses.dataclass
class _Shouting:
  """A translator that shouts, and of `twice` has two translations."""

  calls: list
  settings: batching.Settings
  sampling: search_lib.Search | None = None
  expected: Any = None
  say: Any = None

  def n_best(self, params, texts, first):
    self.calls.append((len(texts), first))
    return [
      [translator.Translation(t.upper(), -0.5, -1.5, t == 'cut')]
      * (1 + (t == 'twice'))
      for t in texts
    ]


@pytest.fixture
def shouting(monkeypatch):
  """The command has that translator; its calls."""
  config, calls = default.get_config(), []
  made = _Shouting(calls, batching.Settings(None, None, (), batch_size=1))
  for module, name, stand_in in (
    (terminal.run_folder, 'read_config', lambda folder: config),
    (terminal.checkpoint, 'find_step', lambda folder, which: (7, 'step 7')),
    (terminal.checkpoint, 'load_finetuned', lambda *_: (config, None, {})),
    (terminal.decode, 'unstack', lambda params, dtype: params),
    (translator, 'from_config', lambda *_: made),
    (terminal.compiling, 'keep_compiled_programs', lambda: None),
  ):
    monkeypatch.setattr(module, name, stand_in)
  return calls


@pytest.fixture
def command(shouting, monkeypatch, tmp_path_factory):
  """Runs it without a terminal: (output, calls)."""

  def run(given=b'', **values):
    file = tmp_path_factory.mktemp('stdin') / 'in'
    file.write_bytes(given)
    stdin = types.SimpleNamespace(buffer=file.open('rb'), isatty=lambda: False)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    shouting.clear()
    with stdin.buffer, monkeypatch.context() as m:
      m.setattr(sys, 'stdin', stdin)
      m.setattr(sys, 'stdout', stdout)
      terminal.run(VALUES | values)
    return stdout.buffer.getvalue().decode(), shouting.copy()

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
  said['cut_off'] = False
  assert one == {'source': 'Hé', 'translations': [said]}
  assert empty['source'] == empty['translations'][0]['text'] == ''
  assert len(two['translations']) == 2


def test_what_is_cut_off_is_counted_at_the_end(command, monkeypatch, capsys):
  monkeypatch.setattr(terminal, '_CHUNK', 1)
  out, _ = command(b'cut\na\ncut\n', json=True)
  found = [json.loads(x)['translations'][0] for x in out.splitlines()]
  assert [t['cut_off'] for t in found] == [True, False, True]
  told = capsys.readouterr().err.splitlines()
  assert [line for line in told if 'limit' in line] == told[-1:]
  assert told[-1].startswith('2 of 3 translations reached their limit')


def test_what_is_said_while_a_model_loads_is_no_translation(
  command, monkeypatch, capsys
):
  real = terminal.checkpoint.load_finetuned

  def load(*args):
    journal.say('weights: Kaggle does not answer, taken from …')
    return real(*args)

  monkeypatch.setattr(terminal.checkpoint, 'load_finetuned', load)
  assert command(b'a\n')[0] == 'A\n'
  assert 'Kaggle' in capsys.readouterr().err


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


TEXTS = ['a', 'b\nc\n\nd', '']


@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_json_in_and_out(command, tmp_path, pack):
  given = '\ufeff'.encode() + b''.join(
    json.dumps({'x': {'en': text}}).encode() + b'\r\n' for text in TEXTS
  )
  path = tmp_path / 'in'
  path.write_bytes(pack(given))
  values = {'json': True, 'key': 'x.en'}
  for out, _ in (command(given, **values), command(input=str(path), **values)):
    made = [json.loads(line) for line in out.splitlines()]
    assert [m['source'] for m in made] == TEXTS
    found = [m['translations'][0]['text'] for m in made]
    assert found == [text.upper() for text in TEXTS]
  refusal(lambda: command(given, key='x.en'), '--key', '--json expected')


@pytest.mark.parametrize(
  ('given', 'key', 'words'),
  [
    (b'a\nb\0c\n', '', ('line 2: a NUL character', 'UTF-8 is expected')),
    ('a\n'.encode('utf-16'), '', ('UTF-16 found', 'iconv')),
    (b'{"en": 3}\n', 'en', ("line 1: no text under 'en'", 'JSON object')),
    (b'a\n', 'en', ('line 1: not JSON',)),
    (b'{"en": "\\ud800"}\n', 'en', ('line 1: half a surrogate pair',)),
  ],
)
def test_what_training_would_not_use_is_refused(command, given, key, words):
  call = lambda: command(given, key=key, json=True)  # noqa: E731
  refusal(call, 'standard input', *words)


def test_a_text_may_begin_as_bzip2_does(command):
  assert command(b'BZhang wrote this\n')[0] == 'BZHANG WROTE THIS\n'
  for level in (1, 9):
    packed = bz2.compress(b'a\n', level)
    refusal(lambda p=packed: command(p), 'packed by bzip2')


def test_a_byte_order_mark_is_no_text(command):
  assert command('\ufeffa\n\ufeffb\n'.encode())[0] == 'A\n\ufeffB\n'


def test_a_reader_that_leaves(shouting, monkeypatch, tmp_path, capfd):
  """As `… | head -1` does: no traceback, no complaint."""
  given = tmp_path / 'in'
  given.write_text('a\nb\n')
  values = VALUES | {'input': str(given)}
  read, write = os.pipe()
  os.close(read)
  with open(write, 'w', encoding='ascii') as out, monkeypatch.context() as m:
    m.setattr(sys, 'stdout', out)
    m.setattr(sys, '__stdout__', out)
    m.setattr(screen, '_STREAMS', {write: 'stdout'})
    screen.protect()
    with pytest.raises(SystemExit) as left:
      terminal.run(values)
    assert left.value.code == 0
  out, err = capfd.readouterr()
  assert not out
  assert re.fullmatch(r'machine: .*\ncheckpoint: step 7\n', err)


def test_a_pipe_is_answered_while_it_is_open(shouting, monkeypatch):
  monkeypatch.setattr(terminal, '_CHUNK', 2)
  (stdin, ours), (theirs, stdout) = os.pipe(), os.pipe()
  with (
    open(stdin, encoding='utf-8') as given,
    open(stdout, 'w', encoding='utf-8') as made,
    monkeypatch.context() as m,
    futures.ThreadPoolExecutor() as pool,
  ):
    m.setattr(sys, 'stdin', given)
    m.setattr(sys, 'stdout', made)
    command = pool.submit(terminal.run, VALUES)
    try:
      for part, answer in (
        ('a\n', 'A\n'),
        ('b\n\nc\nd', 'B\n\nC\n'),  # The last line is not whole yet.
        (f'e\n{LINES[6]}\n', f'DE\n{LINES[6].upper()}\n'),
        ('end', ''),
      ):
        os.write(ours, part.encode())
        seen = b''
        while len(seen) < len(answer):
          assert select.select([theirs], [], [], 20)[0], seen
          seen += os.read(theirs, 2**16)
        assert seen.decode() == answer
    finally:
      os.close(ours)
      command.result(20)
  assert os.read(theirs, 99) == b'END\n'
  os.close(theirs)
  assert shouting == [(1, 0), (2, 1), (1, 3), (2, 4), (1, 6)]


def test_a_pipe_that_has_a_name(command, tmp_path):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  write = functools.partial(pipe.write_text, 'one\ntwo\n')
  threading.Thread(target=write, daemon=True).start()  # Waits for a reader.
  assert command(b'', input=str(pipe))[0] == 'ONE\nTWO\n'


def test_a_prompt_on_a_terminal(shouting, monkeypatch):
  try:
    ours, theirs = pty.openpty()
  except OSError:
    pytest.skip('no pseudo-terminals here')
  attributes = termios.tcgetattr(theirs)
  attributes[3] &= ~termios.ECHO
  termios.tcsetattr(theirs, termios.TCSANOW, attributes)
  os.write(ours, 'Hé 🔥\n\n\x04'.encode())  # Ctrl-D at the end.
  with (
    open(theirs, encoding='utf-8') as stdin,
    open(os.dup(theirs), 'w', encoding='utf-8') as stdout,
    monkeypatch.context() as m,
  ):
    m.setattr(sys, 'stdin', stdin)
    m.setattr(sys, 'stdout', stdout)
    values = VALUES | {'key': 'en', 'json': True}
    refusal(lambda: terminal.run(values), "--key is 'en'", '--input')
    terminal.run(VALUES)
    stdout.flush()
    seen, end = b'', b'> \r\n> \r\n'
    while not seen.endswith(end) and select.select([ours], [], [], 10)[0]:
      seen += os.read(ours, 4096)
  os.close(ours)
  # Each is answered before the next prompt.
  assert seen.decode() == '> HÉ 🔥\r\n> \r\n> \r\n'
  assert shouting == [(1, 0), (1, 1)]
