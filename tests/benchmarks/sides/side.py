"""What the sides of `make bench` share: the job, the clock, the answer.

  python -m tests.benchmarks.sides.SIDE TASK JOB.json ANSWER.json STARTED

STARTED is the time, as of time.time(), at which the process was started. This
runs in the environments of others too: the standard library alone. JOB has

  pairs          [[prompt ids, target ids], …], to be trained on in this order
  prompts        [{tokens, limit}, …], to be continued
  stops          ids that end a continuation
  learning_rate  so small that losses do not depend on the order of the pairs
  rows, steps    of ours; the pairs are what is in these rows
  train_batch    pairs in a step of the others
  batch          sentences that are continued at once
  beam           width of beam search
  threads        as many as the CPUs that the process may use
  hf, gguf       the model, float32, for others
"""

from collections.abc import Callable
from collections.abc import Sequence
import json
import pathlib
import re
import sys
import time
from typing import Any

Job = dict[str, Any]
Answer = dict[str, Any]


def main(tasks: dict[str, Callable[[Job], Answer]]) -> None:
  """Carries out the task that the command line names."""
  task, job_path, answer_path, started = sys.argv[1:]
  job = json.loads(pathlib.Path(job_path).read_text(encoding='utf-8'))
  answer = tasks[task](job | {'started': float(started)})
  answer['peak_bytes'] = peak_bytes()
  pathlib.Path(answer_path).write_text(json.dumps(answer), encoding='utf-8')


def peak_bytes() -> int | None:
  """The most memory that this process has held (Linux)."""
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return None
  return int(re.search(r'VmHWM:\s*(\d+)', status.read_text())[1]) * 1024


def train(
  job: Job,
  step: Callable[[Any], float],
  batches: Sequence[Any],
  shape: Callable[[Any], Any] = lambda batch: 0,
) -> Answer:
  """Takes the steps; one of each shape before, unmeasured.

  Args:
    job: see above.
    step: trains on a batch; returns its nll, summed over targets, when all is
      done.
    batches: all of them.
    shape: of a batch; what is compiled once for each.
  """
  first, seen = None, set()
  for batch in batches:
    if shape(batch) not in seen:
      seen.add(shape(batch))
      step(batch)
      first = first or time.time() - job['started']
  start = time.perf_counter()
  nll = sum(step(batch) for batch in batches)
  return trained(job, time.perf_counter() - start, nll, first)


def trained(job: Job, seconds: float, nll: float, first: float) -> Answer:
  """The answer of a training task.

  Args:
    job: see above.
    seconds: for all pairs.
    nll: summed over all targets.
    first: seconds from the start of the process to the end of its first step.
  """
  targets = sum(len(target) for _, target in job['pairs'])
  return {
    'units': targets,
    'seconds': seconds,
    'loss': nll / targets,
    'first_step': first,
  }


def decoded(job: Job, seconds: float, made: Sequence[list[int]]) -> Answer:
  """The answer of a decoding task: what was made of each prompt, cut.

  Args:
    job: see above.
    seconds: for all prompts.
    made: ids of each, which may go on beyond limit or end.
  """
  cut = [
    until_end(ids, prompt['limit'], job['stops'])
    for ids, prompt in zip(made, job['prompts'], strict=True)
  ]
  units = sum(len(ids) for ids in cut)
  return {'units': units, 'seconds': seconds, 'made': cut}


def until_end(ids: Sequence[int], limit: int, stops: Sequence[int]):
  """The ids up to the limit, or to the first that ends, which is included."""
  ids = list(ids[:limit])
  ends = (i for i, token in enumerate(ids) if token in stops)
  return ids[: next(ends, limit) + 1]


def groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  """`size` items each, and what is left."""
  return [items[i : i + size] for i in range(0, len(items), size)]
