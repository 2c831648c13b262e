"""Checks a config before anything is downloaded or compiled."""

import ml_collections
import numpy as np

from configs import default
from mt.base import errors
from mt.base import journal
from mt.base import recorder
from mt.base import run_folder
from mt.base import signals
from mt.data import directions
from mt.train import optimizer
from mt.weights import pretrained


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses impossible values, and says which have no effect.

  Raises:
    errors.UserError: naming the knob, its value and what is expected.
  """
  for knob in default.KNOBS:
    value = config
    for part in knob.path.split('.'):
      value = value[part]
    if not knob.rule.test(value):
      raise errors.UserError(
        f'{knob.path} is {value!r}; {knob.rule.expected} expected.'
      )
  if config.weights.warm_start and config.weights.adapter:
    raise errors.UserError(
      'weights.warm_start and weights.adapter both name weights to begin with; '
      "'' expected for one of them."
    )
  adapter = config.weights.adapter
  if adapter and ':' not in adapter:  # A path; a name may have to be fetched.
    pretrained.find_adapter(adapter)
  signals.check_command(config.train.preempt_command)
  if 'wandb' in config.log.to:
    recorder.check_wandb()
  _check_data(config.data)
  if config.template.prompt == 'translategemma' and not config.template.chat:
    raise errors.UserError(
      'template.prompt is translategemma, a turn of a chat, but template.chat '
      "is False; template.chat=True and template.target_prefix='' expected."
    )
  pairs = map(directions.languages, directions.each(config.data.pair))
  for side, codes in zip(
    ('source', 'target'), zip(*pairs, strict=True), strict=True
  ):
    name = config.template[f'{side}_language']
    if name and len({*codes}) > 1:
      raise errors.UserError(
        f'template.{side}_language is {name!r}, but data.pair has several '
        f"{side} languages; '' expected."
      )
  if config.template.chat and config.template.target_prefix:
    raise errors.UserError(
      f'template.target_prefix is {config.template.target_prefix!r}, but with '
      "template.chat the model's turn begins with the text itself; '' expected."
    )
  if config.train.batch_size % config.train.micro_batches:
    raise errors.UserError(
      f'train.batch_size is {config.train.batch_size}, which does not divide '
      f'into train.micro_batches={config.train.micro_batches}; a multiple of '
      'it expected.'
    )
  if config.train.batch_size % config.data.shards:
    raise errors.UserError(
      f'data.shards={config.data.shards} does not divide train.batch_size='
      f'{config.train.batch_size}; a divisor of it expected.'
    )
  for note in notes(config):
    journal.say(f'note: {note}')


def say_changes(
  before: ml_collections.ConfigDict,
  now: ml_collections.ConfigDict,
  at: int,
  skipped: int,
) -> None:
  """Says what a resume after `at` steps changes, and what that does.

  Of the knobs that may change, only train.max_steps moves what a step computes:
  a schedule ends with it.
  """
  changed = [
    f'{path}={new!r} (was {old!r})'
    for path, old, new in run_folder.differences(
      before.to_dict(), now.to_dict()
    )
  ]
  if not changed:
    return
  was, rate = (
    optimizer.make_schedule(c.optim, c.train.max_steps) for c in (before, now)
  )
  effect = 'the steps to come compute what they would have, but for rounding'
  # Done before each of the steps to come; a skipped one moves no schedule.
  done = np.arange(at, now.train.max_steps) - skipped
  differ = np.flatnonzero(~np.isclose(was(done), rate(done), atol=0))
  if differ.size:
    first, n = done[differ[0]], at + differ[0]
    effect = (
      f'the learning rate goes from {was(max(0, first - 1)):.6g} in step {n} '
      f'to {rate(first):.6g} in step {n + 1}, not to {was(first):.6g}, as '
      'optim.warmup_steps and optim.schedule end with train.max_steps'
    )
  journal.say(f'changed: {", ".join(changed)}; {effect}')


def notes(config: ml_collections.ConfigDict) -> list[str]:
  """What has no effect, or less than it says: a sentence for each."""
  train, optim, eval_ = config.train, config.optim, config.eval
  log = config.log
  found = []
  if optim.warmup_steps >= train.max_steps:
    found.append(
      f'optim.warmup_steps={optim.warmup_steps} is cut to '
      f'{train.max_steps - 1}, as train.max_steps={train.max_steps}'
    )
  if config.data.temperature != 1 and (
    config.data.weights or ',' not in config.data.source + config.data.pair
  ):
    found.append(
      f'data.temperature={config.data.temperature} has no effect: it shares '
      'several sources or directions, where data.weights does not'
    )
  found += _of_what_is_off(config)
  if eval_.translate_every and 0 < eval_.translate_pairs < eval_.chrf_pairs:
    found.append(
      f'eval.chrf_pairs={eval_.chrf_pairs} is cut to '
      f'eval.translate_pairs={eval_.translate_pairs}'
    )
  if log.profile and log.profile[1] > train.max_steps:
    found.append(
      f'log.profile={log.profile} ends after train.max_steps={train.max_steps}'
    )
  return found


def _of_what_is_off(config):
  """A sentence for each knob that is set, of something that is switched off."""
  train, optim, decode = config.train, config.optim, config.decode
  found = []
  values = run_folder.flat(config.to_dict())
  for useless, paths, why in (
    (
      optim.name in ('adafactor', 'sgd'),
      [f'optim.{k}' for k in ('beta1', 'beta2', 'epsilon', 'weight_decay')],
      f'optim.name={optim.name} has none',
    ),
    (
      train.parts != 'lora',
      [f'train.lora_{k}' for k in ('rank', 'alpha', 'targets')],
      f'train.parts={train.parts!r} has no low-rank factors',
    ),
    (
      not config.eval.translate_every,
      ['eval.chrf_pairs', 'eval.patience'],
      'eval.translate_every=0 translates nothing while training lasts',
    ),
    (decode.beam == 1, ['decode.length_penalty'], 'decode.beam=1 ranks none'),
    (not decode.mbr, ['decode.mbr_temperature'], 'decode.mbr=0 draws none'),
  ):
    found += [
      f'{knob.path}={values[knob.path]!r} has no effect: {why}'
      for knob in default.KNOBS
      if useless and knob.path in paths and values[knob.path] != knob.default
    ]
  return found


def _check_data(data):
  names = data.source.split(',')
  if not all(name.strip() for name in names):
    raise errors.UserError(
      f'data.source is {data.source!r}; sources with a comma between them '
      'expected, none of them empty.'
    )
  number = len(directions.each(data.pair))
  if data.weights and len(data.weights) != len(names) * number:
    of = f' of {number} directions each' if number > 1 else ''
    raise errors.UserError(
      f'data.weights has {len(data.weights)} numbers, data.source {len(names)} '
      f'sources{of}; a number for each expected, or () for their numbers of '
      'pairs.'
    )
  targets = {directions.languages(x)[1] for x in directions.each(data.pair)}
  if data.apostrophe and len(targets) > 1:
    raise errors.UserError(
      f'data.apostrophe is {data.apostrophe!r}, but data.pair has several '
      "target languages; '' expected."
    )
  every = [*names, *filter(None, (data.valid, data.test))]
  if data.tfds_quoting and (data.columns or any('{lang}' in n for n in every)):
    raise errors.UserError(
      'data.tfds_quoting reads three columns as TFDS does; data.columns=() and '
      'no {lang} in data.source, data.valid and data.test expected.'
    )
  if data.columns and all('{lang}' in name for name in every):
    raise errors.UserError(
      f'data.columns is {data.columns}, but aligned files ({{lang}}) have no '
      'columns; () expected.'
    )
