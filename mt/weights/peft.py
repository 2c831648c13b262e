"""LoRA factors as an adapter folder of PEFT's, out and in.

Files: github.com/huggingface/peft, adapter_config.json (LoraConfig) and
adapter_model.safetensors. PEFT computes W x + (lora_alpha / r) B A x with
A [r, in] and B [out, r], which are ours transposed.
"""

import dataclasses
import pathlib
import re

import numpy as np
import safetensors.numpy

from mt.base import errors
from mt.base import files
from mt.base import foreign
from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import hf
from mt.weights import hf_config

_CONFIG, _TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = re.compile(r'(.*)layers\.\d+\..*\.lora_')
# What a field must be, where it says something. Any other that is set would be
# another function than y = W x + (lora_alpha / r) B A x, or another base.
_ONLY = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal'),
}
# Fields that change nothing of that, or that are read.
_FREE = re.compile(
  'r|lora_(alpha|dropout)|(target|exclude)_modules|task_type|revision|'
  'base_model_name_or_path|inference_mode|auto_mapping|peft_version|'
  'megatron_core|qalora_group_size|(eva|loftq|runtime)_config'
)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What an adapter folder has.

  Attributes:
    rank: R.
    alpha: the product of the factors is multiplied with alpha / R.
    base: the model that it belongs to, as it says itself.
    dropout: of the factors in the training that made it; not part of W.
    factors: float32, as lora.partition has them.
  """

  rank: int
  alpha: float
  base: str
  dropout: float
  factors: lora.Flat

  @property
  def targets(self) -> list[str]:
    """The matrices that have factors."""
    paths = (k for k in self.factors if k.endswith('_lora_a'))
    names = (k.rpartition('/')[2].removesuffix('_lora_a') for k in paths)
    return list(dict.fromkeys(names))


def read(folder: pathlib.Path, cfg: sizes.ModelConfig) -> Adapter:
  """Reads what PEFT, or `write`, has written.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    cfg: the shape of the base.

  Raises:
    errors.UserError: damaged, not plain LoRA, or of another model.
  """
  path = folder / _CONFIG
  fields = hf_config.read_json(path)
  for key, value in fields.items():
    allowed = _ONLY.get(key, ())
    if value and not _FREE.fullmatch(key) and value not in allowed:
      raise errors.UserError(
        f'{path}: {key} is {str(value)[:60]}, {allowed or "nothing"} expected; '
        'only plain LoRA on the matrices of the layers can be read: merge the '
        'adapter with PEFT and give the whole model.'
      )
  factors = _stacked(folder / _TENSORS, cfg, fields['r'])
  return Adapter(
    rank=fields['r'],
    alpha=float(fields['lora_alpha']),
    base=str(fields.get('base_model_name_or_path')),
    dropout=float(fields.get('lora_dropout', 0.0)),
    factors=factors,
  )


def _stacked(path, cfg, rank):
  """The factors of all layers, checked and stacked."""
  if not path.exists():
    for pickle in path.parent.glob('*.bin'):
      foreign.refuse(pickle)
  with hf.reading(path):
    tensors = safetensors.numpy.load_file(path)
  given = '\n'.join(tensors)
  found = _PREFIX.search(given)
  prefix = found[1] if found else ''
  shapes, out = parameters.shapes(cfg), {}
  layers = {stack.name: stack.layers for stack in cfg.stacks()}
  for row in parameters.table(cfg):
    if not row.lora or f'.{row.hf}.lora_' not in given:
      continue
    _, fan_in, fan_out = shapes[row.path]
    for letter, shape in ('A', (rank, fan_in)), ('B', (fan_out, rank)):
      names = [_name(prefix, i, row, letter) for i in layers[row.stack]]
      if lacking := [name for name in names if name not in tensors]:
        raise errors.UserError(
          f'{path}: no tensor {lacking[0]!r}, but others of {row.hf}; the '
          'adapter is of another model, has not all layers, or was not written '
          "by PEFT's save_pretrained."
        )
      xs = [tensors.pop(name) for name in names]
      if any(x.shape != shape for x in xs):
        raise errors.UserError(
          f'{path}: the factors {letter} of {row.hf} are not {len(xs)} of '
          f'the shape {shape}; the adapter is of another model.'
        )
      stacked = np.stack([x.T for x in xs]).astype(np.float32)
      out[f'{row.path}_lora_{letter.lower()}'] = stacked
  if tensors or not out:
    raise errors.UserError(
      f'{path}: {next(iter(tensors), "nothing")} is beside the factors of this '
      'Gemma; merge the adapter with PEFT and give the whole model.'
    )
  return out


def _name(prefix, layer, row, letter):
  return f'{prefix}layers.{layer}.{row.hf}.lora_{letter}.weight'


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  trained: lora.Flat,
  *,
  alpha: float,
  base: str,
  dtype: str = 'float32',
  multimodal: bool = False,
) -> None:
  """Writes what `peft.PeftModel.from_pretrained(base_model, folder)` reads.

  PEFT finds matrices by their names in the base, and passes over factors of
  names that the base has not without an error.

  Args:
    folder: exists and is empty.
    cfg: the shape of the model that the factors belong to.
    trained: the factors of a run, `layers/q_lora_a` [N, in, R] and so on.
    alpha: their product is multiplied with alpha / R.
    base: path or name of the base model, as the adapter notes it.
    dtype: float32 or bfloat16, of the factors in the file.
    multimodal: whether that base has other parts beside the text model.

  Raises:
    OSError: the disk is full or not writable.
  """
  rows = [
    row
    for row in parameters.table(cfg)
    if f'{row.path}_lora_a' in trained  # Not all may be trained.
  ]
  layers = {stack.name: stack.layers for stack in cfg.stacks()}
  tensors, text = {}, 'model.language_model.' if multimodal else 'model.'
  for row in rows:
    for letter in 'AB':
      stacked = np.asarray(trained[f'{row.path}_lora_{letter.lower()}'])
      for i, x in zip(layers[row.stack], stacked, strict=True):
        name = _name(f'base_model.model.{text}', i, row, letter)
        tensors[name] = x.T.astype(dtype)
  hf.save(folder / _TENSORS, tensors)
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
  if multimodal:  # Its towers have matrices of the same names.
    fields['exclude_modules'] = rf'(?!{re.escape(text)}).*'
  files.write_json(folder / _CONFIG, fields)
