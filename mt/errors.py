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
      _leave('interrupted; the same command goes on from the last save', 130)

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
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  if isinstance(config, ml_collections.ConfigDict):
    knobs = _knobs(config)
    for arg in argv:
      name = arg.split('=')[0].lstrip('-').removeprefix('config.')
      if arg.startswith('--config.') and name not in knobs:
        near = difflib.get_close_matches(name, knobs, 1, 0)[0]
        return (
          f'--config.{name}: there is no such knob; the nearest is {near!r} '
          '(configs/default.py has them all).'
        )
  return f'--config: {" ".join(str(error).split())}'


def _knobs(config, prefix=''):
  names = []
  for key, value in config.items():
    names.append(prefix + key)
    if isinstance(value, ml_collections.ConfigDict):
      names += _knobs(value, f'{prefix}{key}.')
  return names
