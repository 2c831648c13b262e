"""Speed against the others, side by side: `make bench`.

  python -m tests.benchmarks.speed [--rounds=3] [--rows=4] [--only=ours,hf]

The real Gemma 3 270M on the bundled sample, float32, the same CPUs for all.
Each side works in a process of its own, one after the other and round after
round; medians over the rounds are reported. All train on the same pairs, so
that the losses, with a learning rate near zero, must agree; all continue the
same prompts, so that greedy tokens must.

A row that could not be measured says why. The exit code is 1 if it was for
another reason than an environment that is not there, or if losses differ. One
JSON object a process is left in runs/bench/answers.jsonl.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags

from mt.base import cli
from mt.base import errors
from mt.data import batches
from mt.data import corpus
from mt.data import template as template_lib
from mt.translate import translator
from mt.weights import hf
from mt.weights import pretrained
from tests.benchmarks import table
from tests.benchmarks.sides import ours
from tests.fixtures import gguf_fixture

_ROOT = pathlib.Path(__file__).parents[2]
# What is measured, in turns: side, task, environment.
PLAN = (
  ('roof', 'roof', '.venv'),
  ('ours', 'full', '.venv'),
  ('tutorial', 'full', '.venv'),
  ('hf', 'full', '.venv-bench'),
  ('tunix', 'full', '.venv-tunix'),
  ('ours', 'lora', '.venv'),
  ('hf', 'lora', '.venv-bench'),
  ('ours', 'greedy', '.venv'),
  ('hf', 'greedy', '.venv-bench'),
  ('llama', 'greedy', '.venv-bench'),
  ('ours', 'beam', '.venv'),
  ('hf', 'beam', '.venv-bench'),
)
TRAIN_BATCH, _BATCH, _BEAM, _LEARNING_RATE = 8, 16, 4, 1e-9


def make_job(source: pretrained.Source, rows: int, steps: int, sentences: int):
  """The job of tests/benchmarks/sides/side.py, without files and threads."""
  job = {
    'rows': rows,
    'steps': steps,
    'learning_rate': _LEARNING_RATE,
    'train_batch': TRAIN_BATCH,
    'batch': _BATCH,
    'beam': _BEAM,
  }
  config, tok = ours.make_config('all', job), source.tokenizer
  (text,) = corpus.read_splits(config.data, ['valid'])['valid']
  texts = [p.source for p in text.read(range(sentences))]
  job['pairs'] = pairs_of(ours.rows_of(config, tok))
  return job | prompts_of(config, tok, texts)


def prompts_of(config, tok, texts: list[str]) -> dict:
  """`prompts` and `stops` of a job, as a run of this config has them."""
  template, d = template_lib.from_config(config), config.decode
  prompts = [
    {
      'tokens': template_lib.prompt_ids(text, tok, template),
      'limit': int(d.max_ratio * len(tok.encode(text))) + d.max_extra,
    }
    for text in texts
  ]
  stops = list(translator.stop_ids(tok, template))
  return {'prompts': prompts, 'stops': stops}


def pairs_of(steps: list[batches.Batch]) -> list[list[list[int]]]:
  """The (prompt ids, target ids) that stand in packed rows [B, L]."""
  out = []
  for batch in steps:
    for tokens, segments, targets in zip(
      batch['tokens'],
      batch['segment_ids'],
      batch['target_mask'],
      strict=True,
    ):
      for segment in range(1, segments.max() + 1):
        here = segments == segment
        out.append([tokens[here & ~targets], tokens[here & targets]])
  return [[side.tolist() for side in pair] for pair in out]


def prepare(folder: pathlib.Path, source: pretrained.Source) -> dict[str, str]:
  """The model in the forms that others read (2.1 GB of disk), for a job."""
  folder.mkdir(parents=True, exist_ok=True)
  wanted = folder / 'hf', folder / 'float32.gguf'
  if not all(path.exists() for path in wanted):
    params = source.read()
    cfg, tok = source.config, source.tokenizer
    part = pathlib.Path(tempfile.mkdtemp(dir=folder))
    (part / 'hf').mkdir()
    hf.write(part / 'hf', cfg, params, tok)
    gguf_fixture.write_gguf(part / 'float32.gguf', cfg, params, tok.proto)
    shutil.rmtree(wanted[0], ignore_errors=True)
    for made in wanted:
      (part / made.name).replace(made)
    part.rmdir()
  return {'hf': str(wanted[0]), 'gguf': str(wanted[1])}


def ask(folder, job, side, task, environment) -> dict:
  """One process; its answer, or {'failed': why}."""
  python = _ROOT / environment / 'bin' / 'python'
  if not python.exists():
    return {'failed': f'{environment} is not there: make bench', 'absent': True}
  paths = folder / 'job.json', folder / 'answer.json'
  paths[0].write_text(json.dumps(job), encoding='utf-8')
  paths[1].unlink(missing_ok=True)
  started = time.time()
  done = subprocess.run(
    [
      python,
      '-m',
      f'tests.benchmarks.sides.{side}',
      task,
      *paths,
      str(started),
    ],
    cwd=_ROOT,
    env=os.environ
    | {
      'HF_HUB_OFFLINE': '1',
      'OMP_NUM_THREADS': str(job['threads']),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled' / f'{side}.{task}'),
    },
    capture_output=True,
    text=True,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    return {'failed': f'exit code {done.returncode}: {last}'}
  return json.loads(paths[1].read_text(encoding='utf-8'))


def chosen(only: list[str]) -> list[tuple[str, str, str]]:
  """What of PLAN is asked for: sides, tasks, or SIDE.TASK."""
  plan = [
    (side, task, environment)
    for side, task, environment in PLAN
    if not only or {side, task, f'{side}.{task}'} & set(only)
  ]
  known = {x for s, t, _ in PLAN for x in (s, t, f'{s}.{t}')}
  if unknown := set(only) - known:
    raise errors.UserError(
      f'--only names {sorted(unknown)[0]!r}, which is not measured; it takes '
      f'{", ".join(sorted(known))}.'
    )
  return plan


def main(argv):
  if len(argv) > 1:
    raise errors.UserError(f'{argv[1]!r} is no flag; see --help.')
  f = flags.FLAGS
  plan = chosen(f.only)
  if hasattr(os, 'sched_setaffinity'):  # Processes started from here keep it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: f.threads])
  folder = pathlib.Path(f.work).absolute()
  source = ours.open_weights()
  cfg = source.config
  job = make_job(source, f.rows, f.steps, f.sentences)
  job |= prepare(folder, source) | {'threads': f.threads}
  targets = sum(len(t) for _, t in job['pairs'])
  print(
    f'{len(job["pairs"])} pairs with {targets} target tokens; '
    f'{len(job["prompts"])} prompts; {f.rounds} rounds, {f.threads} threads'
  )
  shutil.rmtree(folder / 'compiled', ignore_errors=True)  # A cold start.
  answers: table.Answers = {}
  for number in range(1, f.rounds + 1):
    for side, task, environment in plan:
      name, start = f'{side}.{task}', time.monotonic()
      answer = ask(folder, job, side, task, environment)
      answers.setdefault(name, []).append(answer)
      with open(folder / 'answers.jsonl', 'a', encoding='utf-8') as out:
        out.write(json.dumps({'round': number, 'name': name} | answer) + '\n')
      said = answer.get('failed', f'{time.monotonic() - start:.0f} s')
      print(f'round {number}, {name}: {said}', flush=True)
  print('\n' + table.report(cfg, job, answers))
  wrong = table.disagreements(answers)
  for line in wrong:
    print(line)
  every = [a for found in answers.values() for a in found]
  failed = any('failed' in a and 'absent' not in a for a in every)
  sys.exit(failed or bool(wrong))


if __name__ == '__main__':
  flags.DEFINE_integer('rounds', 3, 'Times that all is measured.', 1)
  flags.DEFINE_integer('steps', 2, 'Steps of ours, whose pairs all take.', 1)
  flags.DEFINE_integer('rows', 4, 'Packed rows in a step of ours.', 1)
  flags.DEFINE_integer('sentences', 48, 'Sentences to be translated.', 1)
  flags.DEFINE_integer('threads', 2, 'CPUs that each process may use.', 1)
  flags.DEFINE_list('only', [], 'Sides, tasks or SIDE.TASK; all if not given.')
  flags.DEFINE_string('work', 'runs/bench', 'Folder for models and answers.')
  cli.run(main)
