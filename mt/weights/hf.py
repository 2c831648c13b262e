"""Hugging Face folders of Gemma 1 to 4: in and out.

A folder has config.json, one or several .safetensors files and a tokenizer.
Matrices are stored as [out, in], norm weights without the 1 added. Of the
multimodal ones the text model is read, whatever the prefix of its names; the
vision tower is not touched. Pickles (pytorch_model.bin) are refused.

Files: github.com/huggingface/safetensors#format; names: transformers,
modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py.
"""

from collections.abc import Mapping
import dataclasses
import errno
import json
import math
import pathlib
import re
from typing import Any

import chex
import ml_dtypes  # noqa: F401  Gives numpy the bfloat16 of safetensors.
import numpy as np
import safetensors
import safetensors.numpy

from mt.base import errors
from mt.base import foreign
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import hf_config
from mt.weights import hf_tokenizer
from mt.weights import kept
from mt.weights import load

_EMBEDDING = 'embed_tokens.weight'
# Tensors of other parts, and the RoPE rates of old files, which follow from
# config.json.
_OTHER_PARTS = re.compile(
  r'(model\.)?(vision_tower|vision_embedder|multi_modal_projector|audio_tower'
  r'|embed_vision|embed_audio)\..*|.*rotary_emb\.inv_freq'
)
_HEADS = ('lm_head.weight', 'language_model.lm_head.weight')
_DTYPES = ('F32', 'BF16', 'F16')
_INDEX = 'model.safetensors.index.json'
_SHARD_BYTES = 5 * 10**9  # A file's size at most, as on the Hub.


def _places(cfg, prefix) -> list[load.Place]:
  """All tensors of the text model, by transformers' names."""

  def name(row, layer):
    at = '' if layer is None else f'layers.{layer}.'
    # A layer's scale is no parameter of theirs, but a buffer.
    return f'{prefix}{at}{row.hf}{"" if row.shape == "N1" else ".weight"}'

  return load.places(cfg, name)


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
    errors.UserError: a file is missing or damaged, the model is no Gemma, or
      its tensors are not those that config.json promises.
  """
  if not (path / 'config.json').is_file():
    raise errors.UserError(
      f'{path}: no config.json beside the weights; fetch the whole folder.'
    )
  config = hf_config.read(path / 'config.json')
  tensors = _open_files(path)
  prefixes = [
    n.removesuffix(_EMBEDDING)
    for n in tensors
    if n == _EMBEDDING or n.endswith('.' + _EMBEDDING)
  ]
  if len(prefixes) != 1:
    raise errors.UserError(
      f'{path}: {len(prefixes)} tensors end with {_EMBEDDING}, one expected; '
      'the folder is not a complete Gemma.'
    )
  if not hf_config.is_tied(path / 'config.json') and not (
    tensors.keys() & set(_HEADS)
  ):
    raise errors.UserError(
      f'{path / "config.json"}: tie_word_embeddings is false, and no '
      f'{_HEADS[0]} is in the weights; fetch the whole folder.'
    )
  folder = Folder(path, config, prefixes[0], tensors)
  load.check(path, _places(config, folder.prefix), _shapes(folder))
  return folder


def _open_files(path):
  """Name -> (opened file, path); files of vision alone stay closed."""
  index = path / _INDEX
  if (path / 'model.safetensors').exists():
    files = [path / 'model.safetensors']
  elif index.exists():
    files = _files_of_index(index)
  else:
    files = sorted(path.glob('*.safetensors'))
  if not files and any(path.glob('*.bin')):
    raise errors.UserError(
      f'{path}: only pytorch_model.bin found, a pickle, which can run code '
      'when it is read; take the safetensors of the model, or let transformers '
      'write them where you trust it: '
      'AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).'
    )
  if not files:
    raise errors.UserError(
      f'{path}: no .safetensors file in it; fetch the whole folder.'
    )
  tensors = {}
  for file in files:
    opened = open_file(file)
    for name in opened.keys():  # noqa: SIM118  It is no dict.
      if name in tensors:
        raise errors.UserError(
          f'{file}: {name} stands in {tensors[name][1].name} as well; remove '
          'the file that does not belong to the model.'
        )
      tensors[name] = opened, file
  return tensors


def _files_of_index(index):
  """Plain file names beside the index; never a way out of the folder."""
  weight_map = hf_config.read_json(index).get('weight_map')
  if not isinstance(weight_map, dict):
    raise errors.UserError(
      f'{index}: no weight_map; the index is damaged: fetch it again.'
    )
  files = set()
  for name, file in weight_map.items():
    if _OTHER_PARTS.fullmatch(name):
      continue
    # A Windows path knows both kinds of slashes, and drives.
    plain = isinstance(file, str) and pathlib.PureWindowsPath(file).name == file
    if not plain or not file.endswith('.safetensors'):
      raise errors.UserError(
        f'{index}: weight_map names the file {str(file)[:60]!r}, a plain name '
        'that ends with .safetensors expected; fetch it from a source you '
        'trust.'
      )
    files.add(index.parent / file)
  return sorted(files)


def open_file(path: pathlib.Path) -> Any:
  """A safetensors file, of which no tensor is read yet.

  Raises:
    errors.UserError: missing, or damaged.
  """
  try:
    # pread: pages of a mapped file would count as this process's memory.
    return safetensors.safe_open(path, framework='np', backend='pread')
  except (OSError, safetensors.SafetensorError) as e:
    raise _unreadable(path, e) from e


def read_tensor(
  opened: Any, path: pathlib.Path, name: str, *rows: int
) -> np.ndarray:
  """A tensor of an opened file, or its rows from the first to before the last.

  Raises:
    errors.UserError: the file cannot be read.
  """
  try:
    if rows:
      return opened.get_slice(name)[slice(*rows)]
    return opened.get_tensor(name)
  except (OSError, safetensors.SafetensorError) as e:
    raise _unreadable(path, e) from e


def _unreadable(path, e):
  if path.is_file():
    foreign.refuse(path, foreign.SAFETENSORS)
  return errors.UserError(
    f'{path}: not a whole safetensors file ({" ".join(str(e).split())[:160]}); '
    'fetch it again.'
  )


def _shapes(folder):
  """Name -> shape of the text model's tensors, none of them quantised."""
  out, cfg = {}, folder.config
  own = cfg.num_layers - cfg.sharing_layers
  # Published files have what layers that share keys and values never read.
  unread = tuple(
    f'{folder.prefix}layers.{n}.self_attn.{x}'
    for n in range(own, cfg.num_layers)
    for x in ('k_', 'v_')
  )
  for name, (opened, path) in folder.tensors.items():
    other = _OTHER_PARTS.fullmatch(name) or name.startswith(unread)
    if other or name in _HEADS:
      continue
    header = opened.get_slice(name)
    if header.get_dtype() not in _DTYPES:
      raise errors.UserError(
        f'{path}: {name} is of type {header.get_dtype()}, one of '
        f'{", ".join(_DTYPES)} expected; take weights that are not quantised.'
      )
    out[name] = tuple(header.get_shape())
  return out


def read_tokenizer(folder: Folder) -> tokenizer.Tokenizer:
  """See hf_tokenizer.read_folder."""
  return hf_tokenizer.read_folder(folder.path, folder.config.vocab_size)


def read_params(
  folder: Folder, key: chex.PRNGKey, keep: kept.Keep = kept.FLOAT32
) -> tuple[parameters.Params, int]:
  """The parameters, read tensor by tensor.

  Args:
    folder: opened.
    key: of the initial values of what a fork has added and the files lack.
    keep: their format and place.

  Returns:
    The parameters, and the CRC-32 of all of them as float32.

  Raises:
    errors.UserError: a file cannot be read.
  """

  def part(name, *rows):
    return read_tensor(*folder.tensors[name], name, *rows)

  def get(place):
    x = part(place.name)
    return x.T if place.row.transposed else x

  cfg, wanted, found = (
    folder.config,
    _places(folder.config, folder.prefix),
    _shapes(folder),
  )
  for head in folder.tensors.keys() & set(_HEADS):
    shape = tuple(folder.tensors[head][0].get_slice(head).get_shape())
    embedding = folder.prefix + _EMBEDDING
    shapes = found | {head: shape}
    load.check_head(folder.path, shapes, head, embedding, part)
  return load.read(cfg, folder.path, wanted, found, get, key, keep)


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tok: tokenizer.Tokenizer,
  dtype: np.dtype = np.float32,
  generation: Mapping[str, Any] | None = None,
  chat_template: str = '',
) -> None:
  """Writes what `open_folder` and transformers read.

  Args:
    folder: exists and is empty; see mt/export for the rest of the care.
    cfg: the model's shape.
    params: without low-rank factors.
    tok: its tokenizer.
    dtype: float32 or bfloat16, of all weights in the files.
    generation, chat_template: see write_serving.

  Raises:
    OSError: the disk is full or not writable.
  """
  flat = parameters.flatten(params)

  def tensor(place):
    x = flat[place.row.path]
    x = np.asarray(x if place.layer is None else x[place.layer])
    return (x.T if place.row.transposed else x).astype(dtype, copy=False)

  shards = _shards(_places(cfg, 'model.'), np.dtype(dtype).itemsize)
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f'model-{i:05}-of-{len(shards):05}.safetensors'
    file = 'model.safetensors' if len(shards) == 1 else file
    save(folder / file, {place.name: tensor(place) for place in shard})
    weight_map |= {place.name: file for place in shard}
  if len(shards) > 1:
    size = sum(x.size for x in flat.values()) * np.dtype(dtype).itemsize
    index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')
  hf_config.write(folder / 'config.json', cfg, dtype, _ids(tok))
  write_serving(folder, cfg, tok, generation or {}, chat_template)


def _ids(tok):
  return {
    'pad_token_id': tok.pad_id,
    'bos_token_id': tok.bos_id,
    'eos_token_id': sorted(tok.end_ids),
  }


def write_serving(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  tok: tokenizer.Tokenizer,
  generation: Mapping[str, Any],
  chat_template: str,
) -> None:
  """Writes what is not the model: the tokenizer, and how it is decoded.

  Args:
    folder: exists.
    cfg: the model's shape. Rows of its embedding without a piece are never
      generated.
    tok: its tokenizer.
    generation: fields of transformers' GenerationConfig, where a run has its
      own; greedy search, which all ends of a text end, without.
    chat_template: in Jinja; '' for none.

  Raises:
    OSError: the disk is full or not writable.
  """
  spare = list(range(tok.vocab_size, cfg.vocab_size))
  fields = _ids(tok) | ({'suppress_tokens': spare} if spare else {})
  fields |= {'do_sample': False} | generation
  (folder / 'generation_config.json').write_text(
    json.dumps(fields, indent=2) + '\n', 'utf-8'
  )
  hf_tokenizer.write(folder, tok, chat_template)


def _shards(places, itemsize):
  """The places of each file, which is as large as it may be."""
  shards, room = [[]], _SHARD_BYTES
  for place in places:
    nbytes = math.prod(place.shape) * itemsize
    if shards[-1] and nbytes > room:
      shards.append([])
      room = _SHARD_BYTES
    shards[-1].append(place)
    room -= nbytes
  return shards


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes one safetensors file.

  Raises:
    OSError: the disk is full or not writable.
  """
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  path.touch()
  mode = path.stat().st_mode
  try:
    # transformers looks for "format" before it opens the file.
    safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  except safetensors.SafetensorError as e:  # It is Rust's OSError.
    raise OSError(errno.EIO, str(e), str(path)) from e
  path.chmod(mode)  # The library's file is for its owner alone.
