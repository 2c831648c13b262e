"""Weights & Biases, for whoever asks for it: log.to=tensorboard,wandb.

The library is optional, and imported only then. It gets the config and each
line of metrics.jsonl; output, code and the state of the repository stay here.
"""

import importlib.util
import os
import pathlib
import secrets
from typing import Any

import ml_collections

from mt.base import errors
from mt.base import files
from mt.base import processes


def check_installed() -> None:
  """Refuses to go on without the library.

  Raises:
    errors.UserError: with the command that installs it.
  """
  if not importlib.util.find_spec('wandb'):
    raise errors.UserError(
      'log.to names wandb, which is not installed: `.venv/bin/python -m pip '
      'install wandb` does it; or give --config.log.to=tensorboard.'
    )


def start(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Any:
  """A run of Weights & Biases, in the first process; None in the others.

  A resumed run goes on under its id, which stands in the run's folder.

  Raises:
    errors.UserError: no login, no network.
  """
  if not processes.is_first():
    return None
  import wandb

  path = workdir / 'wandb_id.txt'
  if not path.exists():
    files.write_lines(path, [secrets.token_hex(8)])
  try:
    return wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'mt'),
      name=workdir.absolute().name,
      id=files.read_lines(path)[0],
      resume='allow',
      dir=workdir,
      config=config.to_dict(),
      settings=wandb.Settings(
        console='off', disable_code=True, disable_git=True, silent=True
      ),
    )
  except wandb.Error as e:
    raise errors.UserError(
      f'wandb cannot start ({" ".join(str(e).split())[:200]}); `wandb login`, '
      'WANDB_MODE=offline, or --config.log.to=tensorboard would do.'
    ) from e


def add(run: Any, line: dict[str, Any]) -> None:
  """Adds one line of metrics.jsonl under its step.

  Steps that it has already, of before a resume, it passes over.
  """
  if run:
    known = {k: v for k, v in line.items() if k != 'step' and v is not None}
    run.log(known, step=line['step'])


def finish(run: Any) -> None:
  """Sends what is left, and ends."""
  if run:
    run.finish()
