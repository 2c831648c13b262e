"""One run, from the config to the scores.

The order is fixed: inputs, state, checkpoint; translations and validation; the
steps (mt/train/training.py); the best state's translations, scores and report.
Which checkpoint is the best stands in the checkpoints, when to stop follows
from metrics.jsonl: nothing else has to agree with them after a crash.
"""

import pathlib
import time

import chex
import jax
import ml_collections

from mt.base import compiling
from mt.base import events
from mt.base import files
from mt.base import journal
from mt.base import processes
from mt.base import run_folder
from mt.base import signals
from mt.data import bitext
from mt.data import corpus
from mt.data import splits
from mt.evaluate import report as report_lib
from mt.evaluate import samples
from mt.gemma import model
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import checkpoint
from mt.train import manifest
from mt.train import memory
from mt.train import optimizer as optimizer_lib
from mt.train import results
from mt.train import run as run_lib
from mt.train import settings
from mt.train import step
from mt.train import training
from mt.train import validation
from mt.train import warm_start
from mt.translate import translator
from mt.weights import pretrained


def run(config: ml_collections.ConfigDict, folder: str | pathlib.Path) -> None:
  """Trains, or goes on training, and leaves scores in `folder`.

  Args:
    config: see configs/default.py.
    folder: the run's own, see mt/base/run_folder.py.

  Raises:
    errors.UserError: anything that the user can mend.
  """
  started = time.monotonic()
  settings.check(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_rows(mesh, config.train.batch_size, config.train.micro_batches)
  workdir = pathlib.Path(folder)
  with run_folder.locked(workdir):
    _run(config, workdir, mesh, started)


def _run(config, workdir, mesh, started):
  if processes.is_first():
    run_folder.claim(workdir, config)
    manifest.quarantine_damaged(workdir / 'checkpoints')
  processes.sync('settled')
  compiling.keep_compiled_programs()

  texts, source = processes.first_then_others(
    lambda: open_inputs(config, workdir)
  )
  memory.check(source.config, config, mesh)
  data = splits.read(config, source.tokenizer, texts, mesh)
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
    translator=translator.from_config(config, source, mesh),
    events=events.open_writer(workdir),
    mesh=mesh,
    started=started,
  )
  state = start(run, source.config, params)
  if config.weights.warm_start:
    run, state = warm_start.begin(run, state)
  del params
  if run.checkpoints.latest_step() is None:
    results.drop_stale(run, '*')
  results.translate_splits(run, 'before', lambda: run_lib.folded(run, state), 0)
  state, resumed = resume(run, state)
  events.replay(run.events, run.metrics_path)
  eval_step = step.make_eval_step(source.config, config, mesh)
  if not resumed:
    validation.validate(run, eval_step, state, config.eval.translate_every > 0)
  try:
    with signals.listening() as listener:
      state = training.train(run, source.config, eval_step, state, listener)
  finally:
    run.data.train.close()
  state = best(run, state)
  run.checkpoints.close()
  at = int(state.step)
  results.translate_splits(run, 'after', lambda: run_lib.folded(run, state), at)
  if processes.is_first():
    results.report(run, at)
  if config.eval.texts:
    samples.show_texts(
      run.translator, run_lib.folded(run, state), config.eval.texts, workdir
    )
  if processes.is_first():
    run.events.close()
    report_lib.write(workdir)
  processes.sync('end')
  journal.say(f'done in {time.monotonic() - started:.0f} s: {workdir}')


def _millions(tree) -> str:
  return f'{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.1f}M'


def open_inputs(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, list[bitext.Bitext]], pretrained.Source]:
  """The texts of each split, and the pretrained model."""
  texts = corpus.read_splits(config.data, corpus.splits(config))
  return texts, open_weights(config, workdir, texts['train'][0])


def open_weights(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  text: bitext.Bitext,
) -> pretrained.Source:
  """The pretrained model; its tokenizer stays in the workdir ever after."""
  kept = workdir / 'tokenizer.model'
  random = config.weights.source == 'random'
  source = pretrained.open_source(
    config.weights.source,
    config.weights.size,
    kept if kept.exists() else config.weights.tokenizer,
    seed=config.seed,
    texts=corpus.some_texts(text) if random else (),
    force_download=config.weights.force_download,
  )
  if not kept.exists():
    files.write(kept, source.tokenizer.proto)
  return source


def start(
  run: run_lib.Run, model_config: sizes.ModelConfig, params: model.Params
) -> step.TrainState:
  """The state before the first step, which translates as `params` do."""
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
  return state


def resume(
  run: run_lib.Run, state: step.TrainState
) -> tuple[step.TrainState, bool]:
  """The newest checkpoint's state and True, or the one given and False.

  The loader and metrics.jsonl are put back to the same step.
  """
  chex.assert_rank(state.step, 0)
  restored = checkpoint.restore(run.checkpoints, state, run.checkpoint_identity)
  if restored is None:
    journal.cut_metrics(run.metrics_path, -1)
  else:
    state, data_state = restored
    run.data.train.set_state(data_state)
    journal.cut_metrics(run.metrics_path, int(state.step))
    journal.say(f'resumed: {run.workdir} at step {int(state.step)}')
  if not training.ended(run, int(state.step)):
    results.drop_stale(run, 'after')  # It is of fewer steps.
  return state, restored is not None


def best(run: run_lib.Run, state: step.TrainState) -> step.TrainState:
  """The state that is scored: of the best checkpoint, where there is one.

  Otherwise the last one, which is given.
  """
  chex.assert_rank(state.step, 0)
  at = checkpoint.best_step(run.checkpoints)
  if at is None:
    return state
  chrf = run.checkpoints.metrics(at)['valid_chrf']
  journal.say(
    f'best: step {at} of {int(state.step)}, chrF {chrf:.2f} of '
    'validation; it is scored'
  )
  if at == int(state.step):
    return state
  return checkpoint.restore_model(run.checkpoints, state, at)
