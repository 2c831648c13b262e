"""The fine-tuning of PEFT, for tests/benchmarks/quality.py.

As its side of the bench, but with clipped gradients and a schedule.

Of the job it reads pairs, train_batch, learning_rate, threads, hf (see side.py)
and

  seconds  of training, from the start of the process
  out      folder of the merged model
"""

import shutil
import time

import torch

from tests.benchmarks.sides import hf
from tests.benchmarks.sides import side


def _finetune(job):
  """For job['seconds']; the merged model goes to job['out'].

  The learning rate grows for a tenth of them and falls to 0 at their end.
  """
  model, optimizer = hf.adapted(job)
  model.train()
  targets = steps = 0
  for pairs in side.groups(job['pairs'], job['train_batch']):
    spent = (time.time() - job['started']) / job['seconds']
    if spent >= 1:
      break
    for group in optimizer.param_groups:
      group['lr'] = job['learning_rate'] * min(10 * spent, (1 - spent) / 0.9)
    optimizer.zero_grad()
    model(**hf.batch(pairs)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    targets, steps = targets + sum(len(t) for _, t in pairs), steps + 1
  seconds = time.time() - job['started']
  shutil.copytree(job['hf'], job['out'])  # The tokenizer too.
  model.merge_and_unload().save_pretrained(job['out'])
  return {'targets': targets, 'steps': steps, 'seconds': seconds}


if __name__ == '__main__':
  side.main({'finetune': _finetune})
