"""Errors meant for the person at the terminal, and the flags that they give."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
import os
import pathlib
import signal
import sys

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

EXIT_CODE = 2


class UserError(Exception):
  """Bad input; the message names what was found, expected and what to do.

  It is one line: what a terminal would not show as it is, such as a line break
  in a name, becomes an escape.
  """

  def __init__(self, message: str):
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
    super().__init__(''.join(shown))


class ExitNow(UserError):
  """Something does not come back, and an orderly end would wait for it."""


class Interrupted(Exception):
  """Someone asked the program to end; with its exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


def run(main: Callable[[Sequence[str]], None]) -> None:
  """absl's app.run, with every UserError as one line on stderr.

  Exit codes: 0 done, 1 unknown flag, 2 bad input, 130 interrupted (SIGINT), 143
  terminated (SIGTERM).
  """

  def guarded(argv):
    signal.signal(signal.SIGTERM, _terminated)
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax has much to tell.
    try:
      main(argv)
    except ExitNow as e:
      _leave(e, EXIT_CODE, at_once=True)
    except UserError as e:
      _leave(e, EXIT_CODE)
    except Interrupted as e:
      _leave(e, e.code)
    except KeyboardInterrupt:
      _leave('interrupted; a run goes on from its last checkpoint', 130)

  app.run(guarded, flags_parser=_parse_flags)


def define_config() -> None:
  """Defines --config."""
  config_flags.DEFINE_config_file(
    'config', 'configs/gemma3_270m.py', 'Knobs: see configs/default.py.'
  )


def read_config(
  argv: Sequence[str],
) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """What --config gives, and its file.

  Args:
    argv: what is left of the command line after the flags.

  Raises:
    UserError: no such file, or an argument that is no flag.
  """
  if len(argv) > 1:
    raise UserError(
      f'{argv[1]!r} is no flag; write --config.knob=value, with the dashes.'
    )
  path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  if not path.is_file():
    raise UserError(f'--config={path}: no such file; see configs/.')
  return flags.FLAGS.config, path


def _terminated(number, _frame):
  raise Interrupted(
    'terminated; a run goes on from its last checkpoint', 128 + number
  )


def _leave(message, code, at_once=False):
  sys.stdout.flush()
  print(f'error: {message}', file=sys.stderr, flush=True)
  if at_once:
    os._exit(code)
  sys.exit(code)


def _parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    _leave(str(e).replace('\n', ' '), 1)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    # ml_collections raises these out of --config and --config.knob=value.
    _leave(_config_error(argv, e), EXIT_CODE)


def _config_error(argv, error):
  from configs import default

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
