"""Models from the Hugging Face hub, through its own client and cache.

Names are OWNER/MODEL, OWNER/MODEL@REVISION (a branch, a tag or a commit), and
OWNER/MODEL/FILE.gguf. Token, cache and offline mode are the client's own: `hf
auth login` or HF_TOKEN, HF_HOME, HF_HUB_OFFLINE=1. A model that is in the cache
is taken from there when the hub does not answer.
"""

import pathlib
import re

from mt.base import errors

_NAME = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(/[\w./-]+\.gguf)?(@[\w./-]+)?')
# What mt/weights/hf.py and peft.py read, and what an export passes on.
_FILES = (
  'config.json',
  'adapter_config.json',
  'generation_config.json',
  '*.safetensors',
  '*.safetensors.index.json',
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
)


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
  # Here, as they take half a second.
  import httpx2
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  try:
    folder = huggingface_hub.snapshot_download(
      model,
      revision=revision[1:] or None,
      allow_patterns=[file[1:]] if file else list(_FILES),
      ignore_patterns=None if file else ['*/*'],
      force_download=force,
    )
  except (
    OSError,  # The cache, and most of what the client raises.
    ValueError,
    httpx2.HTTPError,
    hub_errors.XetDownloadError,
  ) as e:
    what, remedy = _refused(model, revision[1:], e)
    raise errors.UserError(f'hf:{name}: {what}; {remedy}.') from e
  path = pathlib.Path(folder + file)
  if not (path.is_file() if file else any(path.glob('*.safetensors'))):
    raise errors.UserError(
      f'hf:{name}: {file[1:] or "no .safetensors file"} is not in it; see '
      f'{_page(model)}/tree/main, and of GGUF files name one: '
      f'hf:{model}/FILE.gguf.'
    )
  return path


def check_upload(name: str) -> str:
  """OWNER/MODEL of hf:OWNER/MODEL, if there is somebody to send it.

  Raises:
    errors.UserError: another name, or no token.
  """
  from huggingface_hub import constants
  from huggingface_hub import get_token

  match = re.fullmatch(r'hf:(\w[\w.-]*/\w[\w.-]*)', name)
  if not match:
    raise errors.UserError(f'--push={name}: hf:USER/NAME expected.')
  if get_token() is None:
    raise errors.UserError(
      f'--push={name}: no token of the hub; make one that may write at '
      f'{constants.ENDPOINT}/settings/tokens and give it to `hf auth login`, '
      'or set HF_TOKEN.'
    )
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
  import httpx2
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  api = huggingface_hub.HfApi()
  try:
    api.create_repo(model, private=not public)
    api.upload_folder(repo_id=model, folder_path=folder)
  except (
    OSError,
    ValueError,
    httpx2.HTTPError,
    hub_errors.XetDownloadError,
  ) as e:
    what, remedy = _refused(model, '', e)
    status = getattr(getattr(e, 'response', None), 'status_code', 0)
    if status == 403:
      remedy = f'take a token that may write to {model.split("/")[0]}'
    if status == 409:
      what = 'it is there already, and nothing is overwritten'
      remedy = 'give another name'
    raise errors.UserError(
      f'--push=hf:{model}: {what}; {remedy}. The folder {folder} is whole: '
      f'`hf upload {model} {folder} --private` sends it, too.'
    ) from e
  return _page(model)


def _page(model):
  from huggingface_hub import constants

  return f'{constants.ENDPOINT}/{model}'


def _refused(model, revision, e):
  """What was found and what to do, of what the client raises."""
  from huggingface_hub import constants
  from huggingface_hub import errors as hub_errors
  from huggingface_hub import get_token

  local = isinstance(e, hub_errors.LocalEntryNotFoundError)
  if not isinstance(e, hub_errors.HfHubHTTPError):
    # What kept it from the hub, where it looked into its cache after that.
    e = e.__cause__ or e
  status = getattr(getattr(e, 'response', None), 'status_code', 0)
  unknown = get_token() is None
  token = (
    f'make a token at {constants.ENDPOINT}/settings/tokens and give it to '
    '`hf auth login`, or set HF_TOKEN'
  )
  if isinstance(e, hub_errors.GatedRepoError):
    who = f', and {token}' if unknown else ' with the account of your token'
    what = f'its licence is not accepted, for all the hub knows ({status})'
    return what, f'accept it at {_page(model)}{who}'
  if isinstance(e, hub_errors.RepositoryNotFoundError) or (
    status == 401 and unknown
  ):
    who = 'for all' if unknown else 'for the account of your token'
    what = f'the hub has no such model {who} ({status})'
    return what, f'check its name, or {token}'
  if isinstance(e, hub_errors.RevisionNotFoundError):
    what = f'the model has no revision {revision!r}'
    return what, f'see {_page(model)}/tree/main'
  if status == 401:
    return 'the hub does not accept your token (401)', token
  if isinstance(e, hub_errors.OfflineModeIsEnabled):
    what = 'it is not in the cache, and HF_HUB_OFFLINE is set'
    return what, 'unset it for once to fetch it'
  reason = ' '.join((getattr(e, 'strerror', None) or str(e)).split())[:200]
  if status or local or not isinstance(e, OSError | ValueError):
    what = f'the hub answers {status}' if status else 'the hub does not answer'
    return f'{what} ({reason})', 'try again later, or give a folder of your own'
  return reason, 'mend it, or set HF_HOME to a folder with room for the model'
