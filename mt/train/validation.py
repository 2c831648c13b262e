"""What is seen of a run while it lasts: losses, and chrF of translations.

Of two splits: valid, on which to tune, and minitrain, some training pairs,
whose loss shows what is learned by heart. The test split waits for the end.
"""

import time
from typing import Any

import chex

from mt.base import journal
from mt.base import processes
from mt.data import batches
from mt.evaluate import report as report_lib
from mt.gemma import sharding
from mt.train import results
from mt.train import run as run_lib
from mt.train import step


def on_mesh(run: run_lib.Run, batch: batches.Batch) -> batches.Batch:
  """A batch [B, L], all of which each process has, where the steps want it."""
  if run.mesh is None:
    return batch
  size = run.config.train.batch_size
  own = sharding.own_rows(run.mesh, size)
  rows = {k: v[own] for k, v in batch.items()}
  return sharding.put_rows(run.mesh, rows, size)


def validate(
  run: run_lib.Run, eval_step, state: step.TrainState, translating: bool
) -> dict[str, Any]:
  """Looks at validation, and says and records what there is.

  Args:
    run: the run.
    eval_step: see mt/train/step.py.
    state: whose model is looked at.
    translating: whether chrF is wanted, besides the losses.

  Returns:
    What metrics.jsonl gets: `valid_loss` and, where there are pairs for it,
    `minitrain_loss`, in nats per target token, the means over all of them; and
    `valid_chrf`, if wanted.
  """
  chex.assert_rank(state.step, 0)
  began, at = time.monotonic(), int(state.step)

  def sums(rows):
    found = [eval_step(state, on_mesh(run, batch)) for batch in rows]
    return [{k: float(v) for k, v in m.items()} for m in found]

  def mean(found):
    return sum(m['nll'] for m in found) / sum(m['targets'] for m in found)

  valid = sums(run.data.valid)
  line = {'step': at, 'valid_loss': mean(valid)}
  targets = sum(m['targets'] for m in valid)
  text = f'step {at}: validation loss {line["valid_loss"]:.4f} '
  text += f'({targets:.0f} targets)'
  if run.config.log.table:
    text = journal.table_line(run.metrics_path, at, valid)
  if run.data.minitrain:
    line['minitrain_loss'] = mean(sums(run.data.minitrain))
    text += f', minitrain {line["minitrain_loss"]:.4f}'
  if translating:
    chrf = results.valid_chrf(run, lambda: run_lib.folded(run, state), at)
    line['valid_chrf'] = chrf
    text += f', chrF {chrf:.2f}'
  if not run.config.log.table:
    text += f', {time.monotonic() - began:.0f} s'
  run_lib.record(run, line)
  if processes.is_first():
    report_lib.write(run.workdir)
  journal.say(text)
  return line
