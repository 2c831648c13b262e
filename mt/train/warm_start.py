"""A run that begins with the trained weights of another one, or of an adapter.

Its optimizer, its position in the data and its steps are new; what was frozen
there must be the same here, and be frozen too.
"""

import dataclasses
import pathlib
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mt.base import errors
from mt.base import journal
from mt.base import run_folder
from mt.gemma import lora
from mt.gemma import sharding
from mt.train import checkpoint
from mt.train import components
from mt.train import manifest
from mt.train import state as state_lib
from mt.weights import peft
from mt.weights import pretrained

# What decides which arrays are trained, and what they mean.
_KNOBS = ('parts', 'lora_rank', 'lora_alpha', 'lora_targets')


def begin(
  run: components.Run, state: state_lib.TrainState
) -> tuple[components.Run, state_lib.TrainState]:
  """Puts what `weights.warm_start` or `weights.adapter` names into a new state.

  Args:
    run: of the new run; its identity gets what the weights are known by.
    state: before the first step.

  Raises:
    errors.UserError: no such run, checkpoint or adapter, a damaged one, one of
      another model, or one that trained other parts.
  """
  read = _of_adapter if run.config.weights.adapter else _of_run
  trained, known = read(run, state)
  ema = jax.tree.map(jnp.copy, trained) if state.ema else {}
  return (
    dataclasses.replace(run, identity=run.identity | known),
    dataclasses.replace(state, trained=trained, ema=ema),
  )


def _of_adapter(run, state) -> tuple[lora.Flat, dict[str, Any]]:
  """The factors of an adapter, where and as the state keeps its own."""
  where, train = run.config.weights.adapter, run.config.train
  folder = pretrained.find_adapter(where)
  adapter = peft.read(folder, run.translator.settings.cfg)
  same = (adapter.rank, adapter.alpha) == (train.lora_rank, train.lora_alpha)
  if not same or adapter.factors.keys() != state.trained.keys():
    raise errors.UserError(
      f'weights.adapter: {folder} is LoRA of other matrices, rank or alpha '
      'than this run trains; set '
      f'--config.train.parts=lora --config.train.lora_rank={adapter.rank} '
      f'--config.train.lora_alpha={adapter.alpha} '
      f"--config.train.lora_targets='{'|'.join(adapter.targets)}', or merge it "
      'into its base with python -m mt.export --source --adapter.'
    )
  journal.say(f'adapter: {folder}, made for {adapter.base}')
  if adapter.dropout:
    journal.say(
      f'note: it was trained with lora_dropout={adapter.dropout}; here it goes '
      'on without dropout'
    )
  crc, trained = 0, {}
  for name, mine in sorted(state.trained.items()):
    crc = zlib.crc32(np.ascontiguousarray(adapter.factors[name]), crc)
    trained[name] = sharding.put(adapter.factors[name], mine.sharding)
  return trained, {'adapter': crc}


def _of_run(run, state) -> tuple[lora.Flat, dict[str, Any]]:
  """What another run has trained."""
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
    ema = other.optim.ema_decay > 0
    trained = checkpoint.read_model(manager, at, state.trained, ema)
  journal.say(f'warm start: {workdir}, {about}')
  return trained, {'warm_start': manifest.crc(workdir / 'checkpoints', at)}
