"""What all commands share: flags, --config, --help, and how they end."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
import errno
import os
import pathlib
import signal
import sys
import textwrap
import traceback

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

from configs import default
from mt.base import accelerator
from mt.base import errors
from mt.base import screen

# By the number of an OSError that is never a bug: a disk that is full or only
# to be read, a path that is too long or another's.
_REMEDIES = {
  **dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    'make room, or name another folder',
  ),
  **dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    'check the path, and what you may do there',
  ),
}

# Flags that are defined here belong to the command that calls.
flags.disclaim_key_flags()


def run(main: Callable[[Sequence[str]], None], words_of: str = '') -> None:
  """Runs a command: `main` is called after the flags are read.

  Words without dashes are refused, but for those after the flag `words_of`.

  Exit codes: 0 done, 1 bad flag, 2 bad input, 128 + the number of a signal
  (130 of SIGINT, 143 of SIGTERM); all but the first with one line on stderr.
  """
  screen.protect()
  # JAX reserves so much of a GPU's memory when it starts, and uses no more; by
  # default it is 0.75. What is left is for CUDA and its libraries.
  if 'XLA_CLIENT_MEM_FRACTION' not in os.environ:
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
  flags.DEFINE_bool(
    'traceback', False, 'Show where in the code an error comes from.'
  )

  def guarded(argv):
    for number in errors.heard_signals():
      signal.signal(number, _terminated)
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.FATAL)  # Orbax's; what fails is raised.
    try:
      if len(argv) > 1 and not (words_of and flags.FLAGS[words_of].present):
        raise errors.UserError(
          f'{argv[1]!r} is no flag; write --flag=value, with the dashes; see '
          '--help.'
        )
      main(argv)
    except (errors.UserError, errors.Interrupted) as e:
      _leave(e, code=e.code)
    except KeyboardInterrupt as e:
      _leave(e, 'interrupted; of a run, the last checkpoint stands', 130)
    except OSError as e:
      if not (said := sentence(e)):
        raise
      _leave(e, said)
    except (RuntimeError, AssertionError) as e:
      problem = accelerator.problem()
      if not problem:
        raise
      _leave(e, problem)

  app.run(guarded, flags_parser=_parse_flags)


def sentence(e: OSError) -> str:
  """What to say of an error that is never a bug; '' of any other."""
  remedy = _REMEDIES.get(e.errno)
  return f'{e}; {remedy}.' if remedy else ''


def _terminated(number, _frame):
  raise errors.Interrupted(
    'terminated; a run goes on from its last checkpoint', 128 + number
  )


def _leave(e, message='', code=errors.UserError.code):
  sys.stdout.flush()
  parsed = flags.FLAGS.is_parsed()
  if flags.FLAGS.traceback if parsed else '--traceback' in sys.argv:
    traceback.print_exception(e)
  print(f'error: {message or e}', file=sys.stderr, flush=True)
  if isinstance(e, errors.ExitNow):
    os._exit(code)
  sys.exit(code)


def define_config() -> None:
  """Defines --config."""
  screen.protect()
  try:
    _check_knobs(sys.argv)  # ml_collections reads them while it defines.
  except errors.UserError as e:
    _leave(e)
  config_flags.DEFINE_config_file(
    'config',
    'configs/gemma3_270m.py',
    'File with the knobs, see configs/default.py; --config.KNOB=VALUE sets one '
    'of them.',
  )


def read_config() -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """What --config gives, and its file."""
  path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  try:
    path.open('rb').close()
  except OSError as e:
    raise errors.UserError(
      f'--config={path}: cannot read it ({e.strerror}); see configs/.'
    ) from e
  return flags.FLAGS.config, path


def _parse_flags(argv):
  if {'--help', '-help', '-h'} & set(argv):
    print(help_of_command())
    sys.exit(0)
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    _leave(e, ' '.join(str(e).split()), 1)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    # ml_collections raises these out of --config and --config.knob=value.
    if any(
      f.name == 'get_config' for f in traceback.extract_tb(e.__traceback__)
    ):
      raise  # A bug in the config file, whose line is to be seen.
    _leave(e, f'--config: {" ".join(str(e).split())}')


def _check_knobs(argv):
  """ml_collections takes a misspelt knob for a bug of the program."""
  known = [knob.path for knob in default.KNOBS]
  for arg in argv:
    path = arg.split('=')[0].removeprefix('--config.')
    if not arg.startswith('--config.') or path in known:
      continue
    last = path.split('.')[-1]
    near = [k for k in known if k.split('.')[-1] == last]
    near = near or difflib.get_close_matches(path, known, 1)
    meant = f'did you mean {" or ".join(near)}? ' if near else ''
    raise errors.UserError(
      f'--config.{path}: there is no such knob; {meant}--help lists them.'
    )


def help_of_command() -> str:
  """What the command does, its own flags, and the knobs if it has --config."""
  parts = [(sys.modules['__main__'].__doc__ or '').strip(), 'Flags']
  own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  for flag in sorted(own, key=lambda f: f.name):
    parts.append(_entry(flag.name, flag.default_unparsed, flag.help))
  if 'config' in flags.FLAGS:
    parts.append('Knobs, with the defaults of configs/default.py')
    for knob in default.KNOBS:
      parts.append(_entry(f'config.{knob.path}', knob.default, knob.doc))
  return '\n\n'.join(parts)


def _entry(name, value, text):
  if isinstance(value, str):
    value = repr(value)[1:-1]  # A line break in a prompt.
  shown = '' if value is None else f'={value}'
  text = textwrap.fill(' '.join(text.split()), 74)
  return f'  --{name}{shown}\n{textwrap.indent(text, " " * 6)}'
