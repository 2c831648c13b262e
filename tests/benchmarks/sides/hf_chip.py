"""Hugging Face's side of `make accelerator`: on the device, in bfloat16.

With SDPA, which is what transformers takes by itself, and a fused AdamW.
"""

import contextlib
import time

import torch
import transformers

from tests.benchmarks.sides import hf
from tests.benchmarks.sides import side


def _model(job):
  made = transformers.AutoModelForCausalLM
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  how = {'dtype': torch.bfloat16, 'attn_implementation': 'sdpa'}
  if not job['random']:
    return made.from_pretrained(job['hf'], **how).to(device)
  shape = transformers.AutoConfig.from_pretrained(job['hf'])
  return made.from_config(shape, **how).to(device)


def _train(job):
  """Tokens/s with fused AdamW, in the largest batches that fit."""
  for size in (64, 32, 16, 8, 4):
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
      return _timed(job, size) | {'batch': size}
    torch.cuda.empty_cache()
  return {'failed': 'no batch fits'}


def _timed(job, size):
  model, rate = _model(job), job['learning_rate']
  if job['parts'] == 'lora':
    model, optimizer = hf.adapted(job, model)
  else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
  model.train()
  pairs = sorted(job['pairs'], key=lambda p: len(p[0]) + len(p[1]))
  groups = side.groups(pairs, size)

  def step(pairs):
    tensors = {k: v.to(model.device) for k, v in hf.batch(pairs).items()}
    optimizer.zero_grad()
    loss = model(**tensors).loss
    loss.backward()
    optimizer.step()
    return loss.item()  # Waits for it.

  step(groups[-1])  # The widest: whether it fits.
  first = time.time() - job['started']
  step(groups[0])
  start = time.perf_counter()
  for pairs in groups:
    step(pairs)
  seconds = time.perf_counter() - start
  tokens = sum(len(p) + len(t) for p, t in job['pairs'])
  return {'rate': tokens / seconds, 'first_step': first, 'peak': _peak()}


def _peak():
  if torch.cuda.is_available():
    return torch.cuda.max_memory_allocated()
  return side.peak_bytes()


def _decode(job):
  """As in chip.py; what does not fit is left out."""
  answers, model = {}, _model(job)
  for size, beam in job['batches']:
    part = {'batch': size, 'prompts': job['prompts'][: 4 * size]}
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
      answers[f'{size}x{beam}'] = hf.continued(job | part, beam, model)
    torch.cuda.empty_cache()
  return {'decoded': answers}


if __name__ == '__main__':
  side.main({'train': _train, 'decode': _decode})
