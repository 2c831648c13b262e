"""The batches of the validation loss, and the tutorial's way to show it."""

from collections.abc import Sequence
import json
import pathlib

import chex
import ml_collections
import numpy as np

from mt import batches


def make_batches(
  config: ml_collections.ConfigDict, examples: batches.Examples
) -> list[batches.Batch]:
  """The first eval.loss_batches batches [B, L], packed as training rows are."""
  length, size = config.data.length, config.train.batch_size
  rows = [[i] for i in range(len(examples))]
  if config.data.packing:
    rows = batches.best_fit(np.diff(examples.offsets), length)
  rows += [[]] * (-len(rows) % size)
  out = []
  for at in range(0, len(rows), size)[: config.eval.loss_batches or None]:
    built = [
      batches.build_row(examples, r, length) for r in rows[at : at + size]
    ]
    out.append({k: np.stack([b[k] for b in built]) for k in built[0]})
  return out


def table_line(
  path: pathlib.Path, step: int, sums: Sequence[dict[str, float]]
) -> str:
  """A validation as the tutorial prints it.

  Args:
    path: metrics.jsonl, before this validation stands in it.
    step: steps done.
    sums: nll and targets of each batch.

  Returns:
    `STEP 20 training loss: 3.3015 - eval loss: 2.6868`: the mean of the
    training losses since the validation before, and the mean over batches of
    the mean in a batch. Before the first step: `Start, validation loss:
    10.6472`. Digits are those of a float32.
  """
  chex.assert_scalar_positive(len(sums))
  valid = _float32(np.mean([m['nll'] / m['targets'] for m in sums]))
  if not step:
    return f'Start, validation loss: {valid}'
  losses = []
  for line in map(json.loads, path.read_text('utf-8').splitlines()):
    losses = [] if 'valid_loss' in line else losses + [line['loss']]
  train = _float32(np.mean(losses))
  return f'STEP {step} training loss: {train} - eval loss: {valid}'


def _float32(x: float) -> float:
  return float(np.float32(x))
