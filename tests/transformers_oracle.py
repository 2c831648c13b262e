"""What transformers and PEFT make of a folder, in an environment of its own.

  python transformers_oracle.py JOB.json

JOB names `folder`, `adapter` (or null), `texts`, `tokens` [L], `new_tokens` and
`out`, a .npz for the logits [L, V] of `tokens` and the greedy continuation of
the first text; beside it, in .json, the ids of all texts.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def main(path):
  job = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  tokenizer = transformers.AutoTokenizer.from_pretrained(job['folder'])
  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['folder'], dtype=torch.float32, attn_implementation='eager'
  )
  if job['adapter']:
    import peft

    model = peft.PeftModel.from_pretrained(model, job['adapter'])
  model.eval()
  with torch.no_grad():
    logits = model(torch.tensor([job['tokens']])).logits[0].numpy()
    prompt = tokenizer(job['texts'][:1], return_tensors='pt')
    made = model.generate(
      **prompt, max_new_tokens=job['new_tokens'], do_sample=False
    )[0, prompt['input_ids'].shape[1] :]
  out = pathlib.Path(job['out'])
  np.savez(out, logits=logits)
  answer = {
    'ids': tokenizer(job['texts'])['input_ids'],
    'made': made.tolist(),
    'made_text': tokenizer.decode(made, skip_special_tokens=True),
    'round_trip': [
      tokenizer.decode(ids, skip_special_tokens=True)
      for ids in tokenizer(job['texts'])['input_ids']
    ],
    'model': type(model).__name__,
    'vocab': len(tokenizer),
  }
  out.with_suffix('.json').write_text(json.dumps(answer), encoding='utf-8')


if __name__ == '__main__':
  main(sys.argv[1])
