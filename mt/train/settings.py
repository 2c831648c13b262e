"""Checks a config before anything is downloaded or compiled."""

from collections.abc import Callable
import math
import re
from typing import Any

import ml_collections

from mt.base import errors
from mt.gemma import model
from mt.gemma import sizes
from mt.train import optimizer


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
  return lambda v: v in names, 'one of ' + ', '.join(names)


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda v: low <= v < math.inf, f'{low} or more'


def _fraction() -> tuple[Callable[[Any], bool], str]:
  return lambda v: 0 <= v < 1, 'from 0 to below 1'


def _each(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda values: all(map(test, values))


def _is_column(v: Any) -> bool:
  return (isinstance(v, int) and v >= 1) or (isinstance(v, str) and bool(v))


_POSITIVE = (lambda v: 0 < v < math.inf, 'more than 0')
_TEXT = (bool, 'some text')
_MESH = (lambda v: v == -1 or v >= 1, '1 or more, or -1 for what is left')
_FORMAT = (
  lambda v: v in ('float32', 'bfloat16'),
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
  'data.weights': (
    _each(lambda v: isinstance(v, int | float) and 0 < v < math.inf),
    'numbers above 0',
  ),
  'data.columns': (
    lambda v: (
      len(v) in (0, 2) and all(map(_is_column, v)) and len({*map(type, v)}) < 2
    ),
    'two numbers from 1 up, two names, or ()',
  ),
  'data.max_bad_fraction': (lambda v: 0 <= v <= 1, 'from 0 to 1'),
  'data.length': _at_least(8),
  'data.buckets': (
    _each(lambda v: isinstance(v, int) and v >= 8),
    'numbers from 8 up',
  ),
  'data.workers': (lambda v: 0 <= v <= 256, 'from 0 to 256'),
  'data.max_wait': (lambda v: 0 < v <= 1e9, 'more than 0, to 1e9'),
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
  'train.loss_chunk': _at_least(1),
  'train.loss_tile': _at_least(1),
  'train.label_smoothing': _fraction(),
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
  'eval.loss_batches': _at_least(0),
  'eval.minitrain_pairs': _at_least(0),
  'eval.translate_every': _at_least(0),
  'eval.chrf_pairs': _at_least(0),
  'eval.patience': _at_least(0),
  'eval.translate_pairs': _at_least(0),
  'eval.texts': (
    lambda v: all(isinstance(t, str) and t.strip() for t in v),
    'texts with something in each',
  ),
  'decode.batch_size': _at_least(1),
  'decode.beam': _at_least(1),
  'decode.length_penalty': _at_least(0),
  # The cache is as long: beyond this it would not fit anywhere.
  'decode.max_ratio': (lambda v: 0 < v <= 100, 'more than 0, to 100'),
  'decode.max_extra': (lambda v: 1 <= v <= 1 << 16, 'from 1 to 65,536'),
  'checkpoint.every': _at_least(1),
  'checkpoint.keep': _at_least(1),
  'log.every': _at_least(1),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses impossible values.

  Raises:
    errors.UserError: naming the knob, its value and what is expected.
  """
  _check_storable(config)
  for knob, (test, expected) in _RULES.items():
    value = config
    for part in knob.split('.'):
      value = value[part]
    if not test(value):
      raise errors.UserError(f'{knob} is {value!r}; {expected} expected.')
  _check_data(config.data)
  if config.template.chat and config.template.target_prefix:
    raise errors.UserError(
      f'template.target_prefix is {config.template.target_prefix!r}, but with '
      "template.chat the model's turn begins with the text itself; '' expected."
    )
  eval_ = config.eval
  for knob in ('chrf_pairs', 'patience'):
    if eval_[knob] and not eval_.translate_every:
      raise errors.UserError(
        f'eval.{knob} is {eval_[knob]}, but eval.translate_every=0 translates '
        'nothing while training lasts; 0, or eval.translate_every above 0 '
        'expected.'
      )
  if eval_.translate_pairs and eval_.chrf_pairs > eval_.translate_pairs:
    raise errors.UserError(
      f'eval.chrf_pairs is {eval_.chrf_pairs}, more than the '
      f'eval.translate_pairs={eval_.translate_pairs} that are scored at the '
      'end; as many or fewer expected.'
    )
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


def _check_storable(config, prefix=''):
  """Texts that are text, without NUL; numbers of 32 bits, as JAX has them.

  A command line may have bytes that are no text.
  """
  for key, value in config.items():
    knob = f'{prefix}{key}'
    if isinstance(value, ml_collections.ConfigDict):
      _check_storable(value, f'{knob}.')
      continue
    each = value if isinstance(value, tuple) else (value,)
    try:
      for text in (v for v in each if isinstance(v, str)):
        text.encode()
    except UnicodeEncodeError:
      raise errors.UserError(
        f'{knob} is {value!a}; text in UTF-8 expected.'
      ) from None
    if any(isinstance(v, str) and '\0' in v for v in each):
      raise errors.UserError(f'{knob} is {value!a}; text without NUL expected.')
    if any(isinstance(v, int) and abs(v) >= 2**31 for v in each):
      raise errors.UserError(
        f'{knob} is {value!r}; whole numbers below 2^31 expected.'
      )


def _check_data(data):
  names = data.source.split(',')
  if not all(name.strip() for name in names):
    raise errors.UserError(
      f'data.source is {data.source!r}; sources with a comma between them '
      'expected, none of them empty.'
    )
  if data.weights and len(data.weights) != len(names):
    raise errors.UserError(
      f'data.weights has {len(data.weights)} numbers, data.source {len(names)} '
      'sources; a number for each expected, or () for their numbers of pairs.'
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
  if data.buckets and data.packing:
    raise errors.UserError(
      f'data.buckets is {data.buckets}, but packed rows have one width; () or '
      'data.packing=False expected.'
    )
  if data.buckets and len(names) > 1:
    raise errors.UserError(
      f'data.buckets is {data.buckets}, but rows of {len(names)} mixed sources '
      'would differ in width within a batch; () expected.'
    )
