"""Translations that are there already are not made again."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import hashlib
import inspect
import json
import pathlib
from typing import Any

import ml_collections

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import processes
from mt.data import template
from mt.data import tokenizer
from mt.gemma import model
from mt.translate import batching
from mt.translate import decode
from mt.translate import search
from mt.translate import translator as translator_lib


def cached(key: Any, make: Callable[[], list[str]]) -> list[str]:
  """What `make` returns, kept on disk under everything that decides it.

  The pretrained model's translations of a validation set are the same in every
  run that starts from it; a sweep pays for them once.

  Args:
    key: JSON; the code of the decoder is added.
    make: () -> translations.
  """
  modules = (
    model,
    decode,
    search,
    batching,
    translator_lib,
    template,
    tokenizer,
  )
  code = [inspect.getsource(m) for m in modules]
  digest = hashlib.sha256(json.dumps([key, code]).encode()).hexdigest()
  path = cache.cache_dir() / 'translations' / f'{digest}.json'
  texts = None
  if processes.is_first() and path.exists():
    with contextlib.suppress(errors.UserError):  # Damaged: made once more.
      texts = files.read_json(path)
  if processes.agree(texts is not None):
    return texts or []  # Only the first process has a use for them.
  texts = make()
  files.write_json(path, texts)
  return texts


def provenance(
  step: int, decode_config: ml_collections.ConfigDict, sources: Sequence[str]
) -> dict[str, Any]:
  """What a run's translations depend on, as JSON: equal here, equal there.

  Args:
    step: of the checkpoint.
    decode_config: `config.decode`.
    sources: what is translated.
  """
  digest = hashlib.sha256(json.dumps(list(sources)).encode()).hexdigest()
  made = {'step': step, 'decode': decode_config.to_dict(), 'sources': digest}
  return json.loads(json.dumps(made))  # Tuples become lists.


def write(
  path: pathlib.Path, made: dict[str, Any], texts: Sequence[str]
) -> None:
  """Writes translations to a .txt and, last, `made` to the .json beside it."""
  files.write_lines(path, texts)
  files.write_json(path.with_suffix('.json'), made)


def read_if_current(
  path: pathlib.Path, made: dict[str, Any]
) -> list[str] | None:
  """The translations that `write` wrote, if they were made like this."""
  with contextlib.suppress(errors.UserError):  # Missing or damaged.
    if files.read_json(path.with_suffix('.json')) == made:
      return files.read_lines(path)
  return None
