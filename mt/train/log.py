"""What is recorded of each step of training, and the progress bar."""

import time

import jax

from mt.base import errors
from mt.base import journal
from mt.base import profiling
from mt.train import step
from mt.train import usage
from mt.train.components import Run

_SHOWN = 20  # Ids of pairs in a message.


class Log:
  """Metrics of a step are fetched after the next one is dispatched.

  So the device never waits for the host.
  """

  def __init__(self, run: Run, first: int):
    last, every = run.config.train.max_steps, run.config.log.every
    self._run, self._first = run, first
    self._progress = journal.Progress('step', last, first, every)
    self._pending = None  # (step, its metrics, seconds of waiting for data)
    self._profile = profiling.Profile(run.workdir, run.config.log.profile)
    self._peak = usage.peak_flops(run.config.train.dtype, run.mesh)
    self.restart_clock()

  def before_step(self, at: int) -> None:
    """Step `at` begins: see profiling.Profile."""
    self._profile.before(at)

  def after_step(self, at: int, metrics: step.Metrics, waited: float) -> None:
    """Keeps the metrics of step `at`, and writes those of the one before."""
    self._profile.after(at, metrics)
    self.flush()
    self._pending = at, metrics, waited

  def restart_clock(self) -> None:
    self._clock = time.monotonic()

  def flush(self) -> None:
    """Waits for the metrics that are kept, and writes them."""
    if self._pending is None:
      return
    (at, metrics, waited), self._pending = self._pending, None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    seconds = time.monotonic() - self._clock
    self.restart_clock()
    nll, in_a_row = metrics.pop('nll'), metrics.pop('skipped_in_a_row')
    loss = nll / max(1.0, metrics['targets'])
    used = usage.of_step(metrics, seconds, self._peak)
    del metrics['useful_flops']
    line = {'step': at, 'loss': loss} | used | {'data_wait_s': round(waited, 4)}
    self._run.recorder.add(line | metrics)
    _check_skipped(self._run, at, in_a_row)
    if at == self._first + 1:
      since = time.monotonic() - self._run.started
      journal.say(f'first step after {since:.1f} s')
    rate = metrics['learning_rate']
    note = f'loss {loss:.3f}  rate {rate:.2e}  {used["tokens_per_s"]:.0f} tok/s'
    if 'mfu' in used:
      note += f'  MFU {used["mfu"]:.1%}'
    if 'memory_gb' in used:
      note += f'  {used["memory_gb"]:.1f} of {used["peak_memory_gb"]:.1f} GB'
    self._progress.update(at, note)

  def close(self) -> None:
    self._progress.close()
    self._profile.close()


def _check_skipped(run, at, in_a_row):
  """Stops a run that gets nowhere, naming the pairs of the last batch."""
  most = run.config.train.max_skipped
  if in_a_row < most:
    return
  ids = run.data.train.pair_ids(at - 1)
  more = f' and {len(ids) - _SHOWN} more' if len(ids) > _SHOWN else ''
  raise errors.UserError(
    f'step {at}: loss or gradients were not finite for {in_a_row:.0f} steps in '
    f'a row (train.max_skipped={most}); {run.newest_checkpoint()}; the last '
    f'batch has the training pairs {", ".join(ids[:_SHOWN])}{more}: lower '
    'optim.learning_rate, or look at them.'
  )
