"""Hugging Face's side of `make bench`: transformers and PEFT on PyTorch.

Pairs in batches, each as wide as its longest, only targets labelled.
"""

import time

import torch
import transformers

from tests.benchmarks.sides import side


def _model(job):
  torch.set_num_threads(job['threads'])
  return transformers.AutoModelForCausalLM.from_pretrained(
    job['hf'], dtype=torch.float32
  )


def batch(pairs):
  """Padded on the right, with labels for targets alone."""
  width = max(len(p) + len(t) for p, t in pairs)
  shape = len(pairs), width
  ids = torch.zeros(shape, dtype=torch.long)
  mask, labels = torch.zeros_like(ids), torch.full(shape, -100)
  for row, (prompt, target) in enumerate(pairs):
    size = len(prompt) + len(target)
    ids[row, :size] = torch.tensor(prompt + target)
    mask[row, :size] = 1
    labels[row, len(prompt) : size] = torch.tensor(target)
  return {'input_ids': ids, 'attention_mask': mask, 'labels': labels}


def _train(job, model, optimizer):
  model.train()

  def take(tensors):
    optimizer.zero_grad()
    loss = model(**tensors).loss
    loss.backward()
    optimizer.step()
    return loss.item() * int((tensors['labels'] != -100).sum())

  pairs = side.groups(job['pairs'], job['train_batch'])
  return side.train(job, take, [batch(p) for p in pairs])


def _full(job):
  model = _model(job)
  optimizer = torch.optim.SGD(model.parameters(), lr=job['learning_rate'])
  return _train(job, model, optimizer)


def adapted(job, model=None):
  """The model with low-rank factors, and their optimizer."""
  import peft  # Not wherever torch is.

  config = peft.LoraConfig(
    r=16, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM'
  )
  model = peft.get_peft_model(model or _model(job), config)
  trained = [p for p in model.parameters() if p.requires_grad]
  return model, torch.optim.AdamW(
    trained, lr=job['learning_rate'], weight_decay=0.0
  )


def _lora(job):
  return _train(job, *adapted(job))


def continued(job, beam, model=None):
  """In batches of prompts of like length, filled up on the left."""
  model = (model or _model(job)).eval()
  prompts = job['prompts']
  order = sorted(
    range(len(prompts)),
    key=lambda i: len(prompts[i]['tokens']) + prompts[i]['limit'],
  )

  def generate(numbers, limit=None):
    width = max(len(prompts[i]['tokens']) for i in numbers)
    ids = torch.zeros((len(numbers), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(numbers):
      tokens = prompts[i]['tokens']
      ids[row, width - len(tokens) :] = torch.tensor(tokens)
      mask[row, width - len(tokens) :] = 1
    made = model.generate(
      input_ids=ids.to(model.device),
      attention_mask=mask.to(model.device),
      do_sample=False,
      num_beams=beam,
      length_penalty=1.0,
      max_new_tokens=limit or max(prompts[i]['limit'] for i in numbers),
      eos_token_id=job['stops'],
      pad_token_id=0,
    )
    return made[:, width:].tolist()

  batches = side.groups(order, job['batch'])
  generate(batches[0], limit=2)
  start = time.perf_counter()
  found = [generate(numbers) for numbers in batches]
  seconds = time.perf_counter() - start
  made = {}
  for numbers, rows in zip(batches, found, strict=True):
    made |= dict(zip(numbers, rows, strict=True))
  return side.decoded(job, seconds, [made[i] for i in range(len(prompts))])


if __name__ == '__main__':
  side.main(
    {
      'full': _full,
      'lora': _lora,
      'greedy': lambda job: continued(job, 1),
      'beam': lambda job: continued(job, job['beam']),
    }
  )
