"""What all commands share: flags, --config, --help, and how they end."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
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
from mt.base import errors

# Flags that are defined here belong to the command that calls.
flags.disclaim_key_flags()


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command: `main` is called after the flags are read.

  What ends it for a reason is one line on stderr. Exit codes: 0 done, 1 unknown
  flag, 2 bad input, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
  """
  flags.DEFINE_bool(
    'traceback', False, 'Show where in the code an error comes from.'
  )

  def guarded(argv):
    signal.signal(signal.SIGTERM, _terminated)
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax has much to tell.
    try:
      if len(argv) > 1:
        raise errors.UserError(
          f'{argv[1]!r} is no flag; write --flag=value, with the dashes; see '
          '--help.'
        )
      main(argv)
    except (errors.UserError, errors.Interrupted) as e:
      _leave(e, e.code)
    except KeyboardInterrupt as e:
      _leave(e, 130, 'interrupted; a run goes on from its last checkpoint')

  app.run(guarded, flags_parser=_parse_flags)


def _terminated(number, _frame):
  raise errors.Interrupted(
    'terminated; a run goes on from its last checkpoint', 128 + number
  )


def _leave(e, code, message=''):
  sys.stdout.flush()
  if '--traceback' in sys.argv:
    traceback.print_exception(e)
  print(f'error: {message or e}', file=sys.stderr, flush=True)
  if isinstance(e, errors.ExitNow):
    os._exit(code)
  sys.exit(code)


# Flags.


def define_config() -> None:
  """Defines --config."""
  config_flags.DEFINE_config_file(
    'config',
    'configs/gemma3_270m.py',
    'File with the knobs, see configs/default.py; --config.KNOB=VALUE sets one '
    'of them.',
  )


def read_config() -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """What --config gives, and its file.

  Raises:
    errors.UserError: no such file.
  """
  path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  if not path.is_file():
    raise errors.UserError(f'--config={path}: no such file; see configs/.')
  return flags.FLAGS.config, path


def _parse_flags(argv):
  if {'--help', '-help', '-h'} & set(argv):
    print(help_of_command())
    sys.exit(0)
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    _leave(e, 1, ' '.join(str(e).split()))
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    # ml_collections raises these out of --config and --config.knob=value.
    _leave(e, errors.UserError.code, _config_error(argv, e))


def _config_error(argv, error):
  for arg in argv:
    if not arg.startswith('--config.'):
      continue
    path = arg.split('=')[0].removeprefix('--config.').split('.')
    level = default.get_config()
    for depth, part in enumerate(path):
      if not isinstance(level, ml_collections.ConfigDict) or part not in level:
        return _no_such_knob(path, depth, level)
      level = level[part]
  return f'--config: {" ".join(str(error).split())}'


def _no_such_knob(path, depth, level):
  text = f'--config.{".".join(path)}: there is no such knob'
  above = ''.join(part + '.' for part in path[:depth])
  if not isinstance(level, ml_collections.ConfigDict):
    return f'{text}; {above[:-1]} is one value.'
  near = difflib.get_close_matches(path[depth], level.keys(), 1)
  if near and isinstance(level[near[0]], ml_collections.ConfigDict):
    above, level, near = f'{above}{near[0]}.', level[near[0]], []
  if near:
    text += f'; did you mean {above}{near[0]}'
  return f'{text}; there are {above}{{{", ".join(level)}}}.'


# --help.


def help_of_command() -> str:
  """What the command does, its own flags, and the knobs if it has --config."""
  parts = [(sys.modules['__main__'].__doc__ or '').strip(), 'Flags']
  own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  for flag in sorted(own, key=lambda f: f.name):
    parts.append(_entry(flag.name, flag.default_unparsed, flag.help))
  if 'config' in flags.FLAGS:
    parts += ['Knobs, with the defaults of configs/default.py', help_of_knobs()]
  return '\n\n'.join(parts)


def help_of_knobs() -> str:
  """Each knob of configs/default.py: its name, default and comment."""
  return '\n\n'.join(
    _entry(f'config.{k.path}', k.default, k.doc) for k in default.KNOBS
  )


def _entry(name, value, text):
  if isinstance(value, str):
    value = repr(value)[1:-1]  # A line break in a prompt.
  shown = '' if value is None else f'={value}'
  indent = '      '
  text = textwrap.fill(
    ' '.join(text.split()), 80, initial_indent=indent, subsequent_indent=indent
  )
  return f'  --{name}{shown}\n{text}'
