"""docs/fork.md: each of its diffs applies, and does what the page says."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from configs import debug
from mt.data import corpus
from mt.data import splits
from tests.fixtures import numbered_rows

ROOT = pathlib.Path(__file__).parents[2]
DIFFS = sorted((ROOT / 'docs' / 'forks').glob('*.diff'))


@pytest.fixture
def fork(tmp_path):
  """A function: the name of a diff -> a copy of the code that has it."""

  def apply(name):
    home = tmp_path / 'fork'
    skip = shutil.ignore_patterns('__pycache__', 'benchmarks', 'stress')
    for part in ('mt', 'configs', 'tests/fixtures', 'tests/docs'):
      shutil.copytree(ROOT / part, home / part, ignore=skip)
    shutil.copy(ROOT / 'train.py', home)
    diff = (ROOT / 'docs' / 'forks' / f'{name}.diff').read_text('utf-8')
    command = ['patch', '-p1', '--no-backup-if-mismatch']
    if not shutil.which('patch'):  # As on a very bare machine.
      command = ['git', 'apply', '-p1']
    done = subprocess.run(
      command,
      cwd=home,
      input=diff,
      text=True,
      capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home

  return apply


def _run(home, *args):
  env = os.environ | {'PYTHONPATH': ''}
  done = subprocess.run(
    [sys.executable, *map(str, args)],
    cwd=home,
    env=env,
    text=True,
    capture_output=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.parametrize(
  'name', ['attention_gate', 'sequence_weights', 'preference']
)
def test_a_fork_does_what_the_page_says(fork, tmp_path, name):
  home, out = fork(name), tmp_path / 'out'
  out.mkdir()
  _run(home, '-m', 'tests.docs.forked', name, out)


def test_a_new_optimizer_trains(fork, tmp_path):
  knobs = {
    'optim.name': 'lion',
    'optim.learning_rate': 1e-3,
    'train.max_steps': 2,
    'train.batch_size': 2,
    'data.length': 128,
    'eval.loss_pairs': 2,
    'eval.minitrain_pairs': 0,
    'eval.translate_every': 0,
    'eval.chrf_pairs': 0,
    'eval.patience': 0,
    'eval.translate_pairs': 1,
    'decode.max_ratio': 0.1,
  }
  _run(
    fork('lion'),
    'train.py',
    '--config=configs/debug.py',
    f'--workdir={tmp_path / "run"}',
    *(f'--config.{k}={v}' for k, v in knobs.items()),
  )
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert sum('"loss"' in line for line in lines) == 2
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['optim']['name'] == 'lion'


def test_aligned_sources_give_a_better_and_a_worse_row(tmp_path):
  """What preference.diff asks of the data, by the knobs that the page names."""
  for name in ('better', 'worse'):
    lines = [f'sentence {i}\t{name} {i}' for i in range(30)]
    (tmp_path / f'{name}.tsv').write_text('\n'.join(lines) + '\n')
  config = debug.get_config()
  config.data.source = f'{tmp_path}/better.tsv,{tmp_path}/worse.tsv'
  config.data.valid, config.data.weights = 'sample', (1, 1)
  config.data.packing, config.data.length = False, 256
  config.eval.minitrain_pairs = 0
  tok = numbered_rows.sample_tokenizer()
  texts = corpus.read_splits(config.data, ['train', 'valid'])
  read = list(splits.read(config, tok, texts).train)
  assert len(read) == config.train.max_steps  # More than an epoch.
  for batch in read:
    decoded = [
      (
        tok.decode(row[(segments > 0) & ~mask].tolist()),
        tok.decode(row[mask].tolist()),
      )
      for row, segments, mask in zip(
        batch['tokens'],
        batch['segment_ids'],
        batch['target_mask'],
        strict=True,
      )
    ]
    for (source, better), (same, worse) in zip(
      decoded[::2], decoded[1::2], strict=True
    ):
      assert source == same
      if not source:  # Rows that fill up an epoch are empty in both.
        assert not better + worse
        continue
      number = re.search(r'\d+', source)[0]
      assert better.split() == ['better', number]
      assert worse.split() == ['worse', number]


def test_the_page_shows_what_the_diffs_say():
  """Each added line on the page is one of a diff; two files at most in each."""
  page = (ROOT / 'docs' / 'fork.md').read_text('utf-8')
  added = {
    line
    for path in DIFFS
    for line in path.read_text('utf-8').splitlines()
    if re.match(r'[+-](?![+-])', line)
  }
  shown = [x for x in page.splitlines() if re.match(r'[+-](?![+-]) ', x)]
  shown = [x for x in shown if not x.startswith('- ')]
  assert shown
  assert set(shown) <= added
  for path in DIFFS:
    files = re.findall(r'^\+\+\+ ', path.read_text('utf-8'), re.MULTILINE)
    assert 1 <= len(files) <= 2
    assert f'forks/{path.name}' in page
