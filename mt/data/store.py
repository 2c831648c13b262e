"""Tokenised pairs, kept on disk and mapped into memory.

A store belongs to one parallel text, one tokenizer and one template; its folder
in the cache is named after all three. It consists of blocks of up to 65,536
lines, drawn once at random out of the whole text, so that a block is as good a
sample as any. A block is tokenised when it is first asked for: training on
millions of pairs starts with the first of them. `python -m mt.data` asks for
all.

With `noise` the sources of a block are made noisy anew in each epoch. Those
examples are kept in memory, the last two blocks of each shard.

A block's file is int32 numbers in the machine's order, and nothing else:
  n, which n of its lines are pairs, n sizes, n target starts, the tokens
"""

from collections.abc import Hashable
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import threading

import chex
import numpy as np

from mt.base import cache
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.data import bitext as bitext_lib
from mt.data import lines
from mt.data import noising
from mt.data import template as template_lib
from mt.data import tokenizer

# To be raised when the tokens of a pair become others.
_VERSION = 1
_LAYOUT = 2  # To be raised when the file does.
_BLOCK = 1 << 16  # Lines; some 10 MB of tokens.
_CHUNK = 1 << 10  # Lines tokenised in one call, which holds Python's lock.


@dataclasses.dataclass(frozen=True)
class Store:
  """The blocks of one parallel text."""

  bitext: bitext_lib.Bitext
  tok: tokenizer.Tokenizer
  template: template_lib.Template
  folder: pathlib.Path
  noise: float = 0.0  # Share of words and sentences, see noising.noised.
  seed: int = 0  # Of the noise.
  shards: int = 1  # The text is in so many blocks at least.
  _noisy: dict = dataclasses.field(
    default_factory=dict, init=False, compare=False, repr=False
  )
  _making: threading.Lock = dataclasses.field(
    default_factory=threading.Lock, init=False, compare=False, repr=False
  )

  def __len__(self) -> int:
    return max(-(-len(self.bitext) // _BLOCK), self.shards)

  @property
  def key(self) -> str:
    return self.folder.name

  @functools.cached_property
  def _order(self) -> np.ndarray:
    """All lines at random: [lines] uint32, mapped where they fill blocks."""
    number, path = len(self.bitext), self.folder / 'order.uint32'
    if number > _BLOCK and path.exists():
      return np.memmap(path, np.uint32, 'r')
    numbers = np.arange(number, dtype=np.uint32)
    order = np.random.default_rng(0).permutation(numbers)
    if number > _BLOCK:
      with files.new_file(path) as f:
        f.write(order)
    return order

  def members(self, number: int) -> np.ndarray:
    """Which lines of the text are in a block, in its order."""
    chex.assert_scalar_in(number, 0, len(self) - 1)
    return np.array_split(self._order, len(self))[number]

  def block(self, number: int, epoch: int = 0) -> template_lib.Examples:
    """The examples of a block; made and written if they are not there.

    The epoch matters to noise alone.

    Raises:
      errors.UserError: see Bitext.look, Bitext.check and template.encode; a
        full disk.
    """
    usable, examples = self._read(number)
    if len(usable) < len(self.members(number)):
      self.bitext.check(self.unusable([number]), len(self.members(number)))
    return self._with_noise(number, epoch) if self.noise else examples

  def _with_noise(self, number, epoch):
    """The examples of a block, whose sources have the noise of an epoch."""
    chosen = self.members(number)[self._read(number)[0]]
    with self._making:
      if (number, epoch) not in self._noisy:
        of_shard = [
          x for x in self._noisy if (x[0] - number) % self.shards == 0
        ]
        for old in of_shard[:-1]:
          del self._noisy[old]
        parts = [
          self._noised(chosen[at : at + _CHUNK], epoch)
          for at in range(0, max(1, len(chosen)), _CHUNK)
        ]
        self._noisy[number, epoch] = template_lib.join(parts)
      return self._noisy[number, epoch]

  def _noised(self, which, epoch):
    _leave_with_main()
    language = template_lib.base_language(self.bitext.pair.split('-')[0])
    pairs = [
      pair._replace(
        source=noising.noised(
          pair.source, self.noise, (self.seed, epoch, line), language
        )
      )
      for line, pair in zip(which, self.bitext.read(which), strict=True)
    ]
    return template_lib.encode(pairs, self.tok, self.template)

  def make_ahead(self, number: int, epoch: int = 0) -> None:
    """Starts to make a block in a thread, if it is not there.

    What is wrong with it is said to who asks for it.
    """

    def make():
      with contextlib.suppress(errors.UserError):
        self.block(number, epoch)

    threading.Thread(target=make).start()

  def recall(self, what: Hashable) -> list[int]:
    """Numbers that `keep` was given, or none."""
    with contextlib.suppress(errors.UserError):
      return files.read_json(self._kept(what))
    return []

  def keep(self, what: Hashable, numbers: Sequence[int]) -> None:
    """Keeps numbers beside the blocks: each process has blocks of its own."""
    with files.new_file(self._kept(what)) as f:
      f.write(json.dumps(numbers).encode())

  def _kept(self, what):
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return self.folder / f'{digest}.json'

  def pairs(self, number: int, items: Sequence[int]) -> list[lines.Pair]:
    """The texts of these examples of a block."""
    return self.bitext.read(self.members(number)[self._read(number)[0][items]])

  def unusable(self, numbers: Sequence[int]) -> bitext_lib.Unusable:
    """Why lines of these blocks are no pairs."""
    rest = [np.delete(self.members(n), self._read(n)[0]) for n in numbers]
    return self.bitext.look(np.sort(np.concatenate(rest))).unusable

  def _read(self, number):
    """Which of its lines are pairs, and their examples."""
    path = self.folder / f'{number:05d}.{_LAYOUT}.int32'
    found = _load(path)
    if found is None:
      with self._making:
        if _load(path) is None:  # Nobody has made it meanwhile.
          self._write(path, self.members(number))
      found = _load(path)
    return found

  def _write(self, path, members):
    usable, parts = [], []
    for at in range(0, len(members), _CHUNK):
      _leave_with_main()
      looked = self.bitext.look(members[at : at + _CHUNK])
      usable.append((looked.usable + at).astype(np.int32))
      parts.append(template_lib.encode(looked.pairs, self.tok, self.template))
    usable, examples = np.concatenate(usable), template_lib.join(parts)
    with files.new_file(path) as f:
      f.write(np.int32(len(usable)))
      for array in (usable, examples.sizes, examples.target_starts):
        f.write(array)
      f.write(examples.tokens)
    if len(self) > 1 and len(usable) < len(members):
      unusable = self.bitext.look(np.delete(members, usable)).unusable
      journal.say(
        f'{self.bitext.where}: {len(members):,} lines more were looked at; not '
        f'used: {bitext_lib.reasons(unusable, self.bitext.unit)}'
      )


def _leave_with_main():
  # SentencePiece's own threads do not survive the end of the process.
  if not threading.main_thread().is_alive():
    sys.exit()


def _load(path) -> tuple[np.ndarray, template_lib.Examples] | None:
  """Usable lines and examples of a block, or None where it is not whole."""
  try:
    data = np.memmap(path, np.int32, 'r')
  except (OSError, ValueError):  # ValueError: empty, or no whole numbers.
    return None
  n = max(0, int(data[0]))
  usable, sizes, starts, tokens = np.split(data[1:], [n, 2 * n, 3 * n])
  if len(starts) != n or sizes.sum() != len(tokens):
    return None
  return usable, template_lib.Examples(tokens, sizes, starts)


def open_store(
  bitext: bitext_lib.Bitext,
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
  noise: float = 0.0,
  seed: int = 0,
  shards: int = 1,
) -> Store:
  """The store of a text in the cache; nothing is tokenised yet.

  Raises:
    errors.UserError: fewer lines than shards.
  """
  if len(bitext) < shards:
    raise errors.UserError(
      f'{bitext.where} has {len(bitext)} lines for data.shards={shards}; no '
      'more shards than lines expected.'
    )
  proto = hashlib.sha256(tok.proto).hexdigest()
  parts = [_VERSION, _BLOCK, bitext.digest, repr(template), proto]
  if len(bitext) <= _BLOCK * (shards - 1):  # More blocks than it would have.
    parts.append(shards)
  key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
  folder = cache.cache_dir() / 'tokens' / key
  return Store(bitext, tok, template, folder, noise, seed, shards)
