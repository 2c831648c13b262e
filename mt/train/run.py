"""One run, from the config to the scores.

The order is fixed: inputs, state, checkpoint; translations before training; the
loop (mt/train/loop.py); the best state's translations, scores and report.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from mt.base import accelerator
from mt.base import compiling
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import processes
from mt.base import recorder
from mt.base import run_folder
from mt.base import signals
from mt.data import bitext
from mt.data import corpus
from mt.data import directions
from mt.data import splits
from mt.evaluate import cached
from mt.evaluate import report
from mt.evaluate import scores as scores_lib
from mt.evaluate import sentences
from mt.gemma import parameters
from mt.gemma import sharding
from mt.train import checkpoint
from mt.train import components
from mt.train import loop
from mt.train import machine
from mt.train import manifest
from mt.train import optimizer as optimizer_lib
from mt.train import plan
from mt.train import settings
from mt.train import state as state_lib
from mt.train import step
from mt.train import validation
from mt.train import warm_start
from mt.translate import translator
from mt.weights import pretrained


def run(config: ml_collections.ConfigDict, folder: str | pathlib.Path) -> None:
  """Trains, or goes on training, and leaves scores in `folder`.

  Raises:
    errors.UserError: anything that the user can mend.
  """
  started, workdir = time.monotonic(), pathlib.Path(folder)
  journal.say(accelerator.describe())
  settings.check(config)
  asked, config = config, run_folder.absolute(machine.here(config))
  machine.say_chosen(asked, config)
  machine.check_attention(config, jax.default_backend())
  machine.check_deterministic(config, jax.default_backend())
  machine.set_precision(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_rows(mesh, config.train.batch_size, config.train.micro_batches)
  if mesh is not None:
    shape = ' x '.join(f'{k} {n}' for k, n in mesh.shape.items())
    journal.say(f'mesh: {shape}; {jax.process_count()} processes')
  before = None
  with run_folder.locked(workdir):
    if processes.is_first():
      before = claim(config, workdir)
    processes.sync('claimed')
    run, state = begin(config, workdir, mesh, started)
    if run.checkpoints.latest_step() is None:
      drop_stale(run, '*')  # Of a start that came to nothing.
    translate_splits(run, 'before', state)
    run, state = resume(run, state)
    if before is not None:
      settings.say_changes(before, config, state.at, int(state.skipped))
    with (
      contextlib.closing(run.recorder),
      checkpoint.finished(run.checkpoints),
    ):
      state = train(run, state)
      state = best(run, state)
      finish(run, state)
  journal.say(f'done in {time.monotonic() - started:.0f} s: {workdir}')


def claim(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ml_collections.ConfigDict | None:
  """Makes the folder this run's; its newest checkpoint is whole after that.

  Returns the config of the last start, None where there was none.

  Raises:
    errors.UserError: a run is there that cannot go on like this.
  """
  checkpoints = workdir / 'checkpoints'
  steps = manifest.steps(checkpoints)
  manifest.check_version(checkpoints, *reversed(steps))
  if steps and config.train.max_steps < steps[-1]:
    raise errors.UserError(
      f'{workdir} is at step {steps[-1]}, beyond train.max_steps='
      f'{config.train.max_steps}; {steps[-1]} or more expected, or another '
      '--workdir.'
    )
  before = run_folder.claim(workdir, config)
  manifest.quarantine_damaged(checkpoints)
  return before


def begin(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh | None,
  started: float,
) -> tuple[components.Run, state_lib.TrainState]:
  """Reads all inputs; the run, and its state before the first step.

  Such a state translates as the pretrained model does, or as the one of
  weights.warm_start or weights.adapter.
  """
  compiling.keep_compiled_programs()

  def open_inputs():
    texts = corpus.read_splits(config.data, corpus.splits(config))
    return texts, open_weights(config, workdir, texts['train'][0])

  texts, source = processes.first_then_others(open_inputs)
  plan.check_memory(source.config, config, mesh)
  machine.say_attention(config, source.config)
  data = splits.read(config, source.tokenizer, texts, mesh)
  pairs = sum(len(text) for text in texts['train'])
  files.write_json(workdir / 'data.json', {'pairs': pairs})
  cfg = source.config
  keep = state_lib.keeping(cfg, config.train, mesh)
  keep = dataclasses.replace(keep, donated=True)
  params, fingerprint = source.read_kept(keep)
  number = sum(math.prod(shape) for shape in parameters.shapes(cfg).values())
  journal.say(
    f'model: {config.weights.source}, {number / 1e6:.1f}M parameters; '
    f'read after {time.monotonic() - started:.1f} s'
  )
  first = directions.each(config.data.pair)[0]
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  run = components.Run(
    config=config,
    workdir=workdir,
    train_step=step.make_train_step(cfg, config, optimizer, mesh),
    eval_step=step.make_eval_step(cfg, config, mesh),
    translator=translator.from_config(
      directions.only(config, first), source, mesh
    ),
    data=data,
    identity=checkpoint.identity(source, fingerprint),
    compared=processes.agree(  # All are asked, whatever their knobs.
      config.eval.translate_every > 0 or run_folder.has_chrf(workdir)
    ),
    checkpoints=checkpoint.open_manager(workdir, config.checkpoint.keep),
    recorder=None,
    curves=report.Curves(workdir / 'metrics.jsonl'),
    mesh=mesh,
    started=started,
  )
  processes.check_same(
    {
      'config': run_folder.knobs(config),
      'model or tokenizer': run.identity,
      'training text': data.train_digest,
      'validation text': run.texts_of_chrf(),
    }
  )
  state = state_lib.init_state(
    cfg, params, config, optimizer, jax.random.key(config.seed), mesh
  )
  number = sum(x.size for x in jax.tree.leaves(state.trained))
  journal.say(
    f'training: {config.train.parts}, {number / 1e6:.1f}M parameters, '
    f'{config.train.max_steps} steps'
  )
  if config.weights.warm_start or config.weights.adapter:
    run, state = warm_start.begin(run, state)
  return run, state


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


def resume(
  run: components.Run, state: state_lib.TrainState
) -> tuple[components.Run, state_lib.TrainState]:
  """The newest checkpoint's state, or the one given where there is none.

  The loader and metrics.jsonl are put back to the same step.
  """
  last = -1
  who = run.checkpoint_identity()
  restored = checkpoint.restore(run.checkpoints, state, who)
  if restored is not None:
    state, data_state = restored
    run.data.train.set_state(data_state)
    last = state.at
    journal.say(f'resumed: {run.workdir} at step {last}')
  made = recorder.Recorder(run.workdir, run.config, last)
  return dataclasses.replace(run, recorder=made), state


def train(
  run: components.Run, state: state_lib.TrainState
) -> state_lib.TrainState:
  """The loop, where there is something left to train."""
  try:
    if state.at >= run.config.train.max_steps:
      validation.evaluate_last(run, state)
      return state
    if loop.patience_over(run, state.at):
      return state
    drop_stale(run, 'after')  # It is of fewer steps.
    with signals.listening(run.config.train.preempt_command) as listener:
      return loop.train(run, state, listener)
  finally:
    run.data.train.close()


def best(
  run: components.Run, state: state_lib.TrainState
) -> state_lib.TrainState:
  """The state of the best checkpoint; the last one, given, where none is.

  It translates; what else training needs is not read.
  """
  at = checkpoint.best_step(run.checkpoints)
  if at is None:
    return state
  chrf = run.checkpoints.metrics(at)['valid_chrf']
  journal.say(
    f'best: step {at} of {state.at}, chrF {chrf:.2f} of validation; it is '
    'scored'
  )
  if at == state.at:
    return state
  manifest.check(run.workdir / 'checkpoints', at)
  ema, like = bool(state.ema), state.eval_params
  model = checkpoint.read_model(run.checkpoints, at, like, ema)
  model = {'ema': model} if ema else {'trained': model}
  return dataclasses.replace(state, step=state.step * 0 + at, **model)


def finish(run: components.Run, state: state_lib.TrainState) -> None:
  """Translations, scores and report of the state that counts."""
  translate_splits(run, 'after', state)
  if processes.is_first():
    write_scores(run, state.at)
  if run.config.eval.texts:
    params = run.eval_model(state)
    for name, d in directions.named(run.config.data.pair, 'texts').items():
      sentences.show_texts(
        run.translator_of(d), params, run.config.eval.texts, run.workdir, name
      )
  if processes.is_first():
    report.write(run.workdir, run.curves)
  processes.sync('end')


def translate_splits(
  run: components.Run, when: str, state: state_lib.TrainState
) -> None:
  """Leaves translations of the scored splits in the workdir.

  Those that are there, of this step and made like this, are not made again.
  `when` is 'before' or 'after' training.
  """
  for split, pairs in run.data.scored.items():
    sources = [p.source for p in pairs]
    references = [p.target for p in pairs]  # They may have been corrected.
    files.write_lines(run.translations(split, 'reference'), references)
    made = cached.provenance(state.at, run.config.decode, sources)
    path = run.translations(split, when)
    if processes.agree(cached.read_if_current(path, made) is not None):
      continue
    began = time.monotonic()
    found = _translate(run, when, state, split, sources)
    journal.say(
      f'translated {split} ({when}, step {state.at}): {len(sources)} '
      f'sentences, {time.monotonic() - began:.0f} s'
    )
    files.write_lines(run.translations(split, 'source'), sources)
    cached.write(path, made, found)


def _translate(run, when, state, split, sources) -> cached.Made:
  config = run.config
  direction = directions.named(config.data.pair, 'valid', 'test')[split]
  translator = run.translator_of(direction)

  def work():
    progress = journal.Progress(f'translating {split} ({when})', len(sources))
    with contextlib.closing(progress):
      params = run.eval_model(state)
      return translator.translate(params, sources, progress.update)

  if when == 'after':
    return work()
  # The pretrained model's, of which other runs have need too. The template has
  # the languages' names, which come from data.pair.
  keep = state_lib.keeping(translator.settings.cfg, config.train)
  formats = config.train.dtype, config.train.matmul_precision, dict(keep.dtypes)
  template, decode = translator.template, config.decode.to_dict()
  key = [run.identity, dataclasses.asdict(template), decode, formats, sources]
  if config.weights.adapter:  # Untrained factors add nothing.
    key.append(config.train.lora_alpha)
  return cached.cached(key, work)


def drop_stale(run: components.Run, when: str) -> None:
  """Has the scores and translations of `when`, * for all, made anew."""
  files.remove(run.workdir / 'scores.json')
  stale = [*(run.workdir / 'translations').glob(f'*.{when}.json')]
  if when == '*':  # What mt.evaluate has of the checkpoints before.
    stale += (run.workdir / 'evaluation').glob('*.json')
  for path in stale:
    files.remove(path)


def write_scores(run: components.Run, at: int) -> None:
  """Scores and samples out of the translations, on screen and on disk.

  Those after training are of step `at`.
  """
  scores: dict[str, Any] = {}
  of, text = directions.named(run.config.data.pair, 'valid', 'test'), ''
  for split, pairs in run.data.scored.items():
    source, target = directions.languages(of[split])
    sources = [p.source for p in pairs]
    references = [p.target for p in pairs]
    texts, about = {}, {}
    for when in ('before', 'after'):
      path = run.translations(split, when)
      texts[when] = files.read_lines(path)
      about[when] = files.read_json(path.with_suffix('.json'))
    scores[split] = {
      when: {'step': at if when == 'after' else 0}
      | scores_lib.score(made, references, target)
      | {
        'noise': scores_lib.by_noise(sources, made, references, source),
        'loops': scores_lib.looping(sources, made),
        'cut_off': about[when]['cut_off'],
      }
      for when, made in texts.items()
    }
    if split.startswith('valid'):
      title = f'{of[split]}\n' if split != 'valid' else ''
      text += title + sentences.samples(sources, references, **texts)
  files.write(run.workdir / 'samples.txt', text)
  scores |= _means(scores)
  files.write_json(run.workdir / 'scores.json', scores)
  journal.say('\n' + text)
  for split, both in scores.items():
    for name in scores_lib.names(both['after']):
      before, after = both['before'][name], both['after'][name]
      journal.say(
        f'{split} {name:9} {before:6.2f} -> {after:6.2f} '
        f'({after - before:+.2f})  {both["after"][name + "_signature"]}'
      )


def _means(scores):
  """Over the directions of each split that has several, under its name."""
  out = {}
  for split in ('valid', 'test'):
    parts = [scores[name] for name in scores if name.startswith(f'{split}-')]
    if parts:
      out[split] = {
        when: {'step': parts[0][when]['step']}
        | scores_lib.mean([both[when] for both in parts])
        for when in ('before', 'after')
      }
  return out
