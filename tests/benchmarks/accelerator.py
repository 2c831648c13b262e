"""What a GPU or TPU does with this, in eight minutes: `make accelerator`.

  python -m tests.benchmarks.accelerator [--only=270m,decode] [--seconds=460]

Each case is a process of its own, as the peak of a device's memory is one of a
process; transformers, in bfloat16 with SDPA and a fused AdamW, trains on the
same pairs and continues the same prompts, wherever torch is. What there is no
time for is said. The table is printed; WORK/accelerator.json has all of it,
after each case.

tokens/s    training: all but padding; decoding: output, the end included
MFU         useful FLOP/s (table.useful_flops: no attention, no recomputing)
            over the chip's peak for bfloat16; of an unknown chip, over its best
            product here
ms          of a step: of training, or of a token for each row that is decoded
est. ms     mt/train/roofline.py's estimate of the same program
peak, plan  GB on the device: the most that was held, and the compiler's word
first step  seconds from the start of the process until its first step is done;
            in `again` the programs compiled before are there
x           so many times the tokens/s of transformers
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

_PLATFORMS = os.environ.get('JAX_PLATFORMS')
os.environ['JAX_PLATFORMS'] = 'cpu'  # The device is for the cases.

# ruff: noqa: E402
from absl import flags
import numpy as np

from configs import gemma3_270m
from configs import gemma3_270m_gpu
from mt.base import cli
from mt.data import corpus
from mt.gemma import sizes
from mt.train import machine
from mt.train import targets
from mt.weights import hf
from mt.weights import hf_config_out
from mt.weights import pretrained
from tests.benchmarks import speed
from tests.benchmarks import table
from tests.benchmarks.sides import ours

_ROOT = pathlib.Path(__file__).parents[2]
_ALL, _LORA = {'train.parts': 'all'}, {'train.parts': 'lora'}
# Name, task, size of the model, config, knobs; in the order of their weight.
CASES = (
  ('270m all', 'train', '270m', 'gemma3_270m_gpu', _ALL),
  ('270m all again', 'train', '270m', 'gemma3_270m_gpu', _ALL),
  ('decode', 'decode', '270m', 'gemma3_270m_gpu', {}),
  ('1b all', 'train', '1b', 'gemma3_270m_gpu', _ALL),
  ('270m make train', 'train', '270m', 'gemma3_270m', {}),
  ('270m lora', 'train', '270m', 'gemma3_270m_gpu', _LORA),
  ('1b lora', 'train', '1b', 'gemma3_270m_gpu', _LORA),
)
_DECODED = ((16, 1), (256, 1), (16, 4), (256, 4))  # Sentences, beam.


def make_jobs(folder: pathlib.Path, quick: bool) -> dict[str, dict]:
  """A job (see sides/chip.py) for each case; rows and models on disk."""
  jobs, source = {}, _source(quick)
  for name, _, size, module, changes in CASES:
    base = gemma3_270m_gpu if module.endswith('gpu') else gemma3_270m
    config = machine.here(base.get_config())
    config.update_from_flattened_dict({**changes, 'data.source': 'sample'})
    config.train.max_steps = 3 if quick else 8
    if quick:
      config.data.length, config.train.batch_size = 256, 2
    rows = ours.rows_of(config, source.tokenizer)
    path = folder / f'{name}.npz'
    np.savez(path, **{k: np.stack([r[k] for r in rows]) for k in rows[0]})
    jobs[name] = {
      'config': module,
      'changes': changes,
      'parts': config.train.parts,
      'rows': str(path),
      'size': 'debug' if quick else f'gemma3_{size}',
      'random': quick or size != '270m',
      'pairs': speed.pairs_of(rows[1:3]),
      'hf': str(folder / f'hf-{size}'),
      'learning_rate': 1e-9,
      'batches': _DECODED if not quick else ((2, 1), (4, 1), (2, 4)),
    }
  texts = corpus.read_splits(config.data, ['train', 'valid'])
  sources = [p.source for (t,) in texts.values() for p in t.read()]
  sources = sources * 2 if not quick else sources[:16]
  jobs['decode'] |= speed.prompts_of(config, source.tokenizer, sources)
  _write_models(folder, source, jobs)
  return jobs


def _source(quick):
  if not quick:
    return ours.open_weights()
  c = gemma3_270m.get_config()
  (text,) = corpus.read_splits(c.data, ['train'])['train']
  lines = corpus.some_texts(text)
  return pretrained.open_source('random', 'debug', '', seed=0, texts=lines)


def _write_models(folder, source, jobs):
  """The forms that transformers reads: weights, or of random ones the shape."""
  tok = source.tokenizer
  ids = {
    f'{k}_token_id': getattr(tok, f'{k}_id') for k in ('pad', 'bos', 'eos')
  }
  for job in jobs.values():
    path = pathlib.Path(job['hf'])
    if path.exists():
      continue
    path.mkdir()
    if job['random']:
      cfg = sizes.SIZES[job['size']]
      hf_config_out.write(path / 'config.json', cfg, 'bfloat16', ids)
    else:
      hf.write(path, source.config, source.read(), tok, 'bfloat16')


def ask(folder, job, side, task, python, seconds) -> dict:
  """One process; its answer, or {'failed': why}."""
  paths = folder / 'job.json', folder / 'answer.json'
  paths[0].write_text(json.dumps(job), encoding='utf-8')
  paths[1].unlink(missing_ok=True)
  env = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  env |= {} if _PLATFORMS is None else {'JAX_PLATFORMS': _PLATFORMS}
  env |= {'HF_HUB_OFFLINE': '1'}
  env |= {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}
  module = f'tests.benchmarks.sides.{side}'
  command = [python, '-m', module, task, *paths, str(time.time())]
  try:
    done = subprocess.run(
      command,
      cwd=_ROOT,
      env=env,
      capture_output=True,
      text=True,
      timeout=seconds,
    )
  except subprocess.TimeoutExpired:
    return {'failed': f'stopped after {seconds:.0f} s'}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    return {'failed': last[:300]}
  return json.loads(paths[1].read_text(encoding='utf-8'))


def torch_python() -> str | None:
  """A Python that has torch and transformers, or None."""
  for python in (str(_ROOT / '.venv-transformers/bin/python'), 'python3'):
    found = shutil.which(python)
    test = [found, '-c', 'import torch, transformers']
    if found and not subprocess.run(test, capture_output=True).returncode:
      return found
  return None


def rows_of(name: str, job: dict, own: dict, other: dict, peak: float):
  """Lines of the table for a case: (what, cells by column)."""
  if 'failed' in own:
    return [(name, {'': own['failed']})]
  if 'decoded' in own:
    theirs = other.get('decoded', {})
    return [
      _decoded_row(k, a, theirs.get(k)) for k, a in own['decoded'].items()
    ]
  rate = own['tokens'] / own['seconds']
  cfg = sizes.SIZES[job['size']]
  blocks = table.numbers_of(cfg, 'layers/')
  work = blocks * own['tokens']
  work += cfg.vocab_size * cfg.embed_dim * own['targets']
  flops = (4 if job['parts'] == 'lora' else 6) * work
  cells = _measured(own, own['seconds'], rate) | {
    'MFU': f'{flops / own["seconds"] / peak:.1%}',
    'first': f'{own["first_step"]:.0f}',
  }
  if 'rate' in other:
    cells['x'] = f'{rate / other["rate"]:.2f}'
  return [(f'{name}, {own["rows"]} rows', cells)]


def _measured(own, seconds, rate):
  """The cells that training and decoding have; seconds are of a step."""
  return {
    'ms': f'{seconds * 1e3:.2f}',
    'est. ms': f'{own["estimate"] * 1e3:.2f}' if own['estimate'] else '',
    'tokens/s': f'{rate:,.0f}',
    'peak': f'{own["peak"] / 1e9:.2f}',
    'plan': f'{own["planned"] / 1e9:.2f}',
  }


def _decoded_row(name, own, theirs):
  rate = own['units'] / own['seconds']
  cells = _measured(own, own['rows'] / rate, rate)
  if theirs:
    cells['x'] = f'{rate * theirs["seconds"] / theirs["units"]:.2f}'
  return f'decoding, sentences x beam {name}', cells


_COLUMNS = ('ms', 'est. ms', 'tokens/s', 'MFU', 'peak', 'plan', 'first', 'x')


def report(jobs: dict, answers: dict) -> str:
  """The table, of what there is."""
  roof = answers['roof']
  chip = targets.chip_of(roof['kind'])
  peak = chip.flops if chip else roof['product']
  out = [
    roof['device'],
    f'JAX {roof["jax"]}; best product {roof["product"] / 1e12:.1f} TFLOP/s, '
    f'MFU is of {peak / 1e12:.1f}',
    f'{"":36}' + ''.join(f'{c:>10}' for c in _COLUMNS),
  ]
  for name, *_ in CASES:
    if name not in answers:
      continue
    other = answers.get(f'{name}, transformers', {})
    for what, cells in rows_of(name, jobs[name], answers[name], other, peak):
      line = ''.join(f'{cells.get(c, ""):>10}' for c in _COLUMNS)
      out.append(f'{what:36}{cells.get("", line)}'.rstrip())
    if 'failed' in other:
      out.append(f'  transformers: {other["failed"]}')
  return '\n'.join(out)


def main(_):
  f, began = flags.FLAGS, time.monotonic()
  folder = pathlib.Path(f.work).absolute()
  shutil.rmtree(folder / 'compiled', ignore_errors=True)  # A cold start.
  folder.mkdir(parents=True, exist_ok=True)
  left = lambda: f.seconds - (time.monotonic() - began)  # noqa: E731
  answers = {'roof': ask(folder, {}, 'chip', 'roof', sys.executable, left())}
  if 'failed' in answers['roof']:
    sys.exit(f'the device does not answer: {answers["roof"]["failed"]}')
  print(answers['roof']['device'], flush=True)
  jobs, torch = make_jobs(folder, f.quick), torch_python()
  if torch is None:
    print('no torch here: transformers is not measured')
  for name, task, *_ in CASES:
    if f.only and not set(name.split()) & set(f.only):
      continue
    sides = [('', 'chip', task, sys.executable)]
    if torch and not name.endswith(('again', 'make train')):
      sides.append((', transformers', 'hf_chip', task, torch))
    for suffix, side, side_task, python in sides:
      answer = {'failed': 'no time left'}
      if left() > 20:
        answer = ask(folder, jobs[name], side, side_task, python, left())
      answers[name + suffix] = answer
      said = answer.get('failed', 'done')
      print(
        f'{time.monotonic() - began:4.0f} s  {name}{suffix}: {said}', flush=True
      )
      text = json.dumps(answers, indent=1)
      (folder / 'accelerator.json').write_text(text, encoding='utf-8')
  print('\n' + report(jobs, answers))


if __name__ == '__main__':
  flags.DEFINE_list('only', [], 'Words in the names of cases: 270m, decode, …')
  flags.DEFINE_float('seconds', 460, 'After these nothing is begun or kept.')
  flags.DEFINE_bool('quick', False, 'A tiny model, to try the script itself.')
  flags.DEFINE_string('work', 'runs/accelerator', 'Folder for what is made.')
  cli.run(main)
