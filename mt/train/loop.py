"""The loop of a run: evaluate, save, next batch, step, log; again and again.

Whatever is evaluated at step n is on disk before the checkpoint of step n, so
that a resumed run neither misses nor repeats it. Which checkpoint is the best
stands in the checkpoints, when to stop follows from metrics.jsonl: nothing else
has to agree with them after a crash.
"""

import contextlib
import math
import time
from typing import Any
from typing import NamedTuple

import jax
import ml_collections

from mt.base import compiling
from mt.base import errors
from mt.base import journal
from mt.base import processes
from mt.base import signals
from mt.gemma import sharding
from mt.train import checkpoint
from mt.train import log as log_lib
from mt.train import state as state_lib
from mt.train import validation
from mt.train.components import Run


def train(
  run: Run, state: state_lib.TrainState, listener: signals.Listener
) -> state_lib.TrainState:
  """Takes the state to step `train.max_steps`, or until eval.patience ends.

  Raises:
    errors.Interrupted: the listener has heard a signal.
    errors.UserError: too many steps were not finite; the disk is full.
  """
  first, last = state.at, run.config.train.max_steps
  with contextlib.closing(log_lib.Log(run, first)) as log:
    for at in range(first, last + 1):  # Between step `at` and the next one.
      checkpoint.check_written(run.checkpoints)  # Did the last one fail?
      asked, metrics = listener.asked(), {}
      due = what_is_due(run.config, at, first, asked)
      if due.evaluate or due.save:
        log.flush()
        if due.evaluate:
          metrics = validation.evaluate(run, state, due.translate)
        if due.save:
          save(run, state, metrics)
        log.restart_clock()  # Speed is that of training alone.
      if asked:
        checkpoint.wait(run.checkpoints)
        signals.leave(asked, at)
      if at == last or (due.translate and patience_over(run, at)):
        break
      began = time.monotonic()
      rows = next(run.data.train)
      waited = time.monotonic() - began
      # Sent while the device is still at work on the step before.
      batch = sharding.put_rows(run.mesh, rows, run.config.train.batch_size)
      if at == first:
        compiling.ahead(run.train_step, state, batch)
      log.before_step(at + 1)
      state, metrics = run.train_step(state, batch)
      log.after_step(at + 1, metrics, waited)
  checkpoint.wait(run.checkpoints)
  # A signal that came during the last evaluation; among several processes it is
  # known to all at the second question.
  if heard := max(listener.asked() for _ in range(2)):
    signals.leave(heard, state.at)
  return state


class Due(NamedTuple):
  """What is to be done between two steps."""

  evaluate: bool  # The losses of validation.
  translate: bool  # And its chrF.
  save: bool


def what_is_due(
  config: ml_collections.ConfigDict, at: int, first: int, asked: int
) -> Due:
  """What is due after `at` steps, in a run that started with `first` done.

  Before the first step validation is looked at. A resumed run begins with a
  step: its checkpoint came last. After the last step everything is due; `asked`
  is the signal that was heard, or 0.
  """
  if at == first > 0:
    return Due(evaluate=False, translate=False, save=False)

  def is_time(every):
    return at == config.train.max_steps or at % every == 0

  every = config.eval.translate_every
  translate = every > 0 and is_time(every)
  save_now = translate or is_time(config.checkpoint.every) or asked > 0
  evaluate_now = translate or is_time(config.eval.every)
  return Due(evaluate_now, translate, save=save_now and at > 0)


def save(
  run: Run, state: state_lib.TrainState, metrics: dict[str, Any]
) -> None:
  """Writes a checkpoint, if all numbers of the state are finite.

  `metrics` are of `validation.evaluate` for this very state; without them, {},
  the loss is that of the first batch of validation.

  Raises:
    errors.UserError: the loss or a number of the state is not finite: it would
      take the place of a good one; see also checkpoint.save.
  """
  loss = metrics.get('valid_loss')
  if loss is None:
    loss = validation.loss(run, state, run.data.valid[:1])
  finite = jax.device_get(state_lib.all_finite(state))
  if not (finite and math.isfinite(loss)):
    raise errors.UserError(
      f'step {state.at}: the validation loss is {loss}, and '
      f'{"" if finite else "not "}all weights are finite, so the state is not '
      f'saved; {run.newest_checkpoint()}: lower optim.learning_rate.'
    )
  checkpoint.save(
    run.checkpoints,
    state,
    run.data.train.get_state(),
    run.checkpoint_identity(),
    metrics.get('valid_chrf'),
  )


def patience_over(run: Run, at: int) -> bool:
  """Whether chrF has not risen for eval.patience translations; says so."""
  patience, last = run.config.eval.patience, run.config.train.max_steps
  if not (patience and run.config.eval.translate_every) or at >= last:
    return False
  since = journal.since_best(run.workdir / 'metrics.jsonl')
  if over := processes.agree(since >= patience):
    journal.say(
      f'stopped at step {at} of {last}: no better chrF in {since} '
      f'translations, eval.patience={patience}'
    )
  return over
