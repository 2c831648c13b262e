"""Which knobs would make a run fit: with a sum in the place of a compiler."""

from configs import default
from mt.train import alternatives


def _config():
  config = default.get_config()
  config.train.parts, config.train.batch_size = 'all', 32
  return config


def test_the_mildest_of_each_series_that_is_enough():
  tried = []

  def fits(config):
    train = config.train
    tried.append(train.batch_size)
    rows = train.batch_size // train.micro_batches
    less = 8 if train.remat == 'full' else 0
    less += 20 if config.optim.name == 'adafactor' else 0
    less += 20 if config.optim.ema_decay == 0 else 0
    return rows - less <= 12

  config = _config()
  config.optim.ema_decay = 0.999
  found = alternatives.find(config, 1, True, fits)
  assert found == [
    {'train.batch_size': 8},
    {'train.micro_batches': 4},
    {'optim.ema_decay': 0.0},
    {'optim.name': 'adafactor'},
  ]
  assert len(tried) < 13  # Bisected: not one after the other.


def test_what_is_enough_only_together():
  def fits(config):
    return config.train.batch_size == 4 and config.train.remat == 'full'

  assert alternatives.find(_config(), 4, True, fits) == [
    {
      'train.batch_size': 4,
      'train.remat': 'full',
      'optim.name': 'adafactor',
      'train.parts': 'lora',
      'train.frozen_dtype': 'bfloat16',
    }
  ]
  assert alternatives.find(_config(), 4, True, lambda config: False) == []


def test_what_has_no_effect_is_not_tried():
  config, tried = _config(), []
  config.train.update(parts='lora', remat='full', batch_size=8)
  config.decode.batch_size = 4

  def fits(other):
    tried.append(other.to_dict())
    return False

  alternatives.find(config, 8, True, fits)
  assert all(x != config.to_dict() for x in tried)
  assert {x['train']['batch_size'] for x in tried} == {8}  # A row each already.
  assert {x['decode']['batch_size'] for x in tried} == {4}
  tried.clear()
  assert alternatives.find(
    config, 8, False, lambda c: fits(c) or c.decode.batch_size == 1
  ) == [{'decode.batch_size': 1}]
  assert {x['decode']['batch_size'] for x in tried} == {1, 2, 4}
