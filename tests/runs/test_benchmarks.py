"""What `make bench` reckons with, and that its sides still fit their job."""

import importlib
import re
import time
import types

import chex
import jax
import numpy as np
import pytest

from mt.data import batches
from mt.data import template
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import pretrained
from tests.benchmarks import accelerator
from tests.benchmarks import quality
from tests.benchmarks import speed
from tests.benchmarks import table
from tests.benchmarks.sides import chip
from tests.benchmarks.sides import ours
from tests.benchmarks.sides import side
from tests.benchmarks.sides import tutorial
from tests.fixtures.refusal import refusal

_SIDES = speed._ROOT / 'tests' / 'benchmarks' / 'sides'
_TINY = sizes.ModelConfig(10, 2, 3, 5, 1, 1, 2, 1.0)


@pytest.fixture(scope='module')
def tiny_source():
  """What the real weights are to the bench, in small."""
  lines = [f'no {i} lol what a day, {i * i} times' for i in range(300)]
  config = ours.make_config('all', {'rows': 1, 'steps': 1, 'learning_rate': 0})
  pairs = speed.corpus.read_splits(config.data, ['train'])['train'][0].read()
  tok = tokenizer.train([*lines, *(p.source for p in pairs)], 500)
  cfg = sizes.SIZES['debug']
  params = parameters.init(cfg, jax.random.key(0))
  # Steps donate what they are given.
  return pretrained.Source(
    cfg, tok, lambda keep: (jax.tree.map(jax.numpy.copy, params), 0)
  )


def test_pairs_of_packed_rows():
  pairs = [([2, 5], [6, 1]), ([2], [0, 0, 1]), ([2, 7, 0], [1])]
  tokens = np.array([i for p, t in pairs for i in p + t], np.int32)
  lengths = np.array([len(p) + len(t) for p, t in pairs])
  starts = np.array([len(p) for p, _ in pairs])
  examples = template.Examples(tokens, lengths, starts)
  rows = [batches.build_row(examples, i, 9) for i in ([0, 1], [], [2])]
  first = {k: np.stack([r[k] for r in rows[:2]]) for k in rows[0]}
  second = {k: v[None] for k, v in rows[2].items()}
  found = speed.pairs_of([first, second])
  assert found == [list(pair) for pair in pairs]


def test_the_forms_that_others_read(tiny_source, tmp_path):
  made = speed.prepare(tmp_path / 'new', tiny_source)
  for path in made.values():
    found = pretrained.open_source(path, '', '', seed=0, texts=())
    chex.assert_trees_all_equal(found.read(), tiny_source.read())
  assert speed.prepare(tmp_path / 'new', None) == made  # They are there.


def test_a_continuation_ends_with_its_stop_or_its_limit():
  assert side.until_end([5, 6, 1, 7], 9, [1, 3]) == [5, 6, 1]
  assert side.until_end([5, 6, 1, 7], 2, [1, 3]) == [5, 6]
  assert side.until_end([5, 6], 2, [1]) == [5, 6]


def test_useful_work_by_hand():
  # Blocks: q 6, k 6, v 6, o 6, gate 15, up 15, down 15, two norms 3 each; two
  # layers. Vocabulary 30.
  blocks = 2 * (4 * 6 + 3 * 15 + 2 * 3)
  pairs = [([2, 5, 6], [7, 1]), ([2], [1])]
  expected = blocks * 7 + 30 * 3
  assert table.useful_flops(_TINY, pairs, lora=False) == 6 * expected
  assert table.useful_flops(_TINY, pairs, lora=True) == 4 * expected


def test_the_roof_of_decoding_is_what_binds():
  roof = {'bandwidth': 1e9, 'head_4': 100.0, 'block_4': 50.0}
  blocks, head = 2 * (4 * 6 + 3 * 15 + 2 * 3), 30
  seconds = 2 * 4 * blocks / 50 + 2 * 4 * head / 100
  found = table.decoding_roof(_TINY, roof, batch=2, beam=2)
  np.testing.assert_allclose(found, 2 / seconds)
  roof['bandwidth'] = 1.0  # Now the weights are read more slowly than used.
  found = table.decoding_roof(_TINY, roof, batch=2, beam=2)
  np.testing.assert_allclose(found, 2 / (4 * (blocks + head)))


def _trained(seconds, first, loss=2.0, peak=720):
  return {
    'units': 100,
    'seconds': seconds,
    'first_step': first,
    'loss': loss,
    'peak_bytes': peak,
  }


def _made(seconds, made):
  units = sum(map(len, made))
  return {'units': units, 'seconds': seconds, 'made': made, 'peak_bytes': None}


def test_the_tables():
  nbytes = 4 * (2 * 75 + 30 + 3)  # As above, and the final norm.
  answers = {
    'ours.full': [
      _trained(2, 30, peak=2 * nbytes),
      _trained(1, 9),
      _trained(4, 8),
    ],
    'hf.full': [_trained(10, 20), {'failed': 'exit code 1: x'}],
    'tunix.full': [{'failed': 'not there', 'absent': True}],
    'ours.greedy': [_made(2, [[5, 1], [6, 1]])],
    'llama.greedy': [_made(1, [[5, 1], [7, 1]])],
  }
  job = {'pairs': [], 'batch': 2, 'beam': 2}
  text = table.report(_TINY, job, answers)
  cells = [re.split(r'\s{2,}', line.strip()) for line in text.splitlines()]
  assert cells == [
    ['Training, all weights, SGD: targets', *table._COLUMNS[True]],
    ['ours', '50.0', '1.00 x', '0.98 x', '30 / 9 s', '2.0000'],
    ['transformers, PyTorch', '10.0', '5.00 x', '0.98 x', '20 s', '2.0000'],
    ['transformers, PyTorch: exit code 1: x'],
    ['tunix: not there'],
    [''],
    ['Decoding, greedy, batch of 16: output', *table._COLUMNS[False]],
    ['ours', '2.0', '1.00 x', '2 s', '100%'],
    ['llama.cpp', '4.0', '0.50 x', '1 s', '50%'],
  ]
  # With the machine's roof, each has its share.
  job['pairs'] = [[[2], [1] * 100]]
  work = table.useful_flops(_TINY, job['pairs'], lora=False)
  roof = {'bandwidth': 1e9, 'head_2': 1e9, 'block_2': 1e9, 'gemm': work / 2}
  answers['roof.roof'] = [roof | {'peak_bytes': 1}]
  lines = table.report(_TINY, job, answers).splitlines()
  assert lines[3].split()[:4] == ['ours', '50.0', '1.00', 'x']
  assert lines[3].split()[4] == '100%'


def test_losses_that_differ_are_told():
  answers = {
    'ours.full': [_trained(1, 1, loss=2.0)],
    'hf.full': [_trained(1, 1, loss=2.0004)],
    'tunix.full': [_trained(1, 1, loss=2.1)],
    'hf.lora': [_trained(1, 1, loss=2.1), {'failed': 'x'}],
    'hf.greedy': [_made(1, [[1]])],
  }
  assert table.disagreements(answers) == [
    'tunix.full: its loss is 2.1000, that of ours.full 2.0000.',
    'hf.lora: its loss is 2.1000, that of ours.full 2.0000.',
  ]
  assert table.disagreements({'hf.greedy': [_made(1, [[1]])]}) == []


def test_what_cannot_run_says_why(tmp_path):
  job = {'threads': 1}
  answer = speed.ask(tmp_path, job, 'hf', 'full', '.venv-nowhere')
  assert answer['absent'] and '.venv-nowhere' in answer['failed']
  if not (speed._ROOT / '.venv').exists():
    pytest.skip('no .venv here')
  # It has no torch.
  answer = speed.ask(tmp_path, job, 'hf', 'full', '.venv')
  assert "No module named 'torch'" in answer['failed']
  assert 'absent' not in answer


def test_only():
  assert len(speed.chosen([])) == len(speed.PLAN)
  assert [x[:2] for x in speed.chosen(['llama', 'ours.full'])] == [
    ('ours', 'full'),
    ('llama', 'greedy'),
  ]
  assert {t for _, t, _ in speed.chosen(['lora'])} == {'lora'}
  refusal(lambda: speed.chosen(['our']), "'our'", 'hf.full')


def test_every_side_reads_a_job_that_is_there(tiny_source):
  job = speed.make_job(tiny_source, rows=1, steps=1, sentences=3)
  assert len(job['prompts']) == 3
  given = {*job, 'hf', 'gguf', 'threads', 'started'}
  for name in {name for name, _, _ in speed.PLAN}:
    text = (_SIDES / f'{name}.py').read_text('utf-8')
    compile(text, name, 'exec')
    asked = set(re.findall(r"job\['(\w+)'\]", text))
    assert asked and asked <= given, name
    tasks = {t for s, t, _ in speed.PLAN if s == name}
    offered = text[text.index('side.main(') :]
    assert tasks == set(re.findall(r"'(\w+)': (?:lambda|_)", offered)), name
  for name, _, environment in speed.PLAN:
    if environment == '.venv':
      importlib.import_module(f'tests.benchmarks.sides.{name}')


def _quality_flags(**changes):
  known = {'data': 'sample', 'weights': '', 'split': 'valid', 'pairs': 3}
  known |= {'beam': 1, 'prompt': '', 'target_prefix': ' ', 'out': ''}
  known |= {'seconds': 1.0, 'learning_rate': 1e-3, 'threads': 1}
  return types.SimpleNamespace(**known | changes)


def test_the_fine_tuning_of_peft_finds_its_job(
  tmp_path, monkeypatch, tiny_source
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(ours, 'open_weights', lambda: tiny_source)
  monkeypatch.setattr(speed, 'prepare', lambda *_: {'hf': 'H', 'gguf': 'G'})
  monkeypatch.setattr(speed, 'ask', lambda folder, job, *_: job)
  (tmp_path / 'runs' / 'bench').mkdir(parents=True)
  job = quality.peft(_quality_flags(out='new'))
  text = (_SIDES / 'finetune.py').read_text('utf-8')
  compile(text, 'finetune', 'exec')
  asked = set(re.findall(r"job\['(\w+)'\]", text)) | {'threads'}
  assert asked == {*job, 'started'} - {'gguf'}
  prompt, target = job['pairs'][0]
  assert prompt[0] == tiny_source.tokenizer.bos_id
  assert target[-1] == tiny_source.tokenizer.eos_id
  (tmp_path / 'old').mkdir()
  refusal(lambda: quality.peft(_quality_flags(out='old')), '--out=old')


def test_a_model_is_scored_as_a_run_would(tmp_path, monkeypatch, tiny_source):
  monkeypatch.setattr(pretrained, 'open_source', lambda *_, **__: tiny_source)
  out = tmp_path / 'texts'
  found = quality.score(_quality_flags(out=str(out)))
  assert found['sentences'] == 3 and 0 <= found['chrf'] < 50
  assert len(out.read_text('utf-8').splitlines()) == 3


@pytest.mark.heavy
def test_ours_and_the_tutorial_train_on_the_same(monkeypatch, tiny_source):
  """The same mean loss, in the same number of targets, from other batches."""
  monkeypatch.setattr(ours, 'open_weights', lambda: tiny_source)
  monkeypatch.setattr(ours.compiling, 'keep_compiled_programs', lambda: None)
  job = speed.make_job(tiny_source, rows=2, steps=2, sentences=1)
  job |= {'started': 0.0, 'learning_rate': 1e-9}
  packed = ours._train(job, 'all')
  alone = tutorial._train(job)
  assert packed['units'] == alone['units'] > 100
  np.testing.assert_allclose(packed['loss'], alone['loss'], rtol=1e-5)
  lora = ours._train(job, 'lora')
  np.testing.assert_allclose(lora['loss'], alone['loss'], rtol=1e-5)


def test_make_accelerator_in_small(tmp_path, monkeypatch):
  """Its own side in full, and the table; the weights are few and by chance."""
  monkeypatch.setattr(chip.compiling, 'keep_compiled_programs', lambda: None)
  jobs = accelerator.make_jobs(tmp_path, quick=True)
  assert jobs.keys() == {name for name, *_ in accelerator.CASES}
  assert (tmp_path / 'hf-1b' / 'config.json').exists()
  text = (_SIDES / 'hf_chip.py').read_text('utf-8')
  asked = set(re.findall(r"job\['(\w+)'\]", text)) - {'started'}
  assert asked <= jobs['decode'].keys()
  lora = chip._train(jobs['270m lora'] | {'started': time.time()})
  tokens = sum(len(p) + len(t) for p, t in jobs['270m lora']['pairs'])
  assert lora['rows'] == 2 and lora['tokens'] == tokens / 2
  decoded = chip._decode(jobs['decode'] | {'batches': ((2, 1),)})
  assert len(decoded['decoded']['2x1']['made']) == 8
  answers = {
    'roof': {'device': 'D', 'kind': 'k', 'product': 1e12, 'jax': 'J'},
    '270m lora': lora | {'seconds': 0.5, 'peak': 3e9, 'planned': 2e9},
    '270m lora, transformers': {'rate': tokens / 4},
    'decode': decoded,
    'decode, transformers': decoded,
    '1b all': {'failed': 'too large'},
    '1b all, transformers': {'failed': 'no batch fits'},
  }
  lines = accelerator.report(jobs, answers).splitlines()
  rows = {re.split(r'\s{2,}', line.strip())[0]: line for line in lines[3:]}
  cells = rows['270m lora, 2 rows'].split()[-7:]
  assert cells[0] == '500.00' and cells[3:5] == ['3.00', '2.00']
  assert cells[-1] == '4.00'
  assert rows['decoding, sentences x beam 2x1'].split()[-1] == '1.00'
  assert rows['1b all'].split()[-2:] == ['too', 'large']
  assert rows['transformers: no batch fits']
