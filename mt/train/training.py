"""The steps of a run.

Again and again: evaluate, save, next batch, step, log. Whatever is evaluated at
step n is on disk before the checkpoint of step n, so that a resumed run neither
misses nor repeats it.
"""

import math
import time

import chex

from mt.base import compiling
from mt.base import errors
from mt.base import journal
from mt.base import processes
from mt.base import signals
from mt.gemma import sharding
from mt.train import checkpoint
from mt.train import optimizer as optimizer_lib
from mt.train import run as run_lib
from mt.train import step
from mt.train import validation

_SHOWN = 20  # Ids of pairs in a message.


def train(
  run: run_lib.Run,
  model_config,
  eval_step,
  state: step.TrainState,
  listener: signals.Listener,
) -> step.TrainState:
  """Takes the state to step `train.max_steps`, or until eval.patience ends.

  A signal that the listener has heard ends it too, with a checkpoint.
  """
  chex.assert_rank(state.step, 0)
  config = run.config
  first, last = int(state.step), config.train.max_steps
  if ended(run, first):
    _say_if_early(run, first)
    return state
  optimizer = optimizer_lib.make_optimizer(config.optim, last)
  train_step = step.make_train_step(
    model_config,
    config,
    optimizer,
    run.mesh,
  )
  progress = journal.Progress('step', last, first, config.log.every)
  clock = time.monotonic()
  pending = None  # Metrics of the step before, fetched after the next dispatch.
  compiled = set()  # Shapes of batches.

  def log():
    nonlocal clock, pending
    at, metrics, waited = pending
    metrics = {k: float(v) for k, v in metrics.items()}
    now = time.monotonic()
    speed, clock = metrics['targets'] / (now - clock), now
    loss = metrics['nll'] / max(1.0, metrics['targets'])
    line = {'step': at, 'loss': loss, 'targets_per_s': round(speed, 1)}
    line['data_wait_s'] = round(waited, 4)
    names = ('targets', 'tokens', 'grad_norm', 'skipped')
    line |= {k: metrics[k] for k in names}
    run_lib.record(run, line)
    _check_finite(run, at, int(metrics['skipped_in_a_row']))
    if at == first + 1:
      journal.say(f'first step after {now - run.started:.1f} s')
    progress.update(at, f'loss {loss:.3f}  {speed:.0f} target tokens/s')
    pending = None

  for done in range(first, last + 1):
    asked_to_leave = listener.asked() if done < last else 0
    every = config.eval.translate_every
    translating = every > 0 and _due(done, last, every)
    evaluating = translating or _due(done, last, config.eval.every)
    saving = translating or _due(done, last, config.checkpoint.every)
    saving = saving or asked_to_leave > 0
    if done > first and (evaluating or saving):
      log()
      if evaluating:
        found = validation.validate(run, eval_step, state, translating)
      else:
        batch = validation.on_mesh(run, run.data.valid[0])
        found = {'valid_loss': float(eval_step(state, batch)['nll'])}
      if saving:
        save(run, state, found['valid_loss'], found.get('valid_chrf'))
      if translating and ended(run, done):
        _say_if_early(run, done)
        break
      clock = time.monotonic()
    if asked_to_leave:
      progress.close()
      signals.leave(asked_to_leave, done)
    if done < last:
      asked = time.monotonic()
      rows = next(run.data.train)
      waited = time.monotonic() - asked
      batch = sharding.put_rows(run.mesh, rows, config.train.batch_size)
      if rows['tokens'].shape not in compiled:
        compiled.add(rows['tokens'].shape)
        compiling.ahead(train_step, state, batch)
      state, metrics = train_step(state, batch)
      if pending:
        log()
      pending = done + 1, metrics, waited
  progress.close()
  return state


def _due(done, last, every):
  return done == last or done % every == 0


def _say_if_early(run, done):
  if done < run.config.train.max_steps:
    journal.say(
      f'stopped at step {done} of {run.config.train.max_steps}: no better chrF '
      f'in {journal.since_best(run.metrics_path)} translations, '
      f'eval.patience={run.config.eval.patience}'
    )


def save(
  run: run_lib.Run,
  state: step.TrainState,
  loss: float,
  chrf: float | None = None,
) -> None:
  """A checkpoint of a state that is worth it.

  Args:
    run: the run.
    state: to be saved.
    loss: of this very state, on validation text.
    chrf: the same, if it was translated.

  Raises:
    errors.UserError: the loss is not finite; see also checkpoint.save.
  """
  if not math.isfinite(loss):
    raise errors.UserError(
      f'step {int(state.step)}: the validation loss is {loss}, so the state is '
      f'not saved; {_newest(run)}: lower optim.learning_rate.'
    )
  checkpoint.save(
    run.checkpoints,
    state,
    run.data.train.get_state(),
    run.checkpoint_identity,
    chrf,
  )


def _newest(run):
  at = run.checkpoints.latest_step()
  if at is None:
    return 'there is no checkpoint'
  return f'the newest checkpoint is of step {at}'


def _check_finite(run, at, in_a_row):
  """Stops a run that gets nowhere; its newest checkpoint is a good state."""
  if in_a_row >= run.config.train.max_skipped:
    ids = run.data.train.pair_ids(at - 1)
    more = f' and {len(ids) - _SHOWN} more' if len(ids) > _SHOWN else ''
    raise errors.UserError(
      f'step {at}: loss or gradients were not finite for {in_a_row} steps in a '
      f'row, train.max_skipped={run.config.train.max_skipped} of which end a '
      f'run; {_newest(run)}; the last batch has the training pairs '
      f'{", ".join(ids[:_SHOWN])}{more}: lower optim.learning_rate, or look at '
      'them.'
    )


def ended(run: run_lib.Run, done: int) -> bool:
  """Whether nothing is left to train after so many steps."""
  if done >= run.config.train.max_steps:
    return True
  patience = run.config.eval.patience
  if not patience:
    return False
  return processes.agree(journal.since_best(run.metrics_path) >= patience)
