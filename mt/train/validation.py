"""Validation while training lasts: losses, chrF, a point in the curves."""

import time
from typing import Any

import jax

from mt.base import files
from mt.base import journal
from mt.base import processes
from mt.data import batches
from mt.data import directions
from mt.evaluate import report
from mt.evaluate import scores
from mt.gemma import sharding
from mt.train import state as state_lib
from mt.train.components import Run


def evaluate(
  run: Run, state: state_lib.TrainState, translate: bool
) -> dict[str, Any]:
  """Losses and, if `translate`, chrF: said, recorded, and in the report.

  Returns:
    What metrics.jsonl gets: `valid_loss`; `minitrain_loss`, of training pairs,
    if there are any for it, which shows what is learned by heart; both are
    means over target tokens, in nats; and `valid_chrf`, if it was asked for.
  """
  began, at = time.monotonic(), state.at
  valid = _sums(run, state, run.data.valid)
  line = {'step': at, 'valid_loss': _mean(valid)}
  text = f'step {at}: validation loss {line["valid_loss"]:.4f}'
  if run.config.log.table:
    text = journal.table_line(run.workdir / 'metrics.jsonl', at, valid)
  if run.data.minitrain:
    line['minitrain_loss'] = loss(run, state, run.data.minitrain)
    text += f', minitrain {line["minitrain_loss"]:.4f}'
  if translate:
    line['valid_chrf'] = chrf(run, state)
    text += f', chrF {line["valid_chrf"]:.2f}'
  if not run.config.log.table:
    text += f', {time.monotonic() - began:.0f} s'
  run.recorder.add(line)
  if processes.is_first():
    report.write(run.workdir, run.curves)
  journal.say(text)
  return line


def evaluate_last(run: Run, state: state_lib.TrainState) -> None:
  """Evaluates the last step, if it was not known to be the last when it came.

  For example after a signal stopped a run and train.max_steps was lowered to
  that step. The checkpoint of the step stays as it is, without a chrF.
  """
  at, translate = state.at, run.config.eval.translate_every > 0
  wanted = 'valid_chrf' if translate else 'valid_loss'
  logged = journal.read_metrics(run.workdir / 'metrics.jsonl')
  if processes.agree(any(wanted in m for m in logged if m['step'] == at)):
    return
  evaluate(run, state, translate)
  if translate:
    journal.say(f'note: step {at} was saved before its chrF: it cannot be best')


def loss(
  run: Run, state: state_lib.TrainState, rows: list[batches.Batch]
) -> float:
  """The mean nll of the targets in these batches, in nats."""
  return _mean(_sums(run, state, rows))


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


def chrf(run: Run, state: state_lib.TrainState) -> float:
  """chrF of the first eval.chrf_pairs of validation, 0 to 100.

  With several directions it is their mean, each with as many pairs. It decides
  which checkpoint is the best, and is the same in all processes. At step 0 the
  translations from before training are scored, which must be there.
  """
  found, named = [], directions.named(run.config.data.pair, 'valid')
  for name, direction in named.items():
    pairs = run.of_chrf(name)
    if state.at:
      translator = run.translator_of(direction)
      texts = translator(run.eval_model(state), [p.source for p in pairs])
    elif processes.is_first():
      texts = files.read_lines(run.translations(name, 'before'))
    if processes.is_first():
      references = [p.target for p in pairs]
      found.append(scores.chrf(texts[: len(pairs)], references))
  return processes.broadcast_from_first(sum(found) / max(1, len(found)))
