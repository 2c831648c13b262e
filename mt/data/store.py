"""Tokenised pairs, kept on disk and mapped into memory.

A store belongs to one parallel text, one tokenizer and one template; its folder
in the cache is named after all three. It consists of blocks of up to 65,536
pairs, drawn once at random out of the whole text, so that a block is as good a
sample as any. A block is tokenised when it is first asked for: training on
millions of pairs starts with the first of them. `python -m mt.data` asks for
all.

A block's file is int32 numbers in the machine's order, and nothing else:
  n, n sizes, n target starts, the tokens
"""

import dataclasses
import functools
import hashlib
import pathlib

import chex
import numpy as np

from mt.base import cache
from mt.base import files
from mt.data import bitext as bitext_lib
from mt.data import template as template_lib
from mt.data import tokenizer

# To be raised when the tokens of a pair, or the file, become others.
_VERSION = 1
_BLOCK = 1 << 16  # Pairs; some 10 MB of tokens.
_CHUNK = 1 << 10  # Pairs tokenised in one call, which holds Python's lock.


@dataclasses.dataclass(frozen=True)
class Store:
  """The blocks of one parallel text."""

  bitext: bitext_lib.Bitext
  tok: tokenizer.Tokenizer
  template: template_lib.Template
  folder: pathlib.Path

  def __len__(self) -> int:
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

  def block(self, number: int) -> template_lib.Examples:
    """The examples of a block; made and written if they are not there.

    Raises:
      errors.UserError: see Bitext.read and template.encode; a full disk.
    """
    path = self.folder / f'{number:05d}.int32'
    chosen = self.members(number)
    examples = _load(path, len(chosen))
    if examples is None:
      self._write(path, chosen)
      examples = _load(path, len(chosen))
    return examples

  def _write(self, path, chosen):
    parts = []
    for at in range(0, len(chosen), _CHUNK):
      pairs = self.bitext.read(chosen[at : at + _CHUNK])
      parts.append(template_lib.encode(pairs, self.tok, self.template))
    with files.new_file(path) as f:
      f.write(np.int32(len(chosen)))
      for name in ('sizes', 'target_starts', 'tokens'):
        for part in parts:
          f.write(getattr(part, name))


def _load(path, n) -> template_lib.Examples | None:
  """A block's examples, or None where it is missing or not whole."""
  try:
    data = np.memmap(path, np.int32, 'r')
  except (OSError, ValueError):  # ValueError: empty, or no whole numbers.
    return None
  sizes, starts, tokens = np.split(data[1:], [n, 2 * n])
  if data[0] != n or len(starts) != n or sizes.sum() != len(tokens):
    return None
  if not ((starts > 0) & (starts < sizes)).all():
    return None
  return template_lib.Examples(tokens, sizes, starts)


def open_store(
  bitext: bitext_lib.Bitext,
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
) -> Store:
  """The store of a text in the cache; nothing is tokenised yet."""
  proto = hashlib.sha256(tok.proto).hexdigest()
  parts = [_VERSION, _BLOCK, bitext.digest, repr(template), proto]
  key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
  return Store(bitext, tok, template, cache.cache_dir() / 'tokens' / key)
