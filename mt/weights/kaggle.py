"""Checkpoints from Kaggle, through Kaggle's own client and into its cache.

Handles are OWNER/MODEL/FRAMEWORK/VARIATION, with /VERSION at the end to pin it:
google/gemma/flax/2b-it, google/gemma-2/flax/gemma2-2b-it,
google/gemma-3/flax/gemma3-4b-it, …. Credentials are the client's own:
KAGGLE_USERNAME and KAGGLE_KEY, KAGGLE_API_TOKEN, or files in ~/.kaggle.
The cache is ~/.cache/kagglehub, or where KAGGLEHUB_CACHE says.
"""

import pathlib
import re

from mt.base import errors
from mt.base import journal

_SITE = 'https://www.kaggle.com'
_TOKENS = f'{_SITE}/settings'


def download(handle: str, *, force: bool = False) -> pathlib.Path:
  """The folder of a model; fetched with a progress bar at the first call.

  A file that was cut off goes on where it stopped. Without a network the newest
  version in the cache is taken.

  Args:
    handle: see the module's docstring.
    force: fetch again what the cache has.

  Raises:
    errors.UserError: no such model, no or wrong credentials, licence not
      accepted, no network, cut off, damaged, full disk.
  """
  if not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*){3}(/\d{1,9})?', handle):
    raise errors.UserError(
      f'kaggle:{handle}: OWNER/MODEL/FRAMEWORK/VARIATION expected, or '
      'with /VERSION after it, such as kaggle:google/gemma/flax/2b-it.'
    )
  # Here: they take half a second, and it sets up loggers.
  import kagglehub
  from kagglehub import exceptions
  import requests

  try:
    return pathlib.Path(kagglehub.model_download(handle, force_download=force))
  except (
    requests.RequestException,
    exceptions.DataCorruptionError,
    OSError,
    ValueError,
  ) as e:
    away = isinstance(e, requests.ConnectionError | requests.Timeout)
    if away and not force and (cached := _newest_in_cache(handle)):
      journal.say(f'weights: Kaggle does not answer, taken from {cached}')
      return cached
    what, remedy = _refused(handle, away, e)
    raise errors.UserError(f'kaggle:{handle}: {what}; {remedy}.') from e


def _refused(handle, away, e):
  """What was found and what to do, of what the client raises."""
  from kagglehub import config
  from kagglehub import exceptions
  import requests

  again = 'give the same command again'
  if isinstance(e, requests.exceptions.ChunkedEncodingError):
    what = f'the connection was cut off ({_reason(e)})'
    return what, f'{again}, it goes on from there'
  if isinstance(e, exceptions.DataCorruptionError):
    return 'a file came damaged (md5)', again
  if away:
    what = f'Kaggle does not answer ({_reason(e)})'
    return what, 'try again later, or give the folder of a checkpoint'
  if not isinstance(e, requests.RequestException):
    if isinstance(e, ValueError):  # The client's own complaints.
      return str(e)[:200], f'check the handle, and the token of {_TOKENS}'
    return f'{e.filename or "the cache"}: {e.strerror or e}', (
      'make room or mend it, or set KAGGLEHUB_CACHE to a folder with space for '
      'it (2B takes 5 GB, 27B 55 GB)'
    )
  status = 0 if e.response is None else e.response.status_code
  page = f'{_SITE}/models/{"/".join(handle.split("/")[:2])}'
  if status in (401, 403):
    known = config.get_kaggle_credentials()
    who = (known and known.username) or ('the token' if known else 'nobody')
    return f'Kaggle does not give it to {who} ({status})', (
      f'accept its licence at {page}, or make a new token at {_TOKENS} and set '
      'KAGGLE_USERNAME and KAGGLE_KEY'
    )
  if status == 404:
    return 'Kaggle has no such model (404)', f'see the variations at {page}'
  return f'Kaggle answers {status or _reason(e)}', 'try again later'


def _reason(e: BaseException) -> str:
  """What the operating system said, under the layers of HTTP."""
  while e.__context__:
    e = e.__context__
  text = getattr(e, 'strerror', None) or str(e) or type(e).__name__
  return ' '.join(text.split())[:200]


def _newest_in_cache(handle: str) -> pathlib.Path | None:
  """The client asks for the newest version first; this needs no network."""
  from kagglehub import config

  folder = pathlib.Path(config.get_cache_folder(), 'models', handle)
  whole = [
    p.with_suffix('')
    for p in folder.glob('*.complete')
    if p.stem.isdigit() and p.with_suffix('').is_dir()
  ]
  return max(whole, key=lambda p: int(p.name), default=None)
