"""`python -m mt.translate`: what it reads, what it writes, and its flags.

  python -m mt.translate --workdir=W < in.txt > out.txt
  python -m mt.translate --workdir=W --input=in.txt --output=out.txt
  python -m mt.translate --workdir=W --beam=4 --n_best=4 --json < in.txt
  python -m mt.translate --workdir=W                  (a prompt on a terminal)

One line in, one line out, in order. An empty line stays empty. With --json, an
object a line:

  {"source": "Hi!", "translations": [{"text": "Salut !", "score": -0.21,
  "log_probability": -0.84}, …]}
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
from typing import Any
from typing import BinaryIO

from absl import flags
import ml_collections

from mt.base import cli
from mt.base import compiling
from mt.base import errors
from mt.base import run_folder
from mt.train import checkpoint
from mt.translate import decode
from mt.translate import search as search_lib
from mt.translate import translator

_LINES_AT_ONCE = 1024  # Sorted by length among themselves.

# Flag -> (test, what is expected).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
  'beam': (lambda v: v >= 1, '1 or more'),
  'length_penalty': (lambda v: 0 <= v < math.inf, '0 or more'),
  'n_best': (lambda v: v >= 1, '1 or more'),
  'temperature': (lambda v: 0 <= v < math.inf, '0 or more'),
  'top_k': (lambda v: v >= 0, '0 or more'),
  'top_p': (lambda v: 0 < v <= 1, 'more than 0, at most 1'),
  'seed': (lambda v: 0 <= v < 2**32, 'from 0 to 4294967295'),
}

_OF_A_SEARCH = [f.name for f in dataclasses.fields(search_lib.Search)]


def define_flags() -> None:
  """Defines the flags of the command."""
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  text('workdir', None, 'Folder of a run of train.py.')
  text('checkpoint', '', checkpoint.WHICH)
  text('input', '', 'File to translate, instead of standard input.')
  text('output', '', 'File for the translations, whole or not at all.')
  flags.DEFINE_bool('json', False, 'Write JSON lines, with scores.')
  number('beam', None, "Hypotheses of beam search; the run's decode.beam.")
  flags.DEFINE_float(
    'length_penalty', None, "See the run's decode.length_penalty."
  )
  number('n_best', 1, 'Translations of each line; more than one with --json.')
  flags.DEFINE_float(
    'temperature', None, 'Draw tokens from p^(1/temperature); 0 draws nothing.'
  )
  number('top_k', None, 'Draw from so many most probable tokens; 0 for all.')
  flags.DEFINE_float(
    'top_p', None, 'Draw from the fewest tokens with so much probability.'
  )
  number('seed', None, 'Of the draws; 0 if not given.')
  flags.mark_flag_as_required('workdir')


def read_search(
  values: dict[str, Any], defaults: ml_collections.ConfigDict
) -> search_lib.Search:
  """The search that the flags ask for, and where they do not, the run.

  Args:
    values: of the flags by name; None for a flag that was not given.
    defaults: `config.decode` of the run.

  Raises:
    errors.UserError: an impossible value, or two that contradict each other.
  """
  for name, (test, expected) in _RULES.items():
    value = values[name]
    if value is not None and not test(value):
      raise errors.UserError(f'--{name} is {value!r}; {expected} expected.')
  given = {k: values[k] for k in _OF_A_SEARCH if values[k] is not None}
  sampling = given.get('temperature', 0) > 0
  for name in ('top_k', 'top_p', 'seed'):
    if name in given and not sampling:
      raise errors.UserError(
        f'--{name} is {given[name]}, but nothing is drawn; --temperature above '
        '0 expected.'
      )
  if sampling and given.get('beam', 1) > 1:
    raise errors.UserError(
      f'--beam is {given["beam"]}, --temperature {given["temperature"]}, but '
      'beam search draws nothing; one of the two expected.'
    )
  search = search_lib.Search(
    **{
      'beam': 1 if sampling else defaults.beam,
      'length_penalty': defaults.length_penalty,
    }
    | given
  )
  if search.n_best > search.width:
    raise errors.UserError(
      f'--n_best is {search.n_best}, but a beam of {search.beam} has no more '
      f'than that; --beam={search.n_best} or --temperature above 0 expected.'
    )
  if search.n_best > 1 and not values['json']:
    raise errors.UserError(
      f'--n_best is {search.n_best}, but one line in is one line out; --json '
      'expected.'
    )
  return search


def main(argv) -> None:
  """The command."""
  if len(argv) > 1:
    raise errors.UserError(
      f'{argv[1]!r} is no flag; give the text on standard input or as --input.'
    )
  try:
    run(flags.FLAGS.flag_values_dict())
  except BrokenPipeError:  # The reader has what it wanted.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)


def run(values: dict[str, Any]) -> None:
  """Translates line by line.

  Args:
    values: of the flags by name, see define_flags.

  Raises:
    errors.UserError: bad flags, text or files, no such run or checkpoint.
  """
  workdir = pathlib.Path(values['workdir'])
  search = read_search(values, run_folder.read_config(workdir).decode)
  at, about = checkpoint.find_step(workdir, values['checkpoint'])
  with (
    _open_input(values['input']) as (lines, at_once),
    _open_output(values['output']) as write,
  ):
    compiling.keep_compiled_programs()
    print(f'checkpoint: {about}', file=sys.stderr)
    config, source, params = checkpoint.load_finetuned(workdir, at)
    params = decode.unstack(params)  # Once, and not for every chunk.
    nbest = translator.nbest_from_config(config, source, search)
    done = 0
    while chunk := list(itertools.islice(lines, at_once)):
      found = nbest(params, chunk, first=done)
      done += len(chunk)
      both = zip(chunk, found, strict=True)
      write([_as_json(*x) if values['json'] else x[1][0].text for x in both])


def _as_json(source, translations) -> str:
  out = [dataclasses.asdict(t) for t in translations]
  return json.dumps({'source': source, 'translations': out}, ensure_ascii=False)


@contextlib.contextmanager
def _open_input(name: str) -> Iterator[tuple[Iterator[str], int]]:
  """Lines, and how many of them to translate at once."""
  if not name and sys.stdin.isatty():
    yield _ask(), 1
  elif not name:
    yield _read_lines(sys.stdin.buffer, 'standard input'), _LINES_AT_ONCE
  else:
    try:
      file = open(name, 'rb')  # noqa: SIM115
    except OSError as e:
      raise errors.UserError(
        f'{name}: cannot read it ({e.strerror}); --input must name a text file.'
      ) from None
    with file:
      yield _read_lines(file, name), _LINES_AT_ONCE


def _read_lines(stream: BinaryIO, name: str) -> Iterator[str]:
  """Lines of UTF-8, ended by LF or CRLF and nothing else."""
  for number, line in enumerate(stream, 1):
    try:
      text = line.decode()
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f'{name}, line {number}: not UTF-8 ({e.reason} at byte {e.start}); '
        'convert it to UTF-8.'
      ) from None
    yield text.removesuffix('\n').removesuffix('\r')


def _ask() -> Iterator[str]:
  """Lines that someone types, until Ctrl-D."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # Arrow keys and a history.
  while True:
    try:
      text = input('> ' if sys.stdout.isatty() else '')
      text.encode()
    except EOFError:
      print()
      return
    except UnicodeError:
      print('That is not UTF-8.', file=sys.stderr)
      continue
    yield text


@contextlib.contextmanager
def _open_output(name: str) -> Iterator[Callable[[Sequence[str]], None]]:
  """A function that writes lines."""
  if not name:
    yield lambda lines: _write(sys.stdout.buffer, lines)
    return
  path = pathlib.Path(name)
  part = path.with_name(f'{path.name}.{os.getpid()}.part')

  def attempt(action, *args):
    try:
      return action(*args)
    except OSError as e:
      raise errors.UserError(
        f'{path}: cannot write it ({e.strerror}); give --output a file with '
        'space that you may write to.'
      ) from None

  if path.is_dir():  # Else noticed at the very end only.
    attempt(path.open, 'wb')
  file = attempt(part.open, 'wb')
  try:
    with file:
      yield lambda lines: attempt(_write, file, lines)
    attempt(os.replace, part, path)
  finally:
    part.unlink(missing_ok=True)


def _write(stream: BinaryIO, lines: Sequence[str]) -> None:
  stream.write(''.join(line + '\n' for line in lines).encode())
  stream.flush()


if __name__ == '__main__':
  define_flags()
  cli.run(main)
