"""One run, from the config to the scores.

The order is fixed: first validation; then, again and again, evaluate, save,
next batch, step, log. Whatever is evaluated at step n is on disk before the
checkpoint of step n, so that a resumed run neither misses nor repeats it.
"""

import math
import pathlib
import time
from typing import Any

import chex
import jax
import ml_collections

from mt import batches
from mt import bitext
from mt import checkpoint
from mt import compiling
from mt import corpus
from mt import data as data_lib
from mt import distributed
from mt import errors
from mt import evaluate
from mt import events
from mt import journal
from mt import model
from mt import optimizer as optimizer_lib
from mt import report as report_lib
from mt import results
from mt import run as run_lib
from mt import scores as scores_lib
from mt import settings
from mt import sharding
from mt import sizes
from mt import step
from mt import trainable
from mt import translate
from mt import weights
from mt import workdir as workdir_lib


def run(config: ml_collections.ConfigDict, folder: str | pathlib.Path) -> None:
  """Trains, or goes on training, and leaves scores in `folder`.

  Args:
    config: see configs/default.py.
    folder: the run's own, see mt/workdir.py.

  Raises:
    errors.UserError: anything that the user can mend.
  """
  started = time.monotonic()
  settings.check(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_rows(mesh, config.train)
  workdir = pathlib.Path(folder)
  if distributed.is_first():
    workdir_lib.open_run(workdir, config)
  compiling.keep_compiled_programs()

  texts, source = distributed.first_first(lambda: open_inputs(config, workdir))
  data = data_lib.read(config, source.tokenizer, texts, mesh)
  params = sharding.on_host(source.read)
  journal.say(
    f'model: {config.weights.source}, {_millions(params)} parameters; '
    f'read after {time.monotonic() - started:.1f} s'
  )
  if mesh is not None:
    shape = ' x '.join(f'{k} {n}' for k, n in mesh.shape.items())
    journal.say(f'mesh: {shape}; {jax.process_count()} processes')
  run = run_lib.Run(
    config=config,
    workdir=workdir,
    data=data,
    identity=checkpoint.identity(source, params),
    checkpoints=checkpoint.open_manager(workdir, config.checkpoint.keep),
    translator=translate.from_config(config, source, mesh),
    events=events.open_writer(workdir),
    mesh=mesh,
    started=started,
  )
  state, resumed = start_or_resume(run, source.config, params)
  events.replay(run.events, run.metrics_path)
  del params
  eval_step = step.make_eval_step(source.config, config, mesh)
  if not resumed:
    validate(run, eval_step, state)
    results.translate_splits(run, 'before', folded(run, state), int(state.step))
  try:
    state = train(run, source.config, eval_step, state)
  finally:
    run.data.train.close()
  run.checkpoints.close()
  if not distributed.agree(run.scores_path.exists()):
    results.translate_splits(run, 'after', folded(run, state), int(state.step))
  if distributed.is_first():
    results.report(run)
  if config.eval.texts:
    evaluate.show_texts(
      run.translator, folded(run, state), config.eval.texts, workdir
    )
  if distributed.is_first():
    run.events.close()
    report_lib.write(workdir)
  distributed.sync('end')
  journal.say(f'done in {time.monotonic() - started:.0f} s: {workdir}')


def _millions(tree) -> str:
  return f'{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.1f}M'


def open_inputs(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, list[bitext.Bitext]], weights.Source]:
  """The texts of each split, and the pretrained model."""
  texts = corpus.read_splits(config.data, corpus.splits(config))
  return texts, open_weights(config, workdir, texts['train'][0])


def open_weights(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  text: bitext.Bitext,
) -> weights.Source:
  """The pretrained model; its tokenizer stays in the workdir ever after."""
  kept = workdir / 'tokenizer.model'
  random = config.weights.source == 'random'
  source = weights.open_source(
    config.weights.source,
    config.weights.size,
    kept if kept.exists() else config.weights.tokenizer,
    seed=config.seed,
    texts=corpus.some_texts(text) if random else (),
    force_download=config.weights.force_download,
  )
  if not kept.exists():
    workdir_lib.write(kept, source.tokenizer.proto)
  return source


def start_or_resume(
  run: run_lib.Run, model_config: sizes.ModelConfig, params: model.Params
) -> tuple[step.TrainState, bool]:
  """The newest checkpoint's state (and True), or one that starts from `params`.

  The loader and metrics.jsonl are put back to the same step.
  """
  config = run.config
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  state = step.init_state(
    model_config,
    params,
    config,
    optimizer,
    jax.random.key(config.seed),
    run.mesh,
  )
  state = state if run.mesh else sharding.to_device(state)
  journal.say(
    f'training: {config.train.parts}, {_millions(state.trained)} parameters, '
    f'{config.train.max_steps} steps'
  )
  restored = checkpoint.restore(run.checkpoints, state, run.checkpoint_identity)
  if restored is None:
    journal.cut_metrics(run.metrics_path, -1)
  else:
    state, data_state = restored
    run.data.train.set_state(data_state)
    journal.cut_metrics(run.metrics_path, int(state.step))
    journal.say(f'resumed: {run.workdir} at step {int(state.step)}')
  if int(state.step) < config.train.max_steps and distributed.is_first():
    run.scores_path.unlink(missing_ok=True)  # They are of fewer steps.
  return state, restored is not None


def record(run: run_lib.Run, line: dict[str, Any]) -> None:
  """Writes the metrics of a step where they are kept."""
  journal.add_metrics(run.metrics_path, line)
  events.add(run.events, line)


def on_mesh(run: run_lib.Run, batch: batches.Batch) -> batches.Batch:
  """A batch [B, L], all of which each process has, where the steps want it."""
  if run.mesh is None:
    return batch
  size = run.config.train.batch_size
  own = sharding.own_rows(run.mesh, size)
  rows = {k: v[own] for k, v in batch.items()}
  return sharding.put_rows(run.mesh, rows, size)


def validate(run: run_lib.Run, eval_step, state: step.TrainState) -> float:
  """Mean loss in nats per target token over the validation batches.

  With `eval.chrf_pairs`, chrF of the first pairs is recorded too.
  """
  chex.assert_rank(state.step, 0)
  start = time.monotonic()
  sums = [eval_step(state, on_mesh(run, batch)) for batch in run.data.valid]
  sums = [{k: float(v) for k, v in m.items()} for m in sums]
  nll, targets = (sum(m[k] for m in sums) for k in ('nll', 'targets'))
  loss, at = nll / targets, int(state.step)
  line = {'step': at, 'valid_loss': loss}
  text = f'step {at}: validation loss {loss:.4f} ({targets:.0f} targets'
  if number := run.config.eval.chrf_pairs:
    pairs = run.data.scored['valid'][:number]
    sources, references = [p.source for p in pairs], [p.target for p in pairs]
    made = run.translator(folded(run, state), sources)
    line['valid_chrf'] = scores_lib.score(made, references)['chrf']
    text += f'), chrF {line["valid_chrf"]:.2f} ({len(pairs)} pairs'
  text += f', {time.monotonic() - start:.0f} s)'
  if run.config.log.table:
    text = journal.table_line(run.metrics_path, at, sums)
  record(run, line)
  if distributed.is_first():
    report_lib.write(run.workdir)
  journal.say(text)
  return loss


def train(
  run: run_lib.Run, model_config, eval_step, state: step.TrainState
) -> step.TrainState:
  """Takes the state to step `train.max_steps`."""
  chex.assert_rank(state.step, 0)
  config = run.config
  first, last = int(state.step), config.train.max_steps
  optimizer = optimizer_lib.make_optimizer(config.optim, last)
  train_step = step.make_train_step(
    model_config,
    config,
    optimizer,
    run.mesh,
    shapes=1 + len(config.data.buckets),
  )
  progress = journal.Progress('step', last, first, config.log.every)
  clock = time.monotonic()
  pending = None  # Metrics of the step before, fetched after the next dispatch.

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
    record(run, line)
    _check_finite(run, at, int(metrics['skipped_in_a_row']))
    if at == first + 1:
      journal.say(f'first step after {now - run.started:.1f} s')
    progress.update(at, f'loss {loss:.3f}  {speed:.0f} target tokens/s')
    pending = None

  for done in range(first, last + 1):
    evaluating = done == last or done % config.eval.every == 0
    saving = done == last or done % config.checkpoint.every == 0
    if done > first and (evaluating or saving):
      log()
      if evaluating:
        loss = validate(run, eval_step, state)
      if saving:
        if not evaluating:
          batch = on_mesh(run, run.data.valid[0])
          loss = float(eval_step(state, batch)['nll'])
        save(run, state, loss)
      clock = time.monotonic()
    if done < last:
      asked = time.monotonic()
      rows = next(run.data.train)
      waited = time.monotonic() - asked
      batch = sharding.put_rows(run.mesh, rows, config.train.batch_size)
      state, metrics = train_step(state, batch)
      if pending:
        log()
      pending = done + 1, metrics, waited
  progress.close()
  return state


def folded(run: run_lib.Run, state: step.TrainState) -> model.Params:
  """The parameters that translate: low-rank products added in."""
  return trainable.fold(
    step.model_params(run.config.train, state.best, state.frozen)
  )


def save(run: run_lib.Run, state: step.TrainState, loss: float) -> None:
  """A checkpoint of a state that is worth it.

  Args:
    run: the run.
    state: to be saved.
    loss: of this very state, on validation text.

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
  )


def _newest(run):
  at = run.checkpoints.latest_step()
  if at is None:
    return 'there is no checkpoint'
  return f'the newest checkpoint is of step {at}'


def _check_finite(run, at, in_a_row):
  """Stops a run that gets nowhere; its newest checkpoint is a good state."""
  if in_a_row >= run.config.train.max_skipped:
    raise errors.UserError(
      f'step {at}: loss or gradients were not finite for {in_a_row} steps in a '
      f'row, train.max_skipped={run.config.train.max_skipped} of which end a '
      f'run; {_newest(run)}: lower optim.learning_rate.'
    )
