"""Hugging Face folders of Gemma 1, 2 and 3: in and out.

A folder has config.json, one or several .safetensors files and a tokenizer.
Matrices are stored as [out, in], norm weights without the 1 added. Of the
multimodal Gemma 3 the text model is read, whatever the prefix of its names; the
vision tower is not touched. Pickles (pytorch_model.bin) are refused.

Files: github.com/huggingface/safetensors#format; names: transformers,
modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes  # noqa: F401  Gives numpy the bfloat16 of safetensors.
import numpy as np
import safetensors

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import model
from mt.gemma import sizes
from mt.weights import hf_config
from mt.weights import hf_tokenizer
from mt.weights import load
from mt.weights import safetensors_out

_EMBEDDING = 'embed_tokens.weight'
_OUTER_NAMES = {'embedding': _EMBEDDING, 'final_norm': 'norm.weight'}
_DTYPES = ('F32', 'BF16', 'F16')
_INDEX = 'model.safetensors.index.json'


def layer_names(cfg: sizes.ModelConfig) -> dict[str, str]:
  """Our name of a layer's tensor -> transformers' module in that layer."""
  names = {
    'attn_norm': 'input_layernorm',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'o': 'self_attn.o_proj',
    'ffw_norm': 'post_attention_layernorm',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
  }
  if cfg.post_norms:
    names |= {
      'post_attn_norm': 'post_attention_layernorm',
      'ffw_norm': 'pre_feedforward_layernorm',
      'post_ffw_norm': 'post_feedforward_layernorm',
    }
  if cfg.qk_norm:
    names |= {'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm'}
  return names


@dataclasses.dataclass(frozen=True)
class Folder:
  """An opened folder.

  Attributes:
    path: of the folder.
    config: the text model's shape.
    prefix: of the text model's names, such as `model.`.
    tensors: name -> (its opened file, that file's path).
  """

  path: pathlib.Path
  config: sizes.ModelConfig
  prefix: str
  tensors: dict[str, tuple[Any, pathlib.Path]]


def is_folder(path: pathlib.Path) -> bool:
  """Whether a path looks like a folder of Hugging Face's."""
  return path.is_dir() and (
    (path / 'config.json').exists()
    or any(path.glob('*.safetensors'))
    or any(path.glob('pytorch_model*.bin'))
  )


def open_folder(path: pathlib.Path) -> Folder:
  """Reads config.json and the headers; no tensor yet.

  Raises:
    errors.UserError: a file is missing, damaged or hostile, the model is no
      Gemma, or its tensors are not those that config.json promises.
  """
  if not (path / 'config.json').is_file():
    raise errors.UserError(
      f'{path}: no config.json beside the weights; fetch the whole folder.'
    )
  config = hf_config.read(path / 'config.json')
  tensors = _open_files(path)
  prefixes = [n.removesuffix(_EMBEDDING) for n in tensors if _is_embedding(n)]
  if len(prefixes) != 1:
    raise errors.UserError(
      f'{path}: {len(prefixes)} tensors end with {_EMBEDDING}, one expected; '
      'the folder is not a complete Gemma.'
    )
  folder = Folder(path, config, prefixes[0], tensors)
  _check(folder)
  return folder


def _is_embedding(name):
  return name == _EMBEDDING or name.endswith('.' + _EMBEDDING)


def _open_files(path):
  """Name -> (opened file, path); files of vision alone stay closed."""
  index = path / _INDEX
  if (path / 'model.safetensors').exists() or not index.exists():
    files = [path / 'model.safetensors']
    if not files[0].exists():
      files = sorted(path.glob('*.safetensors'))
    if not files:
      raise errors.UserError(_no_weights(path))
    promised = None
  else:
    promised = hf_config.read_json(index).get('weight_map')
    if not isinstance(promised, dict):
      raise errors.UserError(
        f'{index}: no weight_map; the index is damaged: fetch it again.'
      )
    promised = {n: f for n, f in promised.items() if not _is_vision(n)}
    files = sorted({_beside(index, file) for file in promised.values()})
  tensors = {}
  for file in files:
    opened = _open_file(file)
    for name in opened.keys():  # noqa: SIM118  It is no dict.
      if promised is not None and promised.get(name) != file.name:
        continue
      if name in tensors:
        raise errors.UserError(
          f'{file}: {name} stands in {tensors[name][1].name} as well; remove '
          'the file that does not belong to the model.'
        )
      tensors[name] = opened, file
  for name in promised or ():
    if name not in tensors:
      raise errors.UserError(
        f'{path / promised[name]}: no tensor {name!r}, which {_INDEX} places '
        'there; fetch the folder again.'
      )
  return tensors


def _is_vision(name):
  return name.split('.')[0] in ('vision_tower', 'multi_modal_projector') or (
    name.startswith(('model.vision_tower.', 'model.multi_modal_projector.'))
  )


def _beside(index, file):
  """A plain file name beside the index; never a way out of the folder."""
  if (
    not isinstance(file, str)
    or pathlib.PureWindowsPath(file).name != file  # It knows / too.
    or not file.endswith('.safetensors')
    or not file.isprintable()
  ):
    raise errors.UserError(
      f'{index}: weight_map names the file {str(file)[:60]!r}, a plain name '
      'that ends with .safetensors expected; fetch it from a source you trust.'
    )
  return index.parent / file


def _open_file(path):
  try:
    # pread: pages of a mapped file would count as this process's memory.
    return safetensors.safe_open(path, framework='np', backend='pread')
  except OSError as e:
    raise errors.UserError(
      f'{path}: cannot read it ({e.strerror or e}); fetch the folder again.'
    ) from None
  except safetensors.SafetensorError as e:
    raise errors.UserError(
      f'{path}: not a whole safetensors file '
      f'({" ".join(str(e).split())[:160]}); fetch it again.'
    ) from None


def _no_weights(path):
  if any(path.glob('*.bin')):
    return (
      f'{path}: only pytorch_model.bin found, a pickle, which can run code '
      'when it is read; take the safetensors of the model, or let transformers '
      'write them where you trust it: '
      'AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).'
    )
  return f'{path}: no .safetensors file in it; fetch the whole folder.'


def _places(folder) -> Iterator[tuple[str, int | None, str, model.Params]]:
  """(our name, layer or None, name in the file, our shape) of all tensors."""
  cfg = folder.config
  shapes = model.param_shapes(cfg)
  for ours, name in _OUTER_NAMES.items():
    yield ours, None, folder.prefix + name, shapes[ours]
  for i in range(cfg.num_layers):
    for ours, name in layer_names(cfg).items():
      full = f'{folder.prefix}layers.{i}.{name}.weight'
      yield ours, i, full, shapes['layers'][ours][1:]


def _turned(ours, shape):
  return len(shape) == 2 and ours != 'embedding'


def _check(folder):
  """All names and shapes, before anything is allocated."""
  known = set()
  for ours, _, name, shape in _places(folder):
    if name not in folder.tensors:
      raise errors.UserError(
        f'{folder.path}: no tensor {name!r}; the folder is not a complete '
        'Gemma.'
      )
    known.add(name)
    opened, path = folder.tensors[name]
    header = opened.get_slice(name)
    dtype, found = header.get_dtype(), tuple(header.get_shape())
    if dtype not in _DTYPES:
      raise errors.UserError(
        f'{path}: {name} is of type {str(dtype)[:20]}, one of '
        f'{", ".join(_DTYPES)} expected; take weights that are not quantised.'
      )
    wanted = shape[::-1] if _turned(ours, shape) else shape
    if found != wanted:
      raise errors.UserError(
        f'{path}: {name} has the shape {found}, config.json promises {wanted}; '
        'the files do not belong together.'
      )
  for name, (_, path) in folder.tensors.items():
    rest = name.removeprefix(folder.prefix)
    stray = name.startswith(folder.prefix) and rest.startswith('layers.')
    # Old files have the RoPE rates, which follow from config.json.
    if stray and name not in known and not name.endswith('rotary_emb.inv_freq'):
      raise errors.UserError(
        f'{path}: {name} is no part of the Gemma that config.json describes; '
        'merge an adapter first, or take weights that are not quantised.'
      )


def read_tokenizer(folder: Folder) -> tokenizer.Tokenizer:
  """tokenizer.model or, where there is none, tokenizer.json.

  Raises:
    errors.UserError: neither is there, or it is damaged.
  """
  if (folder.path / 'tokenizer.model').exists():
    return tokenizer.from_file(folder.path / 'tokenizer.model')
  if not (folder.path / 'tokenizer.json').exists():
    raise errors.UserError(
      f'{folder.path}: neither tokenizer.model nor tokenizer.json in it; fetch '
      'the whole folder, or set weights.tokenizer.'
    )
  path = folder.path / 'tokenizer.json'
  return hf_tokenizer.read(path, folder.config.vocab_size)


def read_params(folder: Folder) -> model.Params:
  """The float32 parameters, read tensor by tensor."""
  names = {(ours, i): name for ours, i, name, _ in _places(folder)}

  def leaf(ours, layer, shape):
    name = names[ours, layer]
    opened, path = folder.tensors[name]
    try:
      x = opened.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as e:
      raise errors.UserError(
        f'{path}: cannot read {name} ({" ".join(str(e).split())[:160]}); fetch '
        'it again.'
      ) from None
    return x.T if _turned(ours, shape) else x

  return load.stack(folder.config, leaf)


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: model.Params,
  tok: tokenizer.Tokenizer,
  dtype: np.dtype = np.float32,
) -> None:
  """Writes what `open_folder` and transformers read.

  Args:
    folder: exists and is empty; see mt/export for the rest of the care.
    cfg: the model's shape.
    params: without low-rank factors.
    tok: its tokenizer.
    dtype: float32 or bfloat16, of all weights in the files.

  Raises:
    OSError: the disk is full or not writable.
  """
  names, shapes = layer_names(cfg), model.param_shapes(cfg)

  def entry(ours, layer, shape, name):
    def get():
      x = params['layers'][ours][layer] if layer is not None else params[ours]
      x = np.asarray(x).astype(dtype, copy=False)
      return x.T if _turned(ours, shape) else x

    shape = shape[::-1] if _turned(ours, shape) else shape
    return safetensors_out.Entry(f'model.{name}', shape, get)

  entries = [
    entry(ours, None, shapes[ours], name) for ours, name in _OUTER_NAMES.items()
  ]
  for i in range(cfg.num_layers):
    for ours, name in names.items():
      shape = shapes['layers'][ours][1:]
      entries.append(entry(ours, i, shape, f'layers.{i}.{name}.weight'))
  safetensors_out.write(folder, entries, dtype)
  ids = {
    'pad_token_id': tok.pad_id,
    'bos_token_id': tok.bos_id,
    'eos_token_id': tok.eos_id,
  }
  hf_config.write(folder / 'config.json', cfg, dtype, ids)
  (folder / 'generation_config.json').write_text(
    json.dumps(ids | {'do_sample': False}, indent=2) + '\n'
  )
  hf_tokenizer.write(folder, tok)
