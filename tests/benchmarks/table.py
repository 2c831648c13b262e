"""The tables of `make bench`, out of the answers of its sides.

tokens/s    training: targets; decoding: output, the end included
ours is     so many times as fast
of roof     training: useful FLOP/s over the best product of this machine;
            decoding: over what its products and its memory allow
memory      peak of the process over the bytes of the parameters, float32
first step  seconds from the start of the process until its first step is
            done: in the first round / in later ones, where programs compiled
            before are there for JAX
loss        mean over all targets, before training: has to agree
same        share of prompts with the same tokens as ours
"""

import math
import statistics

import numpy as np

from mt.gemma import parameters
from mt.gemma import sizes

Answers = dict[str, list[dict]]  # 'side.task' -> an answer a round.
_NAMES = {
  'ours': 'ours',
  'tutorial': "the tutorial's loop",
  'hf': 'transformers, PyTorch',
  'tunix': 'tunix',
  'llama': 'llama.cpp',
}
_TITLES = {
  'full': 'Training, all weights, SGD: targets',
  'lora': 'Training, LoRA of rank 16, AdamW: targets',
  'greedy': 'Decoding, greedy, batch of 16: output',
  'beam': 'Decoding, beam of 4: output',
}

_TRAINING = ('full', 'lora')
_COLUMNS = {  # By whether it is training.
  True: ('tokens/s', 'ours is', 'of roof', 'memory', 'first step', 'loss'),
  False: ('tokens/s', 'ours is', 'of roof', 'memory', 'seconds', 'same'),
}
_FORMAT = '{:42}{:>10}{:>10}{:>9}{:>9}{:>13}{:>9}'


def median(answers: list[dict], value) -> float | None:
  """Of what `value` gives for each answer that is one."""
  found = [value(a) for a in answers if 'failed' not in a]
  return statistics.median(found) if found else None


def speed(answers: list[dict]) -> float | None:
  return median(answers, lambda a: a['units'] / a['seconds'])


def numbers_of(cfg: sizes.ModelConfig, start: str = '') -> int:
  """Of all parameters whose path begins so."""
  shapes = parameters.shapes(cfg).items()
  return sum(math.prod(s) for path, s in shapes if path.startswith(start))


def useful_flops(cfg: sizes.ModelConfig, pairs, lora: bool) -> float:
  """FLOPs without which these pairs cannot be trained on.

  2 for each weight of the blocks and each token, 2 for each of the vocabulary
  and each target, forward; as much again for the gradient of activations; and
  again for the gradient of the weights, where they are trained. Attention's
  products and the low-rank factors (1.4 % of the weights) are not counted.
  """
  blocks = numbers_of(cfg, 'layers/')
  tokens = sum(len(p) + len(t) for p, t in pairs)
  targets = sum(len(t) for _, t in pairs)
  vocabulary = cfg.vocab_size * cfg.embed_dim
  return (4 if lora else 6) * (blocks * tokens + vocabulary * targets)


def decoding_roof(cfg, roof, batch, beam) -> float:
  """Output tokens/s of a batch whose rows are never idle.

  A step takes as long as reading the weights, or as its products, whichever is
  longer.
  """
  blocks = numbers_of(cfg, 'layers/')
  head = cfg.vocab_size * cfg.embed_dim
  rows = batch * beam
  reading = 4 * (blocks + head) / roof['bandwidth']
  products = 2 * rows * blocks / roof[f'block_{rows}']
  products += 2 * rows * head / roof[f'head_{rows}']
  return batch / max(reading, products)


def agreement(made: list[list[int]], theirs: list[list[int]]) -> float:
  """The share of prompts with the same continuation."""
  return float(np.mean([a == b for a, b in zip(made, theirs, strict=True)]))


def disagreements(answers: Answers) -> list[str]:
  """A line for each loss that is another than the first: of other pairs."""
  losses = {
    n: a['loss'] for n, all in answers.items() for a in all if 'loss' in a
  }
  (first, expected), *others = losses.items() or [(None, None)]
  return [
    f'{name}: its loss is {loss:.4f}, that of {first} {expected:.4f}.'
    for name, loss in others
    if abs(loss - expected) > 1e-3 * expected
  ]


def report(cfg: sizes.ModelConfig, job: dict, answers: Answers) -> str:
  """The tables, out of what there is."""
  out, roof = [], roof_of(answers)
  if roof:
    rates = ', '.join(f'{k} {v / 1e9:.0f}' for k, v in sorted(roof.items()))
    out += [f'The machine, in GFLOP/s and GB/s: {rates}', '']
  for task, title in _TITLES.items():
    names = [n for n in answers if n.endswith(f'.{task}')]
    if not names:
      continue
    cells = [title, *_COLUMNS[task in _TRAINING]]
    out.append(_FORMAT.format(*cells))
    for name in names:
      label = '  ' + _NAMES[name.split('.')[0]]
      failed = [a['failed'] for a in answers[name] if 'failed' in a]
      if len(failed) < len(answers[name]):
        cells = [label, *row(cfg, job, answers, name, roof)]
        out.append(_FORMAT.format(*cells).rstrip())
      if failed:
        out.append(f'{label}: {failed[0]}')
    out.append('')
  return '\n'.join(out)


def roof_of(answers: Answers) -> dict[str, float] | None:
  """Rates of the machine, medians over the rounds, by name."""
  good = [a for a in answers.get('roof.roof', ()) if 'failed' not in a]
  if not good:
    return None
  return {
    k: statistics.median(a[k] for a in good)
    for k in good[0]
    if k != 'peak_bytes'
  }


def row(cfg, job, answers: Answers, name: str, roof) -> list[str]:
  """The cells of a row; those that nothing is known of are empty."""
  task = name.split('.')[1]
  found, own = answers[name], answers.get(f'ours.{task}', ())
  good = [a for a in found if 'failed' not in a]
  rate, own_rate = speed(found), speed(own)
  share = None
  if roof and task in _TRAINING:
    flops = useful_flops(cfg, job['pairs'], task == 'lora')
    share = flops / good[0]['units'] * rate / roof['gemm']
  elif roof:
    beam = job['beam'] if task == 'beam' else 1
    share = rate / decoding_roof(cfg, roof, job['batch'], beam)
  nbytes = 4 * numbers_of(cfg)
  peaks = [a['peak_bytes'] for a in good if a['peak_bytes']]
  cells = [
    f'{rate:.1f}',
    f'{own_rate / rate:.2f} x' if own_rate else '',
    f'{share:.0%}' if share else '',
    f'{statistics.median(peaks) / nbytes:.2f} x' if peaks else '',
  ]
  if task in _TRAINING:
    first, *later = [f'{a["first_step"]:.0f}' for a in good]
    later = f' / {sorted(later, key=float)[len(later) // 2]}' if later else ''
    return [*cells, f'{first}{later} s', f'{good[0]["loss"]:.4f}']
  cells.append(f'{median(found, lambda a: a["seconds"]):.0f} s')
  theirs = [a['made'] for a in own if 'failed' not in a]
  same = f'{agreement(good[0]["made"], theirs[0]):.0%}' if theirs else ''
  return [*cells, same]
