"""Errors meant for the person at the terminal, and where they are shown."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
import sys

from absl import app
from absl import flags
from absl import logging
import ml_collections

EXIT_CODE = 2


class UserError(Exception):
  """Bad input; the message names what was found, expected and what to do."""


def run(main: Callable[[Sequence[str]], None]) -> None:
  """absl's app.run, with every UserError as one line on stderr.

  Exit codes: 0 done, 1 unknown flag, 2 bad input, 130 interrupted.
  """

  def guarded(argv):
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax has much to tell.
    try:
      main(argv)
    except UserError as e:
      _leave(e, EXIT_CODE)
    except KeyboardInterrupt:
      _leave('interrupted; a run goes on from its last checkpoint', 130)

  app.run(guarded, flags_parser=_parse_flags)


def _leave(message, code):
  sys.stdout.flush()
  print(f'error: {message}', file=sys.stderr)
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
