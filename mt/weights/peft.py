"""LoRA factors as an adapter folder of PEFT's.

Files: github.com/huggingface/peft, adapter_config.json (LoraConfig) and
adapter_model.safetensors. PEFT computes W x + (lora_alpha / r) B A x with
A [r, in] and B [out, r], which are ours transposed.
"""

import json
import pathlib

import numpy as np

from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import hf


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  trained: lora.Flat,
  *,
  alpha: float,
  base: str,
  dtype: np.dtype = np.float32,
) -> None:
  """Writes what `peft.PeftModel.from_pretrained(base_model, folder)` reads.

  Args:
    folder: exists and is empty.
    cfg: the shape of the model that the factors belong to.
    trained: the factors of a run, `layers/q_lora_a` [N, in, R] and so on.
    alpha: their product is multiplied with alpha / R.
    base: path or name of the base model, as the adapter notes it.
    dtype: float32 or bfloat16, of the factors in the file.

  Raises:
    OSError: the disk is full or not writable.
  """
  rows = [
    row
    for row in parameters.table(cfg)
    if f'{row.path}_lora_a' in trained  # Not all may be trained.
  ]
  layers = {stack.name: stack.layers for stack in cfg.stacks()}
  tensors = {}
  for row in rows:
    for letter in 'AB':
      stacked = np.asarray(trained[f'{row.path}_lora_{letter.lower()}'])
      for i, x in zip(layers[row.stack], stacked, strict=True):
        module = f'base_model.model.model.layers.{i}.{row.hf}'
        tensors[f'{module}.lora_{letter}.weight'] = x.T.astype(dtype)
  hf.save(folder / 'adapter_model.safetensors', tensors)
  fields = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': trained[f'{rows[0].path}_lora_a'].shape[-1],
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'use_rslora': False,
    'use_dora': False,
    'target_modules': sorted({row.hf.split('.')[-1] for row in rows}),
  }
  (folder / 'adapter_config.json').write_text(
    json.dumps(fields, indent=2) + '\n', encoding='utf-8'
  )
