"""The folder of what is kept between runs."""

import os
import pathlib

from mt.base import errors


def cache_dir() -> pathlib.Path:
  """Where weights, MTNT and compiled programs are kept between runs."""
  try:
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  except RuntimeError as e:
    raise errors.UserError(
      f'HOME is not set and user {os.getuid()} has no home folder; set HOME or '
      'XDG_CACHE_HOME to a folder that you may write to.'
    ) from e
  return pathlib.Path(root) / 'mt'
