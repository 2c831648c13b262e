"""Translations that are there already are not made again."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import hashlib
import json
import pathlib
from typing import Any

import ml_collections

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import processes

# Translations, and which of them are cut off, from 0.
Made = tuple[list[str], list[int]]

# All code that makes a translation, in mt/.
_CODE = (
  *('gemma/**/*.py', 'weights/**/*.py', 'translate/**/*.py'),
  *('data/chat.py', 'data/template.py', 'data/tokenizer.py'),
)
_MT = pathlib.Path(__file__).parents[1]


def code_digest() -> str:
  """A digest of the code that makes translations: changed code, changed digest.

  A fork that changes RoPE is not to be shown the old model's translations.
  """
  paths = [p for part in _CODE for p in _MT.glob(part)]
  digest = hashlib.sha256()
  for path in sorted(paths):
    digest.update(f'{path.relative_to(_MT)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()


def cached(key: Any, make: Callable[[], Made]) -> Made:
  """What `make` returns, kept on disk under everything that decides it.

  The pretrained model's translations of a validation set are the same in every
  run that starts from it; a sweep pays for them once. The key is JSON.
  """
  digest = hashlib.sha256(json.dumps([key, code_digest()]).encode())
  path = cache.cache_dir() / 'translations' / f'{digest.hexdigest()}.json'
  made = None
  if processes.is_first() and path.exists():
    with contextlib.suppress(errors.UserError):  # Damaged: made once more.
      made = files.read_json(path)
  if processes.agree(made is not None):
    return made or ([], [])  # Only the first process has a use for them.
  made = make()
  files.write_json(path, made)
  return made


def provenance(
  step: int, decode_config: ml_collections.ConfigDict, sources: Sequence[str]
) -> dict[str, Any]:
  """What a run's translations depend on, as JSON; `step` of the checkpoint."""
  made = {'step': step, 'decode': decode_config.to_dict()}
  made |= {'sources': _digest(sources), 'code': code_digest()}
  return json.loads(json.dumps(made))  # Tuples become lists.


def _digest(texts):
  return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def write(path: pathlib.Path, made: dict[str, Any], found: Made) -> None:
  """Writes translations to a .txt and, last, all else to the .json beside it.

  It gets a digest of them: whoever dies in between leaves an older .json.
  """
  texts, cut_off = found
  files.write_lines(path, texts)
  as_read = [text.replace('\n', ' ') for text in texts]
  known = made | {'texts': _digest(as_read), 'cut_off': cut_off}
  files.write_json(path.with_suffix('.json'), known)


def read_if_current(path: pathlib.Path, made: dict[str, Any]) -> Made | None:
  """The translations that `write` wrote, if they were made like this."""
  with contextlib.suppress(errors.UserError):  # Missing or damaged.
    texts = files.read_lines(path)
    known = files.read_json(path.with_suffix('.json'))
    cut_off = known.get('cut_off') if isinstance(known, dict) else None
    if known == made | {'texts': _digest(texts), 'cut_off': cut_off}:
      return texts, cut_off
  return None
