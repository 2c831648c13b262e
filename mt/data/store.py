"""Tokenised pairs, kept on disk and mapped into memory.

A store belongs to one parallel text, one tokenizer and one template; its folder
in the cache is named after all three. It consists of blocks of up to 65,536
pairs, drawn once at random out of the whole text, so that a block is as good a
sample as any. A block is tokenised when it is first asked for: training on
millions of pairs starts with the first of them.

A block's file is int32 numbers in the machine's order, and nothing else:
  n, CRC-32 of what follows, n lengths, n target starts, the tokens
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import pathlib
import threading
import time
import zlib

import chex
import numpy as np

from mt.base import cache
from mt.base import errors
from mt.data import bitext as bitext_lib
from mt.data import lines
from mt.data import template as template_lib
from mt.data import tokenizer

_BLOCK = 1 << 16  # Pairs; some 10 MB of tokens.
_CHUNK = 1 << 10  # Pairs tokenised in one call, which holds Python's lock.


@dataclasses.dataclass(frozen=True)
class Examples:
  """Tokenised pairs in one flat array.

  Attributes:
    tokens: [sum of lengths] int32.
    offsets: [n + 1] int64; example i is tokens[offsets[i]:offsets[i + 1]].
    target_starts: [n] int32, where the learned part begins in each.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  target_starts: np.ndarray

  def __len__(self) -> int:
    return len(self.target_starts)

  @property
  def sizes(self) -> np.ndarray:
    """[n] int64, tokens of each."""
    return np.diff(self.offsets)


def make_examples(
  sizes: np.ndarray, target_starts: np.ndarray, tokens: np.ndarray
) -> Examples:
  """Examples out of the lengths, [n] each, and all tokens."""
  chex.assert_equal_shape([sizes, target_starts])
  offsets = np.zeros(len(sizes) + 1, np.int64)
  np.cumsum(sizes, out=offsets[1:])
  chex.assert_shape(tokens, (int(offsets[-1]),))
  return Examples(tokens, offsets, target_starts)


def encode(
  pairs: list[lines.Pair],
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
) -> Examples:
  """Tokenises pairs, whatever their length.

  Raises:
    errors.UserError: the template does not go with the tokenizer.
  """
  prompts, targets = template_lib.encode_pairs(pairs, tok, template)
  starts = np.array([len(p) for p in prompts], np.int32)
  sizes = starts + np.array([len(t) for t in targets], np.int32)
  tokens = np.empty(int(sizes.sum()), np.int32)
  at = 0
  for prompt, target in zip(prompts, targets, strict=True):
    ids = prompt + target
    tokens[at : at + len(ids)] = ids
    at += len(ids)
  return make_examples(sizes, starts, tokens)


@dataclasses.dataclass(frozen=True)
class Store:
  """The blocks of one parallel text.

  Attributes:
    bitext: the pairs.
    tok: the tokenizer.
    template: how they become tokens.
    folder: of the blocks.
  """

  bitext: bitext_lib.Bitext
  tok: tokenizer.Tokenizer
  template: template_lib.Template
  folder: pathlib.Path

  def __len__(self) -> int:
    """Number of blocks."""
    return -(-len(self.bitext) // _BLOCK)

  @property
  def key(self) -> str:
    return self.folder.name

  @functools.cached_property
  def _order(self) -> np.ndarray:
    numbers = np.arange(len(self.bitext), dtype=np.uint32)  # 4 bytes a pair.
    return np.random.default_rng(0).permutation(numbers)

  def members(self, number: int) -> np.ndarray:
    """Which pairs of the text are in a block, in its order."""
    chex.assert_scalar_in(number, 0, len(self) - 1)
    return np.array_split(self._order, len(self))[number]

  def block(self, number: int) -> Examples:
    """The examples of a block; made and written if they are not there.

    Raises:
      errors.UserError: see Bitext.read and mt/data/template.py; a full disk.
    """
    path = self.folder / f'{number:05d}.int32'
    chosen = self.members(number)
    if (examples := _load(path, len(chosen))) is not None:
      return examples
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with open(path.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have made it meanwhile.
        if (examples := _load(path, len(chosen))) is None:
          self._make(path, chosen)
          examples = _load(path, len(chosen))
    except OSError as e:
      raise errors.UserError(
        f'{e.filename or path}: cannot keep tokenised text '
        f'({e.strerror or e}); it takes about as much room as the text itself: '
        'free some, or set XDG_CACHE_HOME elsewhere.'
      ) from None
    return examples

  def prepare(self, number: int) -> None:
    """Makes a block in the background, for whoever asks for it next."""

    def work():
      with contextlib.suppress(errors.UserError):  # Raised when asked for.
        self.block(number)

    if not (self.folder / f'{number:05d}.int32').exists():
      # Whoever leaves does not wait for it.
      threading.Thread(target=work, daemon=True).start()

  def _make(self, path, chosen):
    parts = []
    for at in range(0, len(chosen), _CHUNK):
      pairs = self.bitext.read(chosen[at : at + _CHUNK])
      parts.append(encode(pairs, self.tok, self.template))
      time.sleep(0)  # Lets the training loop in.
    body = np.concatenate(
      [p.sizes.astype(np.int32) for p in parts]
      + [p.target_starts for p in parts]
      + [p.tokens for p in parts]
    )
    head = np.array([len(chosen), zlib.crc32(body)], np.uint32).view(np.int32)
    part = path.with_suffix('.part')
    with open(part, 'wb') as f:
      f.write(head)
      f.write(body)
    part.replace(path)


def _load(path, n) -> Examples | None:
  """A block's examples, or None where it is missing or damaged."""
  try:
    data = np.memmap(path, np.int32, 'r')
  except (OSError, ValueError):  # ValueError: empty, or no whole numbers.
    return None
  if len(data) < 2 + 2 * n:
    return None
  found, crc = data[:2].view(np.uint32).tolist()
  if found != n or crc != zlib.crc32(data[2:]):
    return None
  sizes, starts = data[2 : 2 + n], data[2 + n : 2 + 2 * n]
  return make_examples(sizes, starts, data[2 + 2 * n :])


def open_store(
  bitext: bitext_lib.Bitext,
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
) -> Store:
  """The store of a text in the cache; nothing is tokenised yet."""
  code = inspect.getsource(template_lib) + inspect.getsource(encode)
  parts = [bitext.digest, repr(template), hashlib.sha256(tok.proto).hexdigest()]
  key = hashlib.sha256(repr([*parts, _BLOCK, code]).encode()).hexdigest()[:32]
  return Store(bitext, tok, template, cache.cache_dir() / 'tokens' / key)
