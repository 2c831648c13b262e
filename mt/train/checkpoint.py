"""Checkpoints: trained parameters, optimizer, data position, and what they fit.

Orbax writes each into a temporary folder, in the background, and renames it
when it is whole: until then the one before stands. The frozen parameters are
not saved: they are the pretrained ones, known by their fingerprint. Where
validation was translated, its chrF is in the checkpoint: so the folder tells
which one is the best.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any
import zlib

import chex
import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mt.base import errors
from mt.base import processes
from mt.base import run_folder
from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import machine
from mt.train import manifest
from mt.train import state as state_lib
from mt.weights import pretrained

_SLACK = 200_000  # Bytes of a checkpoint that are no array.
_WRITING = OSError, ValueError  # A full disk is either: tensorstore's is one.


def identity(source: pretrained.Source, fingerprint: int) -> dict[str, Any]:
  """What a checkpoint must agree with: the model, its weights, its tokenizer.

  Returns:
    JSON: `version`, of what checkpoints are made of, the fields of the model's
    config, `fingerprint`, the CRC-32 of all pretrained parameters, and
    `tokenizer`, that of the tokenizer.
  """
  known = {'version': manifest.VERSION, 'fingerprint': fingerprint}
  known['tokenizer'] = zlib.crc32(source.tokenizer.proto)
  return dataclasses.asdict(source.config) | known


def open_manager(
  workdir: pathlib.Path, keep: int | None = None
) -> ocp.CheckpointManager:
  """The checkpoints of a run: the newest `keep` of them, and the best."""
  kept = [
    checkpoint_managers.LatestN(keep),
    checkpoint_managers.BestN(
      get_metric_fn=_chrf, n=1, keep_checkpoints_without_metrics=False
    ),
  ]
  options = ocp.CheckpointManagerOptions(
    best_fn=_chrf,  # The latest of equals.
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
    step_prefix='step',
    todelete_subdir=manifest.DELETED,
    temporary_path_class=manifest.TemporaryPath,
  )
  return ocp.CheckpointManager(
    (workdir / 'checkpoints').absolute(),
    options=options,
    item_names=('trained', 'ema', 'rest', 'data', 'identity'),
  )


def _chrf(metrics) -> float:
  return metrics.get('valid_chrf', -1.0)  # Validation was not translated.


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Of the checkpoint with the best chrF; None where there is no chrF."""
  at = manager.best_step()
  return None if at is None or _chrf(manager.metrics(at)) < 0 else at


def save(
  manager: ocp.CheckpointManager,
  state: state_lib.TrainState,
  data_state: Any,
  who: dict[str, Any],
  chrf: float | None = None,
) -> None:
  """Begins to write one checkpoint, once the one before is written: see `wait`.

  The state may be donated as soon as this returns.

  Args:
    manager: see open_manager.
    state: to be saved under its step.
    data_state: of the loader, after the last batch that the state has seen.
    who: see `identity`.
    chrf: of validation, if it was translated.

  Raises:
    errors.UserError: the disk is full or not writable.
  """
  from mt.train import plan  # Here: who only reads has no need of it.

  wait(manager)
  arrays = _arrays(state)
  need = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _SLACK
  manifest.check_space(pathlib.Path(manager.directory), need)
  # Orbax copies from an accelerator before it returns. A CPU's arrays it reads
  # where they are, and a step would take twice the time of this to copy them.
  on_cpu = jax.default_backend() == 'cpu'
  no_room = on_cpu and plan.available() < 2 * need
  if on_cpu and not no_room:
    arrays = _copied(arrays)
  args = ocp.args.Composite(
    data=ocp.args.JsonSave({'state': data_state}),
    identity=ocp.args.JsonSave(who),
    **{k: ocp.args.StandardSave(tree) for k, tree in arrays.items()},
  )
  metrics = {} if chrf is None else {'valid_chrf': chrf}
  try:
    manager.save(state.at, args=args, metrics=metrics)
  except _WRITING as e:
    raise _cannot_save(manager, state.at, e) from e
  if no_room:
    wait(manager)


@jax.jit
def _copied(arrays):
  return jax.tree.map(jnp.copy, arrays)


def wait(manager: ocp.CheckpointManager) -> None:
  """Waits until the checkpoint under way, if there is one, has its name.

  Raises:
    errors.UserError: it cannot be written; those before it are whole.
  """
  at = manager.latest_step()
  try:
    manager.wait_until_finished()
  except _WRITING as e:
    raise _cannot_save(manager, at, e) from e
  if processes.is_first():
    manifest.remove_deleted(pathlib.Path(manager.directory))


def check_written(manager: ocp.CheckpointManager) -> None:
  """`wait` where there is nothing to wait for: raises what went wrong."""
  if not manager.is_saving_in_progress():
    wait(manager)


@contextlib.contextmanager
def finished(
  manager: ocp.CheckpointManager,
) -> Iterator[ocp.CheckpointManager]:
  """Closes a manager; what it was writing is whole then, however this ends."""
  try:
    yield manager
  finally:
    wait(manager)
    manager.close()


def _cannot_save(manager, at, e):
  # Orbax's other writers are still at it.
  return errors.ExitNow(
    f'{manager.directory}: cannot save step {at} '
    f'({" ".join(str(e).split())[:300]}); the checkpoints before it are '
    'whole: free some space and start again.'
  )


def _arrays(state):
  """What is saved of a state; {} for EMA would be no item of Orbax."""
  names = ('step', 'skipped', 'skipped_in_a_row', 'opt_state')
  ema = {'ema': state.ema} if state.ema else {}
  return ema | {
    'trained': state.trained,
    'rest': {name: getattr(state, name) for name in names},
  }


def restore(
  manager: ocp.CheckpointManager,
  state: state_lib.TrainState,
  who: dict[str, Any],
) -> tuple[state_lib.TrainState, Any] | None:
  """The newest checkpoint's state and the loader's; None where there is none.

  Args:
    manager: see open_manager.
    state: a fresh one, for structure, dtypes and frozen parameters; all else
      in it is freed, if there is a checkpoint.
    who: see `identity`.

  Raises:
    errors.UserError: the checkpoint is of another model, or damaged.
  """
  at = manager.latest_step()
  if at is None:
    return None
  check_identity(manager, at, who)
  trees = _arrays(state)
  for x in jax.tree.leaves(trees):
    x.delete()  # There may be no room for two states.
  read = _read(manager, at, trees, data=ocp.args.JsonRestore())
  found = {name: read[name] for name in trees}
  restored = dataclasses.replace(state, **found.pop('rest'), **found)
  chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
  return restored, read.data['state']


def read_model(
  manager: ocp.CheckpointManager, at: int, like: lora.Flat, ema: bool
) -> lora.Flat:
  """The trained parameters of a checkpoint, with `ema` their average.

  They lie where those of `like` do, which may be shapes. Whether the checkpoint
  is whole, manifest.check says.
  """
  name = 'ema' if ema else 'trained'
  return _read(manager, at, {name: like})[name]


# What --checkpoint of the commands is.
WHICH = 'Which of its checkpoints: best, last or a step; if none is given, '
WHICH += 'the best by chrF where validation was translated, else the last.'


def find_step(workdir: pathlib.Path, which: str = '') -> tuple[int, str]:
  """The step of one of a run's checkpoints, and what there is to say of it.

  `which` is `best`, `last`, a step, or '' for the best where there is one, else
  the last.

  Raises:
    errors.UserError: there is no run, or no such checkpoint; or the chrF of any
      is damaged, so that the best cannot be told.
  """
  run_folder.read_config(workdir)  # Says if there is no run.
  checkpoints = workdir / 'checkpoints'
  steps = manifest.steps(checkpoints)
  if not steps:
    raise errors.UserError(
      f'{checkpoints}: no checkpoint; run train.py with this --workdir first.'
    )
  try:
    return _choose(workdir, steps, which)
  except errors.UserError:
    if manifest.steps(checkpoints) == steps:
      raise
    return find_step(workdir, which)  # A run at work has deleted one.


def _choose(workdir, steps, which):
  checkpoints = workdir / 'checkpoints'
  for at in reversed(steps):
    if (manifest.folder_of(checkpoints, at) / manifest.NAME).exists():
      manifest.check(checkpoints, at, 'metrics')
  manager = open_manager(workdir)
  last, best = steps[-1], best_step(manager)
  choices = {'': last, 'last': last} | {str(at): at for at in steps}
  if best is not None:
    choices |= {'': best, 'best': best}
  if which not in choices:
    raise errors.UserError(
      f'{checkpoints}: no checkpoint {which!r} (--checkpoint); last or '
      f'one of {", ".join(map(str, steps))} expected, or best, where '
      'eval.translate_every has translated validation.'
    )
  at = choices[which]
  manifest.check(checkpoints, at, 'metrics')  # Refused without a manifest.
  about = [f'step {at}'] + ['the last'] * (at == last)
  if at == best:
    about.append(f'the best (chrF {_chrf(manager.metrics(at)):.2f})')
  return at, ', '.join(about)


def open_source(
  workdir: pathlib.Path,
) -> tuple[ml_collections.ConfigDict, pretrained.Source]:
  """The config of a run and the weights that it started from.

  Raises:
    errors.UserError: no run there, or its weights are gone.
  """
  # A run of before a knob that follows the machine has no value for it.
  config = machine.here(run_folder.read_config(workdir))
  machine.set_precision(config)
  return config, pretrained.open_source(
    config.weights.source,
    config.weights.size,
    workdir / 'tokenizer.model',
    seed=config.seed,
    texts=(),
  )


def load_trained(
  workdir: pathlib.Path,
  at: int,
  exact: bool = False,
  opened: tuple[ml_collections.ConfigDict, pretrained.Source] | None = None,
) -> tuple[ml_collections.ConfigDict, pretrained.Source, lora.Flat, lora.Flat]:
  """The checkpoint of step `at` of a run, see find_step.

  With `exact` the frozen parameters are float32, as they were pretrained, and
  not as train.frozen_dtype rounds them; nothing is moved to an accelerator.
  `opened` is what open_source gave, where it was called already.

  Returns:
    The run's config, where its weights came from, and the trained (EMA if there
    is one) and the frozen parameters, see mt/gemma/lora.py.

  Raises:
    errors.UserError: no run there, another model, or damaged.
  """
  manager = open_manager(workdir)
  manifest.check(pathlib.Path(manager.directory), at)
  config, source = opened or open_source(workdir)
  train = config.train.copy_and_resolve_references()
  train.frozen_dtype = 'float32' if exact else train.frozen_dtype

  def read():
    keep = state_lib.keeping(source.config, train)
    params, fingerprint = source.read_kept(keep)
    check_identity(manager, at, identity(source, fingerprint))
    split = functools.partial(
      state_lib.split_params, source.config, train=train, key=jax.random.key(0)
    )
    trained, frozen = jax.eval_shape(split, params)
    # Of what the checkpoint has the shapes will do: nothing is drawn for LoRA,
    # and no pretrained array stays beside its trained one.
    place = params['final_norm'].sharding
    for name, x in trained.items():
      trained[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    flat = parameters.flatten(params)
    return trained, {name: flat[name] for name in frozen}

  trained, frozen = sharding.on_host(read) if exact else read()
  trained = read_model(manager, at, trained, config.optim.ema_decay > 0)
  return config, source, trained, frozen


def load_finetuned(
  workdir: pathlib.Path, at: int
) -> tuple[ml_collections.ConfigDict, pretrained.Source, parameters.Params]:
  """`load_trained` as one tree of parameters, see lora.merge."""
  config, source, trained, frozen = load_trained(workdir, at)
  params = state_lib.model_params(config.train, trained, frozen)
  return config, source, params


def check_identity(
  manager: ocp.CheckpointManager, at: int, who: dict[str, Any]
) -> None:
  """Refuses a checkpoint that does not agree with `who`, see `identity`.

  Whether its version can be read, mt/train/manifest.py has said. A knob or a
  file that there was not yet is none that differs.

  Raises:
    errors.UserError: with the first thing that differs.
  """
  saved = _read(manager, at, {}, identity=ocp.args.JsonRestore()).identity
  saved, who = run_folder.flat(saved), run_folder.flat(who)
  # A checkpoint of before a field of models was there has its default.
  fields = dataclasses.fields(sizes.ModelConfig)
  saved = {f.name: f.default for f in fields} | saved
  for key in who:
    if key == 'version' or ('.' in key and key not in saved):
      continue
    if saved.get(key) != who[key]:
      found = f'its {key} is {saved.get(key)!r}, here it is {who[key]!r}'
      if key.startswith('texts.'):
        found = f'{key.removeprefix("texts.")} has changed since then'
      raise errors.UserError(
        f'{manager.directory}: step {at} belongs to another run: {found}; use '
        'another --workdir, or the weights and data that this run started from.'
      )


def _read(manager, at, trees, **items):
  """Items of a checkpoint; `trees` say what arrays there are in theirs."""
  for name, tree in trees.items():
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    items[name] = ocp.args.StandardRestore(abstract)
  try:
    return manager.restore(at, args=ocp.args.Composite(**items))
  except (OSError, ValueError, KeyError, TypeError) as e:
    manifest.check_there(pathlib.Path(manager.directory), at)
    raise errors.UserError(
      f'{manager.directory}: step {at} cannot be read '
      f'({" ".join(str(e).split())[:300]}), though its files are as they were '
      'written; move that folder away to go on from the one before.'
    ) from e
