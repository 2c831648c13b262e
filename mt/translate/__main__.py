"""Translates with a run's checkpoint: what it reads, what it writes.

  python -m mt.translate --workdir=W < in.txt > out.txt
  python -m mt.translate --workdir=W --input=in.txt --output=out.txt
  python -m mt.translate --workdir=W --beam=4 --n_best=4 --json < in.txt
  python -m mt.translate --workdir=W --mbr=chrf --n=16 < in.txt
  python -m mt.translate --workdir=W --mbr=comet --comet=MODEL < in.txt
  python -m mt.translate --workdir=W                  (a prompt on a terminal)

One line in, one line out, in order. An empty line stays empty. A file that
--input names may be packed as .gz or .xz; a pipe's lines are answered as they
come. With --json, an object a line:

  {"source": "Hi!", "translations": [{"text": "Salut !", "score": -0.21,
  "log_probability": -0.84, "cut_off": false}, …]}

cut_off: it reached its limit (decode.max_ratio, decode.max_extra) before its
end. With --json --key=en the input is JSON lines (or a parquet file), whose
texts stand under that key; a text may have line breaks, as its translation then
has.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import select
import stat
import sys
from typing import Any
from typing import BinaryIO

from absl import flags
import ml_collections

from mt.base import accelerator
from mt.base import cli
from mt.base import compiling
from mt.base import errors
from mt.base import files
from mt.base import foreign
from mt.base import run_folder
from mt.base import screen
from mt.data import directions
from mt.data import formats
from mt.data import lines
from mt.evaluate import comet
from mt.train import checkpoint
from mt.translate import decode
from mt.translate import mbr
from mt.translate import search as search_lib
from mt.translate import translator as translator_lib

_CHUNK = 1024  # Most lines that are sorted by length among themselves.
_DRAWS = ('temperature', 'top_k', 'top_p', 'seed')
_SAMPLES = 16  # Of --mbr, where the run says nothing.


def read_search(
  values: dict[str, Any], defaults: ml_collections.ConfigDict
) -> tuple[search_lib.Search, search_lib.Search | None]:
  """The searches that the flags ask for, and where they do not, the run.

  Args:
    values: of the flags by name; None for a flag that was not given.
    defaults: `config.decode` of the run.

  Returns:
    The search, and with --mbr what draws the other candidates.

  Raises:
    errors.UserError: two flags contradict each other.
  """
  names = [f.name for f in dataclasses.fields(search_lib.Search)]
  given = {k: values[k] for k in names if values[k] is not None}
  draws = {k: given.pop(k) for k in _DRAWS if given.get(k)}
  drawn, samples, sampling = 'temperature' in draws, 0, None
  search = translator_lib.search_of(defaults)
  search = dataclasses.replace(search, **given)
  of_run = 'chrf' if defaults.mbr and not drawn else 'none'
  if (values['mbr'] or of_run) != 'none':
    samples = values['n'] or defaults.mbr or _SAMPLES
    sampling = translator_lib.samples(defaults, search, samples)
    sampling = dataclasses.replace(sampling, **draws)
  else:
    _check_draws(given, draws)
    beam = 1 if drawn else search.beam  # In place of the run's.
    search = dataclasses.replace(search, beam=beam, **draws)
    if values['n']:
      _say('--n has no effect without --mbr=chrf or --mbr=comet')
  if (more := search.n_best - samples) > search.width:
    found, other = f'a beam of {search.beam} has', '--temperature above 0'
    if samples:
      found = f'a beam of {search.beam} and {samples} samples have'
      other = f'--n={search.n_best - search.beam}'
    raise errors.UserError(
      f'--n_best is {search.n_best}, but {found} no more than that; '
      f'--beam={more} or {other} expected.'
    )
  if search.n_best > 1 and not values['json']:
    raise errors.UserError(
      f'--n_best is {search.n_best}, but one line in is one line out; --json '
      'expected.'
    )
  return search, sampling


def _open_expected(values) -> contextlib.AbstractContextManager[mbr.Expected]:
  """What ranks the candidates of --mbr."""
  model = values['comet']
  if values['mbr'] == 'comet':
    if not model:
      raise errors.UserError(
        "--mbr is 'comet', but --comet is empty; the path of a .ckpt or a name "
        'such as Unbabel/wmt22-comet-da expected.'
      )
    return comet.expected(model)
  if model:
    _say('--comet has no effect without --mbr=comet')
  return contextlib.nullcontext(mbr.expected_chrf)


def _check_draws(given, draws):
  """Flags of drawing against the others."""
  if 'temperature' not in draws:
    for name in draws:
      _say(f'--{name} has no effect without --temperature above 0')
  elif given.get('beam', 1) > 1:
    raise errors.UserError(
      f'--beam is {given["beam"]}, --temperature {draws["temperature"]}, but '
      'beam search draws nothing; one of the two expected.'
    )


def run(values: dict[str, Any]) -> None:
  """Translates line by line.

  Args:
    values: of the flags by name.

  Raises:
    errors.UserError: bad flags, text or files, no such run or checkpoint.
  """
  workdir, asked = pathlib.Path(values['workdir']), values['input']
  key, asking = values['key'], not asked and sys.stdin.isatty()
  if key and (asking or not values['json']):
    raise errors.UserError(
      f'--key is {key!r}, but texts under a key may have several lines; --json '
      'expected, and a pipe or --input in the place of a prompt.'
    )
  config = directions.only(run_folder.read_config(workdir), values['pair'])
  search, sampling = read_search(values, config.decode)
  at, about = checkpoint.find_step(workdir, values['checkpoint'])
  with (
    _open_input(asked, key) as stream,
    _open_output(values['output']) as out,
    _open_expected(values) as expected,
  ):
    compiling.keep_compiled_programs()
    _say(accelerator.describe())
    _say(f'checkpoint: {about}')
    with contextlib.redirect_stdout(sys.stderr):  # It is no translation.
      config, source, params = checkpoint.load_finetuned(workdir, at)
    params = decode.unstack(params, config.train.dtype)  # Once for all lines.
    config = directions.only(config, values['pair'])
    translator = translator_lib.from_config(config, source)
    settings = dataclasses.replace(translator.settings, search=search)
    translator = dataclasses.replace(
      translator,
      settings=settings,
      sampling=sampling,
      expected=expected,
      say=_say,
    )
    done = cut_off = 0
    for chunk in _ask() if asking else _read_texts(stream, asked, key):
      found = translator.n_best(params, chunk, first=done)
      done += len(chunk)
      for text, translations in zip(chunk, found, strict=True):
        made = translations[0].text
        cut_off += translations[0].cut_off
        if values['json']:
          each = [dataclasses.asdict(t) for t in translations]
          made = {'source': text, 'translations': each}
          made = json.dumps(made, ensure_ascii=False)
        out.write(f'{made}\n'.encode())
      out.flush()
      if not values['output']:
        screen.check()
  if cut_off:
    _say(translator_lib.limit_note(cut_off, done))


def _say(text):
  print(text, file=sys.stderr)


def _open_input(name, key) -> contextlib.AbstractContextManager[BinaryIO]:
  if not name:
    return contextlib.nullcontext(sys.stdin.buffer)
  try:
    if files.is_pipe(name):
      return open(name, 'rb')
    keys = [key] if key else []
    return open(formats.open_plain(name, keys=keys, aligned=not key).path, 'rb')
  except OSError as e:
    raise errors.UserError(
      f'{name}: cannot read it ({e.strerror}); --input must name a text file.'
    ) from e


def _open_output(name) -> contextlib.AbstractContextManager[BinaryIO]:
  if not name:
    return contextlib.nullcontext(sys.stdout.buffer)
  if os.path.isdir(name):  # Else noticed at the end only.
    raise errors.UserError(f'{name} is a folder; --output must name a file.')
  return files.new_file(pathlib.Path(name))


def _read_texts(stream: BinaryIO, name: str, key: str) -> Iterator[list[str]]:
  """The texts of lines; what training would not use is refused."""
  done, name = 0, name or 'standard input'
  for chunk in _read_lines(stream):
    yield [_text(raw, n, name, key) for n, raw in enumerate(chunk, done + 1)]
    done += len(chunk)


def _read_lines(stream):
  """Lines in chunks; of what is no file, those that have come."""
  if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
    while chunk := list(itertools.islice(stream, _CHUNK)):
      yield chunk
    return
  came, more, rest = [], True, b''
  while more or came:
    wait = 0 if came else None
    if len(came) < _CHUNK and more and select.select([stream], [], [], wait)[0]:
      more = stream.read1(2**16)
      *whole, rest = (rest + more).split(b'\n')
      came += [line + b'\n' for line in whole]
      if not more and rest:
        came.append(rest)
    else:
      yield came[:_CHUNK]
      came = came[_CHUNK:]


def _text(raw, number, name, key):
  if number == 1:
    foreign.refuse_no_text(raw, name)
    raw = raw.removeprefix(formats.BOM)
  text, fault = lines.decode(raw)
  if key and not fault:
    found = lines.json_texts(text, [key])
    text, fault = ('', found) if isinstance(found, str) else (found[0], '')
  if fault:
    expected = f'a JSON object with {key!r}' if key else 'UTF-8'
    raise errors.UserError(
      f'{name}, line {number}: {fault}; {expected} is expected: mend the line.'
    )
  return text


def _ask() -> Iterator[list[str]]:
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
      _say('That is not UTF-8.')
      continue
    yield [text]


def main(_):
  run(flags.FLAGS.flag_values_dict())


if __name__ == '__main__':
  # Numbers after a help text are bounds.
  text, whole = flags.DEFINE_string, flags.DEFINE_integer
  number = flags.DEFINE_float
  text('workdir', None, 'Folder of a run of train.py.', required=True)
  text('checkpoint', '', checkpoint.WHICH)
  text('pair', '', 'Of several directions that the run has learned, which one.')
  text('input', '', 'File to translate, instead of standard input.')
  text('output', '', 'File for the translations, whole or not at all.')
  flags.DEFINE_bool('json', False, 'Write JSON lines, with scores.')
  text('key', '', 'Read JSON lines or parquet: where the text of each stands.')
  whole('beam', None, "Hypotheses of beam search; the run's decode.beam.", 1)
  number('length_penalty', None, "See the run's decode.length_penalty.", 0.0)
  whole('n_best', 1, 'Translations of each line; above 1 with --json.', 1)
  number('temperature', 0.0, 'Above 0: draw tokens from p^(1/temperature).', 0)
  whole('top_k', None, 'Draw from so many most probable tokens; 0 for all.', 0)
  number('top_p', None, 'From the fewest that have this probability.', 1e-6, 1)
  flags.DEFINE_enum(
    'mbr',
    None,
    ['chrf', 'comet', 'none'],
    'Of the translations found and --n drawn ones, the one that is most like '
    "all of them; the run's decode.mbr, by chrf.",
  )
  text('comet', '', 'Of --mbr=comet: the path of a .ckpt, or a name.')
  whole('n', None, 'Samples of --mbr; 16 if neither flag nor run says.', 2)
  whole('no_repeat_ngram', None, "See the run's decode.no_repeat_ngram.", 0)
  number('repetition_penalty', None, 'See decode.repetition_penalty.', 0.01)
  whole('seed', None, 'Of the draws; 0 if not given.', 0, 2**32 - 1)
  cli.run(main)
