"""A run's model for other programs, whole or not at all."""

import dataclasses
import errno
import json
import os

import chex
from gemma import params as gemma_params
import jax
import ml_dtypes
import numpy as np
import pytest

from mt.base import files
from mt.base import run_folder
from mt.export import __main__ as export
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import checkpoint
from mt.weights import gguf_out
from mt.weights import hf
from mt.weights import pretrained
from tests.fixtures import flax_fixture
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gemma4
from tests.fixtures import tiny_gguf
from tests.fixtures.refusal import refusal
from tests.runs import lora_run


def test_the_command_writes_the_model_of_the_run(tmp_path, run, finetuned):
  out = tmp_path / 'not' / 'yet' / 'there'
  done = lora_run.command(f'--workdir={run}', '--to=hf', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert str(out) in done.stdout
  source, params = finetuned
  found = hf_fixture.open_folder(out)
  assert found.config == source.config
  assert found.tokenizer.proto == source.tokenizer.proto
  hf_fixture.assert_same(found.read(), jax.tree.map(np.asarray, params))
  assert sorted(p.name for p in out.parent.iterdir()) == ['there']
  assert {p.name for p in out.iterdir()} == {
    'config.json',
    'model.safetensors',
    *lora_run.SERVED,
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
  found = export.generation(config, source.config, source.tokenizer)
  assert (found['num_beams'], found['length_penalty']) == (4, 0.5)
  assert 'no_repeat_ngram_size' not in found
  assert 'suppress_tokens' not in found
  # Of Gemma 4: what our search never chooses, either.
  tok = source.tokenizer
  tok = dataclasses.replace(tok, controls=tok.controls | {'<image|>': 7})
  cfg = dataclasses.replace(source.config, vocab_size=tok.vocab_size + 1)
  found = export.generation(config, cfg, tok)
  assert found['suppress_tokens'] == [7, tok.vocab_size]


@pytest.mark.parametrize('place', ('jinja', 'config'))
def test_a_model_keeps_its_chat_template(tmp_path, monkeypatch, place):
  """Without a run; and what a published one may not write is not written."""
  base, template = tmp_path / 'base', '{{ bos_token }}"é"\n'
  hf_fixture.write_folder(base)
  if place == 'jinja':
    (base / 'chat_template.jinja').write_text(template, 'utf-8')
  else:
    fields = {'chat_template': template}
    (base / 'tokenizer_config.json').write_text(json.dumps(fields))
  monkeypatch.setattr(export.translator, 'never_ids', lambda tok: (7,))
  export.merge(str(base), '', 'gguf', tmp_path / 'gguf', 'float32')
  for source, out in ('base', 'hf'), ('gguf', 'again'):
    out = tmp_path / out
    export.merge(str(tmp_path / source), '', 'hf', out, 'float32')
    assert (out / 'chat_template.jinja').read_text('utf-8') == template
    fields = json.loads((out / 'generation_config.json').read_text())
    assert fields['suppress_tokens'] == [7]


def test_rows_without_a_piece_are_never_generated(tmp_path, run):
  tok = checkpoint.open_source(run)[1].tokenizer
  cfg = gguf_fixture.tiny_config('gemma2', 402)
  hf.write(tmp_path, cfg, gguf_fixture.tiny_params(cfg), tok)
  fields = json.loads((tmp_path / 'generation_config.json').read_text())
  assert fields['suppress_tokens'] == [400, 401]
  assert fields['eos_token_id'] == sorted(tok.end_ids)


@pytest.mark.parametrize('dtype', sorted(gguf_out.KINDS))
def test_a_gguf_file_is_the_model_of_the_run(tmp_path, run, finetuned, dtype):
  export.from_run('gguf', run, tmp_path / 'o', dtype)
  kind = {'float32': 'F32', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}[dtype]
  names = {p.name for p in (tmp_path / 'o').iterdir()}
  assert names == {f'model-{kind}.gguf', 'README.md'}
  found, (source, params) = hf_fixture.open_folder(tmp_path / 'o'), finetuned
  assert found.config == source.config
  error = {'float32': 1e-7, 'bfloat16': 2**-8, 'q8_0': 2**-7}[dtype]
  expected = parameters.flatten(params)
  for name, x in parameters.flatten(found.read()).items():
    off = np.abs(x - expected[name]).max() / np.abs(x).max()
    assert off < error, name


@pytest.mark.parametrize('to', export.FORMATS)
def test_the_checkpoint_is_chosen(tmp_path, run, to):
  refusal(
    lambda: export.from_run(to, run, tmp_path / 'o', 'float32', False, '7'),
    "no checkpoint '7'",
  )


def test_the_official_layout(tmp_path, run, finetuned, monkeypatch):
  source, params = finetuned
  monkeypatch.setitem(sizes.SIZES, 'tiny', source.config)
  export.from_run('gemma', run, tmp_path / 'o', 'float32')
  read = gemma_params.load_and_format_params(str(tmp_path / 'o' / 'checkpoint'))
  params = jax.tree.map(np.asarray, params)
  want = flax_fixture.nested_tree(source.config, params, transposed=True)
  chex.assert_trees_all_equal(read['transformer'], want)
  assert (tmp_path / 'o' / 'tokenizer.model').read_bytes() == (
    source.tokenizer.proto
  )
  export.from_run('gemma', run, tmp_path / 'base', 'bfloat16', base=True)
  path = str(tmp_path / 'base' / 'checkpoint')
  read = gemma_params.load_and_format_params(path)['transformer']
  base = jax.tree.map(
    lambda x: np.asarray(x.astype(ml_dtypes.bfloat16)), source.read()
  )
  want = flax_fixture.nested_tree(source.config, base, transposed=True)
  chex.assert_trees_all_equal(read, want)


def test_low_rank_products_are_added_to_the_weights_as_they_were(
  tmp_path, run, finetuned
):
  """Not to those of 4 bits that they were trained beside."""
  config, source = checkpoint.open_source(run)
  proto = source.tokenizer.proto
  other = lora_run.write(
    tmp_path / 'run', config.weights.source, proto, frozen_dtype='int4'
  )
  export.from_run('hf', other, tmp_path / 'hf', 'float32')
  want = jax.tree.map(np.asarray, finetuned[1])
  hf_fixture.assert_same(hf_fixture.open_folder(tmp_path / 'hf').read(), want)
  layers = checkpoint.load_finetuned(other, 0)[2]['layers']
  assert layers['q'].q.dtype == np.uint8  # What it translates with.


@pytest.mark.parametrize('of', ('run', 'base', 'model', 'adapter'))
def test_nothing_is_moved_to_an_accelerator(tmp_path, run, monkeypatch, of):
  """It has room for 4 bits a weight, perhaps; another CPU stands for it."""
  source, adapter, seen = run_folder.read_config(run).weights.source, '', []
  if of == 'adapter':
    adapter = str(tmp_path / 'a')
    export.from_run('peft', run, tmp_path / 'a', 'float32')
  monkeypatch.setattr(
    export, 'write', lambda _, params, *__: seen.append(params)
  )
  with jax.default_device(jax.devices()[1]):
    if of in ('run', 'base'):
      export.from_run('hf', run, tmp_path, 'float32', base=of == 'base')
    else:
      export.merge(source, adapter, 'hf', tmp_path, 'float32')
  places = {d for x in jax.tree.leaves(seen) for d in x.devices()}
  assert places == {jax.devices()[0]}


def test_a_relative_path_is_seen_from_any_folder(tmp_path, monkeypatch):
  for name in 'one', 'two':
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / 'one')
  tiny_gguf.write(tmp_path / 'one' / 'a.gguf')
  proto = gguf_fixture.train_proto()
  run = lora_run.write(tmp_path / 'run', 'a.gguf', proto)
  saved = run_folder.read_config(run)
  assert saved.weights.source == str(tmp_path / 'one' / 'a.gguf')
  assert saved.weights.tokenizer == ''
  monkeypatch.chdir(tmp_path / 'two')
  checkpoint.load_finetuned(run, 0)
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


# Refusals.


def test_nothing_is_overwritten(tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'precious').write_text('')
  # Before the run, which is not there, is looked at.
  done = lora_run.command(
    f'--workdir={tmp_path / "none"}', '--to=hf', f'--out={out}'
  )
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

  monkeypatch.setattr(export.hf.hf_config_out, 'write', fail)
  out = tmp_path / 'new' / 'out'
  if error is OSError:
    refusal(
      lambda: export.from_run('hf', run, out, 'float32', base=True),
      'No space left on device',
      '--out',
    )
  else:
    with pytest.raises(KeyboardInterrupt):
      export.from_run('hf', run, out, 'float32', base=True)
  assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.parametrize('to', ('gguf', 'gemma'))
def test_what_a_format_cannot_say_is_refused_before_all_is_read(
  tmp_path, run, monkeypatch, to
):
  source = dataclasses.replace(
    checkpoint.open_source(run)[1],
    config=tiny_gemma4.WITH_TOKENIZER['12b'],
    read_kept=None,
  )
  opened = lambda *_, **__: source  # noqa: E731
  monkeypatch.setattr(pretrained, 'open_source', opened)
  out = tmp_path / 'out'
  for base in True, False:
    refusal(
      lambda base=base: export.from_run(to, run, out, 'float32', base),
      f'--to={to}: Gemma 4',
    )
  refusal(
    lambda: export.merge('x', '', to, out, 'float32'), f'--to={to}: Gemma 4'
  )


def test_no_run_there_is_refused(tmp_path):
  for to in 'hf', 'peft':
    refusal(
      lambda to=to: export.from_run(
        to, tmp_path, tmp_path / 'out', 'float32', base=False
      ),
      tmp_path / 'config.json',
      '--workdir',
    )
  assert not any(tmp_path.iterdir())  # Nothing is made where nothing is.


@pytest.mark.parametrize(
  ('flags', 'code', 'words'),
  [
    (['--to=onnx', '--workdir=w'], 1, 'onnx'),
    ([], 2, 'exactly one of --workdir and --source'),
    (['--source='], 2, 'exactly one of --workdir and --source'),
    (['--source=s', '--base'], 2, 'at most one of --source, --base'),
    (['--source=random'], 2, '--source=random: a model'),
    # What is empty or false is not given.
    (['--workdir=w', '--source=', '--base'], 2, 'w/config.json'),
    (['--workdir=w', '--nobase', '--checkpoint=1'], 2, 'w/config.json'),
    (['--workdir=', '--source=s', '--checkpoint='], 2, 's: '),
    (['--workdir=w', '--public'], 2, '--public is of --push'),
    (['--workdir=w', '--adapter=a'], 2, '--adapter is of --source'),
    (['--workdir=w', '--dtype=q8_0'], 2, '--to=gguf alone'),
    (['--workdir=w', '--push=me/mine'], 2, 'hf:USER/NAME'),
  ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, flags, code, words):
  done = lora_run.command(f'--out={tmp_path}/o', *flags)
  assert (done.returncode, done.stderr.count('\n')) == (code, 1), done.stderr
  assert words in done.stderr
  assert not any(tmp_path.iterdir())
