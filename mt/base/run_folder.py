"""What a run leaves in its folder, besides checkpoints.

config.json        the resolved config
environment.json   versions, devices
data.json          pairs in the training texts
tokenizer.model    SentencePiece
metrics.jsonl      a line for each step and each validation
tensorboard/       the same for TensorBoard, see mt/base/recorder.py
wandb_id.txt       of the run at Weights & Biases, if log.to names it
scores.json        BLEU and chrF, before and after, and chrF by noise
translations/      SPLIT.{source,reference,before,after}.txt; of several
                   directions SPLIT is valid-en-fr, valid-fr-en and so on
samples.txt        eight sentences, before and after
report.html        all of this on one page, see mt/evaluate/report.py
comparison.html    other runs beside it, where mt.evaluate --report was asked
evaluation/        see mt/evaluate/__main__.py
checkpoints/       see mt/train/checkpoint.py
lock               held while a run is at work
"""

from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
from typing import Any

import jax
import ml_collections

from configs import default
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import processes

_PATHS = 'source', 'tokenizer', 'adapter', 'warm_start'  # Of `weights`.
# What a start without a checkpoint before it does not go on with.
_ANEW = 'config.json', 'tokenizer.model', 'wandb_id.txt'


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a run was started with, in the knobs of today.

  Raises:
    errors.UserError: no run there; a model's folder has a config.json, too.
  """
  saved = flat(files.read_json(workdir / 'config.json'))
  if 'weights.source' not in saved:
    raise errors.UserError(
      f'{workdir / "config.json"}: not of a run of train.py; check --workdir, '
      'or give a model itself as weights.source (of mt.export: --source).'
    )
  config = default.get_config()
  config.update_from_flattened_dict(
    {k.path: saved[k.path] for k in default.KNOBS if k.path in saved}
  )
  return config


def is_run(folder: pathlib.Path) -> bool:
  """Whether a run has left something in a folder."""
  return all((folder / n).exists() for n in ('config.json', 'environment.json'))


def locked(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Holds a folder for one run; whoever dies gives it free."""
  if not processes.is_first():
    return contextlib.nullcontext()
  return files.locked(
    workdir / 'lock',
    f'{workdir}: another run is at work in it; wait for its end, or give '
    'another --workdir.',
  )


def claim(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict | None:
  """Claims a folder for a run; errors.UserError if it has one of other knobs.

  Returns the config of the last start, None where there was none. A run's
  folder without a checkpoint is anybody's: that start came to nothing. One of a
  model has files of the same names, and is refused.
  """
  path, config = workdir / 'config.json', absolute(config)
  saved = (workdir / 'checkpoints').glob('*step_*')  # Damaged ones too.
  if all('tmp' in path.name for path in saved):
    there = [name for name in _ANEW if (workdir / name).exists()]
    if there and not (workdir / 'environment.json').exists():
      raise errors.UserError(
        f'{workdir}: its {there[0]} is not of a run, and would be lost; name '
        'another --workdir.'
      )
    for name in there:
      files.remove(workdir / name)
  before = absolute(read_config(workdir)) if path.exists() else None
  if before is not None:
    _check_same(workdir, before, config)
  files.write_json(workdir / 'environment.json', environment())
  files.write_json(path, config.to_dict())
  return before


def _check_same(workdir, before, config):
  """Refuses a config with which the run there cannot go on."""
  old = before.to_dict()
  compared = old['eval']['translate_every'] or has_chrf(workdir)
  fixed = ('same', 'same_if_scored') if compared else ('same',)
  resume = {k.path: k.resume for k in default.KNOBS}
  for path, was, now in differences(old, config.to_dict()):
    if resume[path] in fixed:
      raise errors.UserError(
        f'{workdir} holds a run with {path}={was!r}, this one has {now!r}; '
        f'use another --workdir, or --config.{path}={was}.'
      )


def has_chrf(workdir: pathlib.Path) -> bool:
  """Whether a start of a run has translated validation while it trained.

  The pretrained model's chrF, of step 0, is compared with no checkpoint's.
  """
  metrics = journal.read_metrics(workdir / 'metrics.jsonl')
  return any('valid_chrf' in m for m in metrics if m['step'] > 0)


def absolute(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config whose weights are found from any folder."""
  config = config.copy_and_resolve_references()
  for name in _PATHS:
    path = folder = config.weights[name]
    if name == 'warm_start':  # FOLDER@STEP.
      folder = re.sub(r'@(best|last|\d+)$', '', path)
    if path != 'random' and os.path.exists(folder):
      config.weights[name] = os.path.abspath(path)
  return config


def knobs(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What all processes of a run must agree in, as JSON gives it back.

  Not the paths of weights: a checkpoint knows those by what is in them.
  """
  values = json.loads(json.dumps(flat(config.to_dict())))
  paths = {f'weights.{name}' for name in _PATHS}
  return {k: v for k, v in values.items() if k not in paths}


def step_knobs(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Those of `knobs` that decide what a step computes."""
  same = {k.path for k in default.KNOBS if k.resume == 'same'}
  return {k: v for k, v in knobs(config).items() if k in same}


def flat(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """The values of a config under the names of its knobs, such as data.pair."""
  out = {}
  for key, value in config.items():
    inner = isinstance(value, dict)
    out |= flat(value, f'{prefix}{key}.') if inner else {prefix + key: value}
  return out


def differences(
  old: dict[str, Any], new: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
  """Knobs of two configs that differ: their name, the old and the new value."""
  old, new = flat(old), flat(new)
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key):
      yield key, old.get(key), new.get(key)


def environment() -> dict[str, Any]:
  """Versions and devices, for whoever compares two runs."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  return {
    'python': platform.python_version(),
    'platform': platform.platform(),
    'cpus': os.cpu_count(),
    'devices': [str(d.device_kind) for d in jax.devices()],
    'packages': {p: importlib.metadata.version(p) for p in packages},
    'command': sys.argv,
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }
