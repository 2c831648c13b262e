import importlib
import math
import pathlib

import jax
import numpy as np
import pytest

from configs import default
from mt.base import errors
from mt.data import corpus
from mt.data import faults
from mt.gemma import fused
from mt.gemma import model
from mt.gemma import sizes
from mt.train import optimizer
from mt.train import settings
from tests.fixtures.refusal import refusal


def _knobs(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items'):
      yield from _knobs(value, f'{prefix}{key}.')
    else:
      yield prefix + key


CONFIGS = [
  p.stem
  for p in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py')
  if p.stem not in ('knobs', 'large')
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
    ('template.target_prefix', '\nFrench: '),
    ('data.pair', 'en_fr'),
    ('data.pair', '../en-fr'),
    ('data.pair', 'e-f'),
    ('data.pair', 'en-fr,'),
    ('data.pair', 'en-fr, fr-en, EN-fr'),
    ('data.temperature', 0.5),
    ('data.weights', (1.0, 0.0)),
    ('data.weights', ('much', 'little')),
    ('data.columns', (1,)),
    ('data.columns', (0, 1)),
    ('data.columns', (1, 'en')),
    ('data.columns', (2, 2)),
    ('data.columns', ([2], [3])),
    ('data.columns', ('en', '')),
    ('data.apostrophe', '"'),
    ('data.max_bad_fraction', 1.5),
    ('data.length', 7),
    ('seed', 2**31),
    ('train.label_smoothing', 1.0),
    ('template.prompt', 'Translate this.'),
    ('template.prompt', '{source}{source}'),
    ('template.prompt', '{source_langauge}: {source}'),
    ('template.prompt', '{source} {target code}'),
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
    ('train.attention', 'flash'),
    ('train.loss_tile', -2),
    ('optim.name', 'adam'),
    ('optim.learning_rate', 0.0),
    ('optim.learning_rate', math.nan),
    ('optim.learning_rate', math.inf),
    ('optim.schedule', 'cosin'),
    ('optim.beta2', 1.0),
    ('optim.clip_norm', -1.0),
    ('optim.ema_decay', 1.0),
    ('eval.every', 0),
    ('eval.loss_batches', -1),
    ('eval.texts', ('',)),
    ('eval.texts', ('a', ' ')),
    ('eval.texts', (3,)),
    ('eval.chrf_pairs', -1),
    ('eval.minitrain_pairs', -2),
    ('eval.translate_every', -1),
    ('eval.patience', -1),
    ('decode.beam', 0),
    ('decode.length_penalty', -0.5),
    ('decode.length_penalty', math.nan),
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


@pytest.mark.parametrize(
  'values, words',
  [
    (
      {'train.batch_size': 6, 'train.micro_batches': 4},
      ('train.batch_size', 'train.micro_batches'),
    ),
    (
      {'train.batch_size': 6, 'data.shards': 4},
      ('data.shards=4', 'train.batch_size=6'),
    ),
    ({'data.source': 'sample,'}, ('data.source', "'sample,'")),
    ({'data.weights': (1, 2)}, ('data.weights', '2 numbers', '1 sources')),
    (
      {'data.tfds_quoting': True, 'data.columns': (1, 2)},
      ('data.tfds_quoting', 'data.columns=()'),
    ),
    (
      {'data.tfds_quoting': True, 'data.valid': 'x.{lang}'},
      ('data.tfds_quoting', '{lang}'),
    ),
    (
      {'data.source': 'x.{split}.{lang}', 'data.columns': (1, 2)},
      ('data.columns', 'aligned'),
    ),
    (
      {'data.apostrophe': '’', 'data.pair': 'en-fr,fr-en'},
      ('data.apostrophe', 'target languages'),
    ),
    (
      {'template.prompt': 'translategemma'},
      ('template.prompt', 'template.chat'),
    ),
    ({'template.chat': True}, ('template.chat', 'template.target_prefix')),
  ],
)
def test_values_that_contradict_each_other(values, words):
  config = default.get_config()
  config.update_from_flattened_dict(values)
  refusal(lambda: settings.check(config), *words)


@pytest.mark.parametrize(
  'values, note',
  [
    ({}, None),
    ({'optim.warmup_steps': 999}, None),
    ({'optim.warmup_steps': 1000}, 'is cut to 999'),
    ({'optim.name': 'sgd', 'optim.weight_decay': 0.1}, 'sgd has none'),
    ({'optim.name': 'adafactor', 'optim.beta2': 0.9}, 'optim.beta2=0.9 has no'),
    ({'optim.name': 'sgd', 'optim.beta1': 0.9}, None),  # The default.
    ({'optim.beta1': 0.8, 'optim.epsilon': 1e-6}, None),
    ({'train.parts': 'all', 'train.lora_rank': 4}, 'no low-rank factors'),
    ({'train.parts': 'all', 'train.lora_targets': 'q'}, "targets='q' has no"),
    ({'train.parts': 'lora', 'train.lora_rank': 4}, None),
    ({'decode.length_penalty': 0.5}, 'decode.length_penalty=0.5 has no effect'),
    ({'decode.length_penalty': 0.5, 'decode.beam': 2}, None),
    ({'decode.mbr_temperature': 0.5}, 'decode.mbr=0 draws none'),
    ({'decode.mbr_temperature': 0.5, 'decode.mbr': 2}, None),
    ({'eval.chrf_pairs': 4}, 'eval.chrf_pairs=4 has no effect'),
    ({'eval.patience': 2}, 'eval.patience=2 has no effect'),
    (
      {
        'eval.translate_every': 1,
        'eval.translate_pairs': 3,
        'eval.chrf_pairs': 4,
      },
      'is cut to eval.translate_pairs=3',
    ),
  ],
)
def test_what_has_no_effect_is_a_note(values, note, capsys):
  config = default.get_config()
  config.update_from_flattened_dict(values)
  settings.check(config)
  out = capsys.readouterr().out
  assert out.count('note: ') == (note is not None)
  assert note is None or note in out


def test_a_brace_of_a_prompt_may_mean_itself():
  config = default.get_config()
  for prompt in ('{source} {', ':} {source}', '{"en": "{source}", "fr": "'):
    config.template.prompt = prompt
    settings.check(config)


def test_the_names_in_the_knobs_are_those_of_the_code():
  assert tuple(sizes.SIZES) == default.SIZES
  assert tuple(model.REMAT) == default.REMAT
  assert fused.IMPLEMENTATIONS == default.ATTENTION
  assert default.FAULTS == faults.NAMES


def test_each_optimizer_in_the_knobs_is_one_of_its_own():
  optim, made = default.get_config().optim, set()
  for optim.name in default.OPTIMIZERS:
    state = optimizer.make_optimizer(optim, 2).init(
      {'w': np.zeros(1, np.float32)}
    )
    made.add(jax.tree.structure(state))
  assert len(made) == len(default.OPTIMIZERS)


def test_each_knob_is_described_and_passes_its_own_rule():
  paths = [k.path for k in default.KNOBS]
  assert len(set(paths)) == len(paths)
  assert sorted(paths) == sorted(_knobs(default.get_config()))
  for knob in default.KNOBS:
    assert knob.rule.test(knob.default), knob.path
    assert len(knob.doc) > 10 and '\n' not in knob.doc, knob.path
    assert knob.resume in ('same', 'free', 'same_if_scored'), knob.path


def test_float16_is_refused_with_its_reason():
  config = default.get_config()
  config.train.dtype = 'float16'
  refusal(lambda: settings.check(config), 'train.dtype', 'overflows')
  for name in ('auto', 'float32', 'bfloat16'):
    config.train.dtype = name
    settings.check(config)


def test_names_that_would_break_the_line_are_shown_escaped():
  config = default.get_config()
  config.data.source = 'a\nb\x1b[31m\u2028é'
  splits = lambda: corpus.read_splits(config.data, ['train'])  # noqa: E731
  refusal(splits, r'a\nb\x1b[31m\u2028é: cannot read')


def _changes(capsys, before, now, at, skipped=0):
  both = default.get_config(), default.get_config()
  for config, values in zip(both, (before, now), strict=True):
    config.update_from_flattened_dict(
      {'train.max_steps': 100, 'optim.learning_rate': 1e-3} | values
    )
  settings.say_changes(*both, at, skipped)
  return capsys.readouterr().out


def test_a_resume_says_what_it_changes_and_what_that_does(capsys):
  cosine, longer = {'optim.schedule': 'cosine'}, {'train.max_steps': 200}
  assert _changes(capsys, cosine, cosine, 100) == ''
  out = _changes(capsys, cosine, cosine | longer, 100)
  assert out.startswith('changed: train.max_steps=200 (was 100); ')
  assert 'goes from 2.46733e-07 in step 100 to 0.0005 in step 101, not' in out
  # A skipped step does not move the schedule.
  out = _changes(capsys, cosine, cosine | longer, 100, skipped=50)
  assert 'goes from 0.000515705 in step 100 to 0.000853553 in step 101,' in out
  # Where no step is left, or the rate is the same, none is told.
  assert 'goes from' not in _changes(capsys, cosine | longer, cosine, 100)
  out = _changes(capsys, {}, longer | {'eval.every': 7}, 100)
  assert 'eval.every=7 (was 100)' in out and 'would have' in out
  # The first step that differs may be far ahead: here after the warm-up.
  linear = {'optim.schedule': 'linear', 'optim.warmup_steps': 50}
  out = _changes(capsys, linear, linear | {'train.max_steps': 60}, 7)
  said = 'from 0.001 in step 51 to 0.0009 in step 52, not to 0.00098'
  assert said in out
  short = {'optim.warmup_steps': 50, 'train.max_steps': 20}
  out = _changes(capsys, {'optim.warmup_steps': 50}, short, 1)
  assert 'in step 2, not to 3.92157e-05' in out


def test_several_directions():
  config = default.get_config()
  config.data.pair, config.data.temperature = 'en-fr, fr-en', 5.0
  settings.check(config)
  assert not settings.notes(config)
  config.data.weights = (1.0,)
  refusal(lambda: settings.check(config), 'data.weights', '2 directions')
  config.data.weights = (1.0, 2.0)
  settings.check(config)
  (note,) = settings.notes(config)
  assert 'data.temperature=5.0 has no effect' in note
  config.template.source_language = 'English'
  refusal(lambda: settings.check(config), 'template.source_language', 'several')
  config.data.pair = 'en-fr,en-pt_BR'
  settings.check(config)
