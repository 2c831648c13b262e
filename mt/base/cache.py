"""The folder of what is kept between runs."""

import os
import pathlib


def cache_dir() -> pathlib.Path:
  """Where weights, MTNT and compiled programs are kept between runs."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'mt'
