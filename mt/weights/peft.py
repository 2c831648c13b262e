"""LoRA factors as an adapter folder of PEFT's.

Files: github.com/huggingface/peft, adapter_config.json (LoraConfig) and
adapter_model.safetensors. PEFT computes W x + (lora_alpha / r) B A x with
A [r, in] and B [out, r], which are ours turned.
"""

import json
import pathlib

import numpy as np

from mt.gemma import lora
from mt.gemma import sizes
from mt.weights import hf
from mt.weights import safetensors_out


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
  names = hf.layer_names(cfg)
  factors = [
    n.removesuffix('_lora_a') for n in trained if n.endswith('_lora_a')
  ]
  rank = trained[f'{factors[0]}_lora_a'].shape[-1]

  def entry(path, layer, letter):
    stacked = trained[f'{path}_lora_{letter.lower()}']
    _, rows, columns = stacked.shape
    module = names[path.removeprefix('layers/')]
    return safetensors_out.Entry(
      f'base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight',
      (columns, rows),
      lambda: np.asarray(stacked[layer]).T.astype(dtype, copy=False),
    )

  safetensors_out.write_file(
    folder / 'adapter_model.safetensors',
    [
      entry(path, layer, letter)
      for layer in range(cfg.num_layers)
      for path in factors
      for letter in 'AB'
    ],
    np.dtype(dtype),
  )
  modules = {names[p.removeprefix('layers/')].split('.')[-1] for p in factors}
  fields = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'use_rslora': False,
    'use_dora': False,
    'target_modules': sorted(modules),
  }
  (folder / 'adapter_config.json').write_text(
    json.dumps(fields, indent=2) + '\n', encoding='utf-8'
  )
