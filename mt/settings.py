"""Checks a config before anything is downloaded or compiled."""

from collections.abc import Callable
import math
import re
from typing import Any

import ml_collections

from mt import errors
from mt import model
from mt import optimizer
from mt import precision
from mt import sizes


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
  return lambda v: v in names, 'one of ' + ', '.join(names)


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda v: low <= v < math.inf, f'{low} or more'


def _fraction() -> tuple[Callable[[Any], bool], str]:
  return lambda v: 0 <= v < 1, 'from 0 to below 1'


_POSITIVE = (lambda v: 0 < v < math.inf, 'more than 0')
_TEXT = (bool, 'some text')
_MESH = (lambda v: v == -1 or v >= 1, '1 or more, or -1 for what is left')
_FORMAT = (
  lambda v: v in precision.CHOICES,
  "float32 or bfloat16 (float16 overflows in Gemma's activations)",
)

# Knob -> (test, what is expected). What is missing here takes any value of its
# type: ml_collections checks types.
_RULES = {
  'seed': _at_least(0),
  'weights.source': _TEXT,
  'weights.size': _one_of(*sizes.SIZES),
  'data.source': _TEXT,
  'data.pair': (
    re.compile('[A-Za-z]{2,}-[A-Za-z]{2,}').fullmatch,
    'two languages such as en-fr',
  ),
  'data.length': _at_least(8),
  'template.prompt': (
    lambda v: v.count('{source}') == 1,
    'a text with {source} in it once',
  ),
  'train.max_steps': _at_least(1),
  'train.batch_size': _at_least(1),
  'train.micro_batches': _at_least(1),
  'train.parts': _TEXT,
  'train.lora_rank': _at_least(1),
  'train.lora_alpha': _POSITIVE,
  'train.lora_targets': _TEXT,
  'train.dtype': _FORMAT,
  'train.frozen_dtype': _FORMAT,
  'train.remat': _one_of(*model.REMAT),
  'train.max_skipped': _at_least(1),
  'mesh.data': _MESH,
  'mesh.fsdp': _MESH,
  'mesh.tensor': _MESH,
  'optim.name': _one_of(*optimizer.NAMES),
  'optim.learning_rate': _POSITIVE,
  'optim.warmup_steps': _at_least(0),
  'optim.schedule': _one_of(*optimizer.SCHEDULES),
  'optim.weight_decay': _at_least(0),
  'optim.beta1': _fraction(),
  'optim.beta2': _fraction(),
  'optim.epsilon': _POSITIVE,
  'optim.clip_norm': _at_least(0),
  'optim.ema_decay': _fraction(),
  'eval.every': _at_least(1),
  'eval.loss_pairs': _at_least(0),
  'eval.translate_pairs': _at_least(0),
  'decode.batch_size': _at_least(1),
  'decode.max_ratio': _POSITIVE,
  'decode.max_extra': _at_least(1),
  'checkpoint.every': _at_least(1),
  'checkpoint.keep': _at_least(1),
  'log.every': _at_least(1),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses impossible values.

  Raises:
    errors.UserError: naming the knob, its value and what is expected.
  """
  for knob, (test, expected) in _RULES.items():
    value = config
    for part in knob.split('.'):
      value = value[part]
    if not test(value):
      raise errors.UserError(f'{knob} is {value!r}; {expected} expected.')
  if config.optim.warmup_steps > config.train.max_steps:
    raise errors.UserError(
      f'optim.warmup_steps is {config.optim.warmup_steps}, more than the '
      f'train.max_steps={config.train.max_steps} in all.'
    )
  if config.train.batch_size % config.train.micro_batches:
    raise errors.UserError(
      f'train.batch_size is {config.train.batch_size}, which does not divide '
      f'into train.micro_batches={config.train.micro_batches}; a multiple of '
      'it expected.'
    )
  if config.optim.weight_decay and config.optim.name != 'adamw':
    raise errors.UserError(
      f'optim.weight_decay is {config.optim.weight_decay}, but '
      f'optim.name={config.optim.name!r} has no decay; 0 or adamw expected.'
    )
