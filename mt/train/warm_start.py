"""A run that begins with the trained weights of another one.

Its optimizer, its position in the data and its steps are new; what was frozen
there must be the same here, and be frozen too.
"""

import dataclasses
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp

from mt.base import errors
from mt.base import journal
from mt.base import run_folder
from mt.train import checkpoint
from mt.train import loop
from mt.train import manifest
from mt.train import state as state_lib

# What decides which arrays are trained, and what they mean.
_KNOBS = ('parts', 'lora_rank', 'lora_alpha', 'lora_targets')


def begin(
  run: loop.Run, state: state_lib.TrainState
) -> tuple[loop.Run, state_lib.TrainState]:
  """Puts the weights that `weights.warm_start` names into a fresh state.

  Args:
    run: of the new run; its identity gets what the weights are known by.
    state: before the first step.

  Raises:
    errors.UserError: no such run or checkpoint, a damaged one, one of another
      model, or one that trained other parts.
  """
  where = run.config.weights.warm_start
  name, which = re.fullmatch(r'(.+?)(?:@(best|last|\d+))?', where).groups()
  workdir = pathlib.Path(name)
  at, about = checkpoint.find_step(workdir, which or '')
  other = run_folder.read_config(workdir)
  for knob in _KNOBS if run.config.train.parts == 'lora' else _KNOBS[:1]:
    was, now = other.train[knob], run.config.train[knob]
    if was != now:
      raise errors.UserError(
        f'weights.warm_start: {workdir} was trained with train.{knob}={was!r}, '
        f'here it is {now!r}; give the same, or write its model down with '
        'python -m mt.export and take that as weights.source.'
      )
  manifest.check(workdir / 'checkpoints', at)
  with checkpoint.open_manager(workdir) as manager:
    checkpoint.check_identity(manager, at, run.identity)
    like = state.trained if other.optim.ema_decay else {}
    like = dataclasses.replace(state, ema=like)
    trained = checkpoint.restore_model(manager, like, at).eval_params
  ema = jax.tree.map(jnp.copy, trained) if state.ema else {}
  journal.say(f'warm start: {workdir}, {about}')
  written = manifest.folder_of(workdir / 'checkpoints', at) / manifest.NAME
  known = {'warm_start': zlib.crc32(written.read_bytes())}
  return (
    dataclasses.replace(run, identity=run.identity | known),
    dataclasses.replace(state, trained=trained, ema=ema),
  )
