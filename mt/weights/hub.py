"""Models from the Hugging Face hub, through its own client and cache.

Names are OWNER/MODEL, OWNER/MODEL@REVISION (a branch, a tag or a commit), and
OWNER/MODEL/FILE.gguf. Token, cache and offline mode are the client's own: `hf
auth login` or HF_TOKEN, HF_HOME, HF_HUB_OFFLINE=1. A model that is in the cache
is taken from there when the hub does not answer.
"""

import contextlib
import pathlib
import re

import huggingface_hub  # Its attributes are loaded when they are used.
from huggingface_hub import constants

from mt.base import errors

_NAME = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(/[\w./-]+\.gguf)?(@[\w./-]+)?')
# What mt/weights/hf.py and peft.py read, and what an export passes on.
_FILES = '*.json', '*.safetensors', 'tokenizer.model', 'chat_template.jinja'


def download(name: str, *, force: bool = False) -> pathlib.Path:
  """The folder of a model, or its file; fetched with progress bars.

  Args:
    name: see the module's docstring.
    force: fetch again what the cache has.

  Raises:
    errors.UserError: no such model, revision or file, no or a wrong token,
      licence not accepted, no network, full disk.
  """
  match = _NAME.fullmatch(name)
  if not match:
    raise errors.UserError(
      f'hf:{name}: OWNER/MODEL expected, or OWNER/MODEL@REVISION, or '
      'OWNER/MODEL/FILE.gguf, such as hf:google/gemma-3-270m.'
    )
  model, file, revision = match.groups('')
  with _refusing(f'hf:{name}', model, revision[1:]):
    folder = huggingface_hub.snapshot_download(
      model,
      revision=revision[1:] or None,
      allow_patterns=[file[1:]] if file else list(_FILES),
      ignore_patterns=None if file else ['*/*'],
      force_download=force,
    )
  path = pathlib.Path(folder + file)
  if not (path.is_file() if file else any(path.glob('*.safetensors'))):
    lacks = f'{file[1:]} is not' if file else 'no .safetensors file is'
    raise errors.UserError(
      f'hf:{name}: {lacks} in it; see '
      f'{_page(model)}/tree/main, and of GGUF files name one: '
      f'hf:{model}/FILE.gguf.'
    )
  return path


def check_upload(name: str) -> str:
  """OWNER/MODEL of hf:OWNER/MODEL, if there is somebody to send it.

  Raises:
    errors.UserError: another name, or no token.
  """
  match = re.fullmatch(r'hf:(\w[\w.-]*/\w[\w.-]*)', name)
  if not match:
    raise errors.UserError(f'--push={name}: hf:USER/NAME expected.')
  if huggingface_hub.get_token() is None:
    raise errors.UserError(f'--push={name}: no token of the hub; {_token()}.')
  return match[1]


def upload(folder: pathlib.Path, model: str, *, public: bool = False) -> str:
  """Makes a model on the hub and sends it a folder; the address of its page.

  Args:
    folder: all of it is sent.
    model: OWNER/MODEL, new.
    public: whether everybody may see it.

  Raises:
    errors.UserError: it is there already, the token may not, no network.
  """
  api = huggingface_hub.HfApi()
  whole = (
    f' The folder {folder} is whole: `hf upload {model} {folder} --private` '
    'sends it, too.'
  )
  with _refusing(f'--push=hf:{model}', model, after=whole):
    api.create_repo(model, private=not public)
    api.upload_folder(repo_id=model, folder_path=folder)
  return _page(model)


@contextlib.contextmanager
def _refusing(what, model, revision='', after=''):
  """What the client raises becomes a refusal of `what`."""
  import httpx2  # Here, as it takes a tenth of a second.
  from huggingface_hub import errors as hub_errors

  try:
    yield
  except (
    OSError,  # The cache, and most of what the client raises.
    ValueError,
    httpx2.HTTPError,
    hub_errors.XetDownloadError,
  ) as e:
    found, remedy = _refused(model, revision, e)
    raise errors.UserError(f'{what}: {found}; {remedy}.{after}') from e


def _page(model):
  return f'{constants.ENDPOINT}/{model}'


def _token():
  return (
    f'make a token at {constants.ENDPOINT}/settings/tokens (one that may write '
    'for --push) and give it to `hf auth login`, or set HF_TOKEN'
  )


def _refused(model, revision, e):
  """What was found and what to do, of what the client raises."""
  from huggingface_hub import errors as hub_errors

  local = isinstance(e, hub_errors.LocalEntryNotFoundError)
  if not isinstance(e, hub_errors.HfHubHTTPError):
    # What kept it from the hub, where it looked into its cache after that.
    e = e.__cause__ or e
  status = getattr(getattr(e, 'response', None), 'status_code', 0)
  unknown = huggingface_hub.get_token() is None
  if isinstance(e, hub_errors.GatedRepoError):
    who = f', and {_token()}' if unknown else ' with the account of your token'
    what = f'its licence is not accepted, for all the hub knows ({status})'
    return what, f'accept it at {_page(model)}{who}'
  if isinstance(e, hub_errors.RevisionNotFoundError):
    what = f'the model has no revision {revision!r}'
    return what, f'see {_page(model)}/tree/main'
  if isinstance(e, hub_errors.OfflineModeIsEnabled):
    what = 'it is not in the cache, and HF_HUB_OFFLINE is set'
    return what, 'unset it for once to fetch it'
  if status in (401, 403, 404):
    who = 'anybody' if unknown else 'the account of your token'
    what = f'the hub has no such model that {who} may read or write ({status})'
    return what, f'check its name, or {_token()}'
  if status == 409:
    what = 'it is there already, and nothing is overwritten'
    return what, 'give another name'
  reason = ' '.join((getattr(e, 'strerror', None) or str(e)).split())[:200]
  if status or local or not isinstance(e, OSError | ValueError):
    what = f'the hub answers {status}' if status else 'the hub does not answer'
    return f'{what} ({reason})', 'try again later, or give a folder of your own'
  return reason, 'mend it, or set HF_HOME to a folder with room for the model'
