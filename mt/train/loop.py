"""The loop of a run: evaluate, save, next batch, step, log; again and again.

Whatever is evaluated at step n is on disk before the checkpoint of step n, so
that a resumed run neither misses nor repeats it. Which checkpoint is the best
stands in the checkpoints, when to stop follows from metrics.jsonl: nothing else
has to agree with them after a crash.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import math
import pathlib
import time
from typing import Any
from typing import NamedTuple
import zlib

import jax
from jax.sharding import Mesh
import ml_collections
import orbax.checkpoint as ocp

from mt.base import compiling
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import processes
from mt.base import profiling
from mt.base import recorder as recorder_lib
from mt.base import run_folder
from mt.base import signals
from mt.data import directions
from mt.data import lines
from mt.data import splits
from mt.data import template as template_lib
from mt.evaluate import report
from mt.evaluate import scores
from mt.gemma import parameters
from mt.gemma import sharding
from mt.train import checkpoint
from mt.train import state as state_lib
from mt.train import step
from mt.train import usage
from mt.translate import translator as translator_lib

_SHOWN = 20  # Ids of pairs in a message.


@dataclasses.dataclass(frozen=True)
class Run:
  """What does not change while a run lasts; each part is made once.

  Attributes:
    identity: of the pretrained model, see checkpoint.identity.
    compared: whether this start or one before it compares steps by chrF.
    recorder: of metrics, once it is known after which step it goes on.
    curves: of metrics, for the report.
    mesh: of several devices, or None.
    started: time.monotonic() at the start.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  train_step: Callable[[state_lib.TrainState, step.Batch], Any]
  eval_step: Callable[[state_lib.TrainState, step.Batch], step.Metrics]
  translator: translator_lib.Translator
  data: splits.Data
  identity: dict[str, Any]
  compared: bool
  checkpoints: ocp.CheckpointManager
  recorder: recorder_lib.Recorder | None
  curves: report.Curves
  mesh: Mesh | None
  started: float

  def translator_of(self, direction: str) -> translator_lib.Translator:
    """The translator of one of the directions of data.pair."""
    config = directions.only(self.config, direction)
    template = template_lib.from_config(config)
    return dataclasses.replace(self.translator, template=template)

  def translations(self, split: str, name: str) -> pathlib.Path:
    """The file of a split's sources, references or translations."""
    return self.workdir / 'translations' / f'{split}.{name}.txt'

  def checkpoint_identity(self) -> dict[str, Any]:
    """What a checkpoint of this run must agree with."""
    compared = self.texts_of_chrf() if self.compared else {}
    return self.identity | {
      'texts': self.data.train_texts | compared,
      'data': self.data.train_digest,
      'config': run_folder.step_knobs(self.config),
    }

  def of_chrf(self, split: str) -> list[lines.Pair]:
    """The pairs of validation whose chrF checkpoints are compared by."""
    return self.data.scored[split][: self.config.eval.chrf_pairs or None]

  def texts_of_chrf(self) -> dict[str, int]:
    """CRC-32 of these pairs, under what a message calls them."""
    return {
      f'the text of {name}': zlib.crc32(
        json.dumps([[p.source, p.target] for p in self.of_chrf(name)]).encode()
      )
      for name in directions.named(self.config.data.pair, 'valid')
    }


def train(
  run: Run, state: state_lib.TrainState, listener: signals.Listener
) -> state_lib.TrainState:
  """Takes the state to step `train.max_steps`, or until eval.patience ends.

  Raises:
    errors.Interrupted: the listener has heard a signal.
    errors.UserError: too many steps were not finite; the disk is full.
  """
  first, last = state.at, run.config.train.max_steps
  with contextlib.closing(Log(run, first)) as log:
    for at in range(first, last + 1):
      checkpoint.check_written(run.checkpoints)  # In the background.
      asked, metrics = listener.asked(), {}
      due = schedule(run.config, at, first, asked)
      if due.evaluate or due.save:
        log.flush()
        if due.evaluate:
          metrics = evaluate(run, state, due.translate)
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
      # On its way while the step before is under way: that is not waited for.
      batch = sharding.put_rows(run.mesh, rows, run.config.train.batch_size)
      if at == first:
        compiling.ahead(run.train_step, state, batch)
      log.profile.before(at + 1)
      state, metrics = run.train_step(state, batch)
      log.after_next_dispatch(at + 1, metrics, waited)
  checkpoint.wait(run.checkpoints)
  # While the last step was evaluated; several processes answer a call late.
  if heard := max(listener.asked() for _ in range(2)):
    signals.leave(heard, state.at)
  return state


def evaluate_last(run: Run, state: state_lib.TrainState) -> None:
  """What is due after the last step, where it was not known to be the last.

  Such as train.max_steps lowered to where a signal has stopped a run. What is
  saved of that step stays as it is, without a chrF.
  """
  at, translate = state.at, run.config.eval.translate_every > 0
  wanted = 'valid_chrf' if translate else 'valid_loss'
  logged = journal.read_metrics(run.workdir / 'metrics.jsonl')
  if processes.agree(any(wanted in m for m in logged if m['step'] == at)):
    return
  evaluate(run, state, translate)
  if translate:
    journal.say(f'note: step {at} was saved before its chrF: it cannot be best')


class Due(NamedTuple):
  """What is to be done between two steps."""

  evaluate: bool  # The losses of validation.
  translate: bool  # And its chrF.
  save: bool


def schedule(
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


class Log:
  """What is recorded of each step of training, and the progress bar.

  Metrics of a step are fetched after the next one is dispatched, so that the
  device never waits for the host.
  """

  def __init__(self, run: Run, first: int):
    last, every = run.config.train.max_steps, run.config.log.every
    self._run, self._first = run, first
    self._progress = journal.Progress('step', last, first, every)
    self._pending = None  # (step, its metrics, seconds of waiting for data)
    self.profile = profiling.Profile(run.workdir, run.config.log.profile)
    self._peak = usage.peak_flops(run.config.train.dtype, run.mesh)
    self.restart_clock()

  def after_next_dispatch(
    self, at: int, metrics: step.Metrics, waited: float
  ) -> None:
    """Logs the step before; of this one, `at`, the metrics are kept."""
    self.profile.after(at, metrics)
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
    check_skipped(self._run, at, in_a_row)
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
    self.profile.close()


def check_skipped(run: Run, at: int, in_a_row: float) -> None:
  """Stops a run that gets nowhere, naming the pairs of the last batch."""
  most = run.config.train.max_skipped
  if in_a_row < most:
    return
  ids = run.data.train.pair_ids(at - 1)
  more = f' and {len(ids) - _SHOWN} more' if len(ids) > _SHOWN else ''
  raise errors.UserError(
    f'step {at}: loss or gradients were not finite for {in_a_row:.0f} steps in '
    f'a row (train.max_skipped={most}); {_newest(run)}; the last batch has the '
    f'training pairs {", ".join(ids[:_SHOWN])}{more}: lower '
    'optim.learning_rate, or look at them.'
  )


def _newest(run):
  checkpoint.wait(run.checkpoints)
  at = run.checkpoints.latest_step()
  return f'the newest checkpoint is of step {at}' if at else 'no checkpoint yet'


def evaluate(
  run: Run, state: state_lib.TrainState, translate: bool
) -> dict[str, Any]:
  """Looks at validation, and says and records what there is.

  Returns:
    What metrics.jsonl gets: `valid_loss` and, where there are pairs for it,
    `minitrain_loss`, of training pairs, which shows what is learned by heart;
    both in nats per target token, the means over all of them; and, where
    `translate` asks for it, `valid_chrf`.
  """
  began, at = time.monotonic(), state.at
  valid = _sums(run, state, run.data.valid)
  line = {'step': at, 'valid_loss': _mean(valid)}
  text = f'step {at}: validation loss {line["valid_loss"]:.4f}'
  if run.config.log.table:
    text = journal.table_line(run.workdir / 'metrics.jsonl', at, valid)
  if run.data.minitrain:
    line['minitrain_loss'] = _mean(_sums(run, state, run.data.minitrain))
    text += f', minitrain {line["minitrain_loss"]:.4f}'
  if translate:
    line['valid_chrf'] = valid_chrf(run, state)
    text += f', chrF {line["valid_chrf"]:.2f}'
  if not run.config.log.table:
    text += f', {time.monotonic() - began:.0f} s'
  run.recorder.add(line)
  if processes.is_first():
    report.write(run.workdir, run.curves)
  journal.say(text)
  return line


def _sums(run, state, rows):
  """nll and targets of each batch; all are dispatched before one is fetched."""
  found = [run.eval_step(state, _on_mesh(run, batch)) for batch in rows]
  return [{k: float(v) for k, v in m.items()} for m in jax.device_get(found)]


def _mean(sums):
  return sum(m['nll'] for m in sums) / sum(m['targets'] for m in sums)


def _on_mesh(run, batch):
  """A batch [B, L], all of which each process has, where the steps want it."""
  if run.mesh is None:
    return jax.device_put(batch)
  return sharding.put(batch, dict.fromkeys(batch, sharding.of_rows(run.mesh)))


def valid_chrf(run: Run, state: state_lib.TrainState) -> float:
  """chrF of the first eval.chrf_pairs of validation, 0 to 100.

  Of several directions it is the mean, each with as many pairs.
  It decides which checkpoint is the best, and is the same in all processes. At
  step 0 the translations from before training are scored, which must be there.
  """
  found, named = [], directions.named(run.config.data.pair, 'valid')
  for name, direction in named.items():
    pairs = run.of_chrf(name)
    if state.at:
      translator = run.translator_of(direction)
      texts = translator(eval_model(run, state), [p.source for p in pairs])
    elif processes.is_first():
      texts = files.read_lines(run.translations(name, 'before'))
    if processes.is_first():
      references = [p.target for p in pairs]
      found.append(scores.chrf(texts[: len(pairs)], references))
  return processes.broadcast_from_first(sum(found) / max(1, len(found)))


def eval_model(run: Run, state: state_lib.TrainState) -> parameters.Params:
  """The parameters that translate, low-rank factors beside their matrices."""
  return state_lib.model_params(
    run.config.train, state.eval_params, state.frozen
  )


def save(
  run: Run, state: state_lib.TrainState, metrics: dict[str, Any]
) -> None:
  """A checkpoint of a state that is worth it.

  Args:
    run: the run.
    state: to be saved.
    metrics: of `evaluate` for this very state; without them, {}, the first
      batch of validation tells whether the state is good for anything.

  Raises:
    errors.UserError: the loss or a number of the state is not finite: it would
      take the place of a good one; see also checkpoint.save.
  """
  loss = metrics.get('valid_loss')
  if loss is None:
    loss = _mean(_sums(run, state, run.data.valid[:1]))
  finite = jax.device_get(state_lib.all_finite(state))
  if not (finite and math.isfinite(loss)):
    raise errors.UserError(
      f'step {state.at}: the validation loss is {loss}, and '
      f'{"" if finite else "not "}all weights are finite, so the state is not '
      f'saved; {_newest(run)}: lower optim.learning_rate.'
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
