"""Hugging Face folders of Gemma 1 to 4: in and out.

A folder has config.json, one or several .safetensors files and a tokenizer.
Matrices are stored as [out, in], norm weights without the 1 added. Of the
multimodal ones the text model is read, whatever the prefix of its names; the
vision tower is not touched. Pickles (pytorch_model.bin) are refused.

Files: github.com/huggingface/safetensors#format; names: transformers,
modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import errno
import functools
import json
import math
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mt.base import errors
from mt.base import files
from mt.base import foreign
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import hf_config
from mt.weights import hf_config_out
from mt.weights import hf_tokenizer
from mt.weights import hf_tokenizer_out
from mt.weights import load

_EMBEDDING = 'embed_tokens.weight'
# Tensors of other parts, and the RoPE rates of old files, which follow from
# config.json.
_OTHER_PARTS = re.compile(
  r'(model\.)?(vision_tower|vision_embedder|multi_modal_projector|audio_tower'
  r'|embed_vision|embed_audio)\..*|.*rotary_emb\.inv_freq'
)
_HEADS = ('lm_head.weight', 'language_model.lm_head.weight')
_DTYPES = {'F32': '<f4', 'BF16': ml_dtypes.bfloat16, 'F16': '<f2'}
_FILES = 'model.safetensors', 'model-*-of-*.safetensors', '*.safetensors'
_SHARD_BYTES = 5 * 10**9  # A file's size at most, as on the Hub.


def _places(prefix: str, cfg: sizes.ModelConfig) -> list[load.Place]:
  """All tensors of the text model, by transformers' names."""

  def name(row, layer):
    at = '' if layer is None else f'layers.{layer}.'
    # A layer's scale is no parameter of theirs, but a buffer.
    return f'{prefix}{at}{row.hf}{"" if row.shape == "N1" else ".weight"}'

  return load.places(name, cfg)


def is_folder(path: pathlib.Path) -> bool:
  """Whether a path looks like a folder of Hugging Face's.

  One of GGUF files may have the config.json of the model that they were.
  """
  names = ['*.safetensors', 'pytorch_model*.bin']
  if not any(path.glob('*.gguf')):
    names += ['config.json']
  return any(any(path.glob(name)) for name in names)  # None of a file.


def open_folder(path: pathlib.Path) -> load.Weights:
  """Reads config.json and the headers; no tensor yet.

  Raises:
    errors.UserError: a file is missing or damaged, the model is no Gemma, or
      its tensors are not those that config.json promises.
  """
  said = hf_config.read(path / 'config.json')
  config = hf_config.shape(said)
  opened = _open_files(path)
  prefixes = [
    n.removesuffix(_EMBEDDING)
    for n in opened
    if n == _EMBEDDING or n.endswith('.' + _EMBEDDING)
  ]
  if len(prefixes) != 1:
    raise errors.UserError(
      f'{path}: {len(prefixes)} tensors end with {_EMBEDDING}, one expected; '
      'the folder is not a complete Gemma.'
    )
  heads = [name for name in _HEADS if name in opened]
  if not heads and not said.tied:
    raise errors.UserError(
      f'{said.path}: tie_word_embeddings is false, and no '
      f'{_HEADS[0]} is in the weights; fetch the whole folder.'
    )

  def get(place, *rows):
    x = _read(*opened[place.name], *rows)
    return x.T if place.row.transposed else x

  return load.Weights(
    path,
    config,
    functools.partial(_places, prefixes[0]),
    _shapes(opened),
    get,
    lambda: hf_tokenizer.read_folder(path, config.vocab_size),
    heads,
    multimodal=said.multimodal,
    chat_template=hf_tokenizer.chat_template(path),
  )


def _open_files(path):
  """Name -> (its file, where the file's numbers begin, what it says of it)."""
  found = next((x for x in map(sorted, map(path.glob, _FILES)) if x), ())
  if not found:
    for pickle in path.glob('*.bin'):
      foreign.refuse(pickle)
    raise errors.UserError(
      f'{path}: no .safetensors file in it; fetch the whole folder.'
    )
  parts = sorted(path.glob(_FILES[1]))
  if parts and parts != found:
    raise errors.UserError(
      f'{path}: {found[0].name} is in it, and {parts[0].name} as well; remove '
      'what does not belong to the model.'
    )
  tensors = {}
  for file in found:
    with reading(file):
      safetensors.safe_open(file, framework='np')  # Checks the whole header.
      with open(file, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        header = json.loads(f.read(size))
    header.pop('__metadata__', None)
    for name, info in header.items():
      if name in tensors:
        raise errors.UserError(
          f'{file}: {name} stands in {tensors[name][0].name} as well; remove '
          'the file that does not belong to the model.'
        )
      tensors[name] = file, 8 + size, info
  return tensors


def _read(path, offset, info, start=0, stop=None):
  """Rows of a tensor; the library would read all of it for some."""
  rows, *width = info['shape']
  rows, dtype = range(rows)[start:stop], np.dtype(_DTYPES[info['dtype']])
  size = math.prod(width)
  offset += info['data_offsets'][0] + rows.start * size * dtype.itemsize
  with reading(path):
    # Not mapped: pages would count as this process's memory.
    x = np.fromfile(path, dtype, len(rows) * size, offset=offset)
    return x.reshape(len(rows), *width)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
  """What the library raises out of a safetensors file refuses that file.

  Raises:
    errors.UserError: missing, unreadable, damaged, or of another kind.
  """
  try:
    yield
  except (OSError, ValueError, safetensors.SafetensorError) as e:
    why = ' '.join(str(e).split())[:160]
    try:
      foreign.refuse(path, foreign.SAFETENSORS)
    except OSError as own:  # To the library each of these is a missing file.
      why = own.strerror
    raise errors.UserError(
      f'{path}: cannot be read as safetensors ({why}); fetch it again.'
    ) from e


def _shapes(opened):
  """Name -> shape of the text model's tensors, none of them quantised."""
  out = {}
  for name, (path, _, info) in opened.items():
    if _OTHER_PARTS.fullmatch(name):
      continue
    if info['dtype'] not in _DTYPES:
      raise errors.UserError(
        f'{path}: {name} is of type {info["dtype"]}, one of '
        f'{", ".join(_DTYPES)} expected; take weights that are not quantised.'
      )
    out[name] = tuple(info['shape'])
  return out


def write(
  folder: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tok: tokenizer.Tokenizer,
  dtype: str = 'float32',
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
  # Here, as it takes half a second.
  from huggingface_hub import serialization

  flat, itemsize = parameters.flatten(params), np.dtype(dtype).itemsize
  places = {place.name: place for place in _places('model.', cfg)}
  split = serialization.split_state_dict_into_shards_factory(
    places,
    get_storage_size=lambda place: math.prod(place.shape) * itemsize,
    filename_pattern='model{suffix}.safetensors',
    max_shard_size=_SHARD_BYTES,
  )
  for file, names in split.filename_to_tensors.items():
    tensors = {
      name: load.put(flat, places[name]).astype(dtype, copy=False)
      for name in names
    }
    save(folder / file, tensors)
  if split.is_sharded:
    index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
    files.write_json(folder / 'model.safetensors.index.json', index)
  hf_config_out.write(folder / 'config.json', cfg, dtype, _ids(tok))
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
  files.write_json(folder / 'generation_config.json', fields)
  hf_tokenizer_out.write(folder, tok, chat_template)


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
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
