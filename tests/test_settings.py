import importlib
import math
import pathlib

import pytest

from configs import default
from mt import errors
from mt import settings
from tests.refusal import refusal


def _knobs(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items'):
      yield from _knobs(value, f'{prefix}{key}.')
    else:
      yield prefix + key


CONFIGS = [
  p.stem for p in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
]


@pytest.mark.parametrize('name', CONFIGS)
def test_shipped_configs_are_valid_and_locked(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  settings.check(config)
  with pytest.raises(AttributeError):
    config.optim.no_such_knob = 1
  assert list(_knobs(config)) == list(_knobs(default.get_config()))


@pytest.mark.parametrize(
  'knob, value',
  [
    ('seed', -1),
    ('weights.source', ''),
    ('weights.size', 'gemma3_271m'),
    ('data.pair', 'en_fr'),
    ('data.pair', '../en-fr'),
    ('data.pair', 'e-f'),
    ('data.length', 7),
    ('template.prompt', 'Translate this.'),
    ('template.prompt', '{source}{source}'),
    ('train.max_steps', 0),
    ('train.batch_size', 0),
    ('train.micro_batches', 0),
    ('train.parts', ''),
    ('train.remat', 'half'),
    ('train.frozen_dtype', 'float16'),
    ('train.max_skipped', 0),
    ('train.lora_targets', ''),
    ('train.lora_rank', 0),
    ('train.lora_alpha', 0.0),
    ('train.dtype', 'float16'),
    ('optim.name', 'adam'),
    ('optim.learning_rate', 0.0),
    ('optim.learning_rate', math.nan),
    ('optim.learning_rate', math.inf),
    ('optim.schedule', 'cosin'),
    ('optim.beta2', 1.0),
    ('optim.clip_norm', -1.0),
    ('optim.ema_decay', 1.0),
    ('eval.every', 0),
    ('decode.max_extra', 0),
    ('checkpoint.keep', 0),
    ('log.every', 0),
  ],
)
def test_impossible_values_name_the_knob(knob, value):
  config = default.get_config()
  config.update_from_flattened_dict({knob: value})
  with pytest.raises(errors.UserError) as e:
    settings.check(config)
  text = str(e.value)
  assert text.startswith(f'{knob} is {value!r}')
  assert 'expected' in text and '\n' not in text


def test_values_that_contradict_each_other():
  config = default.get_config()
  config.optim.warmup_steps = config.train.max_steps + 1
  with pytest.raises(errors.UserError, match=r'warmup_steps.*max_steps'):
    settings.check(config)
  config = default.get_config()
  config.train.batch_size, config.train.micro_batches = 6, 4
  with pytest.raises(errors.UserError, match=r'batch_size.*micro_batches'):
    settings.check(config)
  config = default.get_config()
  config.optim.name, config.optim.weight_decay = 'sgd', 0.1
  with pytest.raises(errors.UserError, match=r'weight_decay.*sgd'):
    settings.check(config)


def test_float16_is_refused_with_its_reason():
  config = default.get_config()
  config.train.dtype = 'float16'
  refusal(lambda: settings.check(config), 'train.dtype', 'overflows')
