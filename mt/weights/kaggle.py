"""Checkpoints from Kaggle, through Kaggle's own client and into its cache.

Handles are OWNER/MODEL/FRAMEWORK/VARIATION, with /VERSION at the end to pin it:
google/gemma/flax/2b-it, google/gemma-2/flax/gemma2-2b-it,
google/gemma-3/flax/gemma3-4b-it, …. Credentials are the client's own:
KAGGLE_USERNAME and KAGGLE_KEY, KAGGLE_API_TOKEN, or files in ~/.kaggle.
The cache is ~/.cache/kagglehub, or where KAGGLEHUB_CACHE says.
"""

import functools
import os
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
      f'weights.source names the Kaggle model {handle!r}; four parts (and a '
      'version, if you like) expected, such as google/gemma/flax/2b-it.'
    )
  # Here: they take half a second, and it sets up loggers.
  import kagglehub
  from kagglehub import exceptions
  import requests

  failed = functools.partial(_failed, handle)
  try:
    return pathlib.Path(kagglehub.model_download(handle, force_download=force))
  except requests.exceptions.ChunkedEncodingError as e:
    raise failed(
      f'the connection was cut off ({_reason(e)})',
      'give the same command again, it goes on from there',
    ) from e
  except (requests.ConnectionError, requests.Timeout) as e:
    cached = None if force else _newest_in_cache(handle)
    if cached is None:
      raise failed(
        f'Kaggle does not answer ({_reason(e)})',
        'try again later, or give the folder of a checkpoint that is here',
      ) from e
    journal.say(f'weights: Kaggle does not answer, taken from {cached}')
    return cached
  except requests.RequestException as e:
    status = 0 if e.response is None else e.response.status_code
    raise failed(*_refused(handle, status, e)) from e
  except exceptions.DataCorruptionError as e:
    raise failed(
      'a file came damaged (md5)', 'give the same command again'
    ) from e
  except OSError as e:
    raise failed(
      f'{e.filename or "the cache"}: {e.strerror or e}',
      'make room or mend it, or set KAGGLEHUB_CACHE to a folder with space for '
      'it (2B takes 5 GB, 27B 55 GB)',
    ) from e
  except ValueError as e:  # The client's own complaints.
    raise failed(
      str(e)[:200],
      f'check the handle, and the token of {_TOKENS}',
    ) from e


def _refused(handle, status, e):
  """What was found and what to do, by HTTP status."""
  from kagglehub import config

  owner, model, *_ = handle.split('/')
  page = f'{_SITE}/models/{owner}/{model}'
  token = (
    f'make a new token at {_TOKENS} and set KAGGLE_USERNAME and KAGGLE_KEY'
  )
  known = config.get_kaggle_credentials()
  who = (known and known.username) or 'whoever has the token'
  if status in (401, 403) and known is None:
    return f'Kaggle wants to know who you are ({status})', token
  if status == 401:
    return f'Kaggle does not accept the credentials of {who} (401)', token
  if status == 403:
    what = 'Kaggle does not let you have it (403)'
    return what, f'accept its licence at {page} as {who}, or {token}'
  if status == 404:
    return 'Kaggle has no such model (404)', f'see the variations at {page}'
  return f'Kaggle answers {status or _reason(e)}', 'try again later'


def _failed(handle, what, remedy) -> errors.UserError:
  return errors.UserError(f'weights.source=kaggle:{handle}: {what}; {remedy}.')


def _reason(e: BaseException) -> str:
  """What the operating system said, under the layers of HTTP."""
  while e.__context__:
    e = e.__context__
  text = getattr(e, 'strerror', None) or str(e) or type(e).__name__
  return ' '.join(text.split())[:200]


def _newest_in_cache(handle: str) -> pathlib.Path | None:
  """The client asks for the newest version first; this needs no network."""
  from kagglehub import config

  folder = os.path.join(config.get_cache_folder(), 'models', *handle.split('/'))
  whole = [
    p.with_suffix('')
    for p in pathlib.Path(folder).glob('*.complete')
    if p.stem.isdigit() and p.with_suffix('').is_dir()
  ]
  return max(whole, key=lambda p: int(p.name), default=None)
