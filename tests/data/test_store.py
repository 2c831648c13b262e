"""Tokenised text on disk: blocks, made once, mapped, and made again if bad."""

import dataclasses
import fcntl
import functools
import itertools
import os
import threading
import time

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.data import bitext
from mt.data import corpus
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from tests.fixtures.refusal import refusal

PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')
BLOCK = 7  # Pairs at most; _text has 23, so that there are four blocks.


@functools.cache
def _tokenizer():
  path = corpus.SAMPLE / 'valid' / 'valid.en-fr.tsv'
  pairs = bitext.open_bitext([path], 'en-fr').read()
  return tokenizer.train([t for p in pairs for t in (p.source, p.target)], 400)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  """Blocks of a few pairs, two of them tokenised at once, in an empty cache."""
  monkeypatch.setattr(store, '_BLOCK', BLOCK)
  monkeypatch.setattr(store, '_CHUNK', 2)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def _text(folder, n=23, name='a.tsv', word='mots'):
  path = folder / name
  rows = [
    f'{i}\tsome {"words " * (i % 5)}{i}\tdes {word} {i}' for i in range(n)
  ]
  path.write_text(''.join(row + '\n' for row in rows))
  return bitext.open_bitext([path], 'en-fr')


def _open(text, template=PLAIN, tok=None):
  return store.open_store(text, tok or _tokenizer(), template)


def _lists(examples):
  return (
    [
      examples.tokens[slice(*examples.offsets[i : i + 2])].tolist()
      for i in range(len(examples))
    ],
    examples.target_starts.tolist(),
  )


def _count(monkeypatch, pause=0.0):
  """Numbers of pairs that are tokenised from now on."""
  counts, real = [], template_lib.encode_pairs

  def encode(pairs, *rest):
    counts.append(len(pairs))
    time.sleep(pause)
    return real(pairs, *rest)

  monkeypatch.setattr(template_lib, 'encode_pairs', encode)
  return counts


def _path(made, number=0):
  found = made.folder.glob(f'*{number}.*')
  (path,) = (p for p in found if p.suffix not in ('.lock', '.part'))
  return path


def _numbers(made):
  """Of the blocks that are on disk."""
  found = made.folder.glob('*')
  return [int(p.stem) for p in found if p.suffix not in ('.lock', '.part')]


# Blocks.


@pytest.mark.parametrize(
  ('pairs', 'blocks'), [(1, 1), (6, 1), (7, 1), (8, 2), (14, 2), (23, 4)]
)
def test_the_blocks_share_out_the_text(tmp_path, pairs, blocks):
  opened = _open(_text(tmp_path, pairs))
  assert len(opened) == blocks
  members = [opened.members(i).tolist() for i in range(blocks)]
  assert sorted(itertools.chain(*members)) == list(range(pairs))
  sizes = set(map(len, members))
  assert max(sizes) <= BLOCK and max(sizes) - min(sizes) <= 1


def test_a_block_is_a_sample_of_the_whole_text(tmp_path):
  opened = _open(_text(tmp_path, 700))
  assert len(opened) == 100
  middle = [np.mean(opened.members(i)) for i in range(100)]
  # Of seven numbers out of 0 … 699: 350 +- 202 / sqrt(7).
  assert 60 < np.std(middle) < 95
  # The same in every run.
  again = _open(_text(tmp_path, 700))
  for i in range(100):
    assert again.members(i).tolist() == opened.members(i).tolist()


def test_blocks_hold_what_encoding_gives(tmp_path):
  text = _text(tmp_path)
  opened, pairs = _open(text), text.read()
  for i in range(len(opened)):
    block = opened.block(i)
    chosen = [pairs[m] for m in opened.members(i)]
    assert _lists(block) == _lists(store.encode(chosen, _tokenizer(), PLAIN))
    assert block.tokens.dtype == block.target_starts.dtype == np.int32
    assert block.offsets.dtype == np.int64
    assert block.sizes.tolist() == list(map(len, _lists(block)[0]))
    # The tokens stay on disk.
    assert isinstance(block.tokens, np.memmap)
    assert not block.tokens.flags.writeable


def test_encoding_keeps_every_length():
  """What does not fit into a row is left out later, where rows are made."""
  pairs = [
    lines.Pair('1', 'a' * n, 'b' * (n // 2 + 1)) for n in (9, 1, 3000, 0, 12)
  ]
  prompts, targets = template_lib.encode_pairs(pairs, _tokenizer(), PLAIN)
  got, starts = _lists(store.encode(pairs, _tokenizer(), PLAIN))
  assert got == [p + t for p, t in zip(prompts, targets, strict=True)]
  assert starts == list(map(len, prompts))
  assert len(store.encode([], _tokenizer(), PLAIN)) == 0


def test_a_block_is_tokenised_when_it_is_asked_for(tmp_path, monkeypatch):
  counts = _count(monkeypatch)
  opened = _open(_text(tmp_path))
  assert len(opened) == 4 and counts == []
  opened.block(2)
  assert sum(counts) == len(opened.members(2))
  assert max(counts) == 2  # A few at a time.
  assert _numbers(opened) == [2]


def test_the_second_time_it_is_read_from_disk(tmp_path, monkeypatch):
  text = _text(tmp_path)
  first = [_lists(_open(text).block(i)) for i in range(4)]
  monkeypatch.setattr(template_lib, 'encode_pairs', None)  # Nobody tokenises.
  os.unlink(text.paths[0])
  assert [_lists(_open(text).block(i)) for i in range(4)] == first


# Whose blocks they are.


def test_the_key_is_that_of_text_tokenizer_and_template(tmp_path):
  text, tok = _text(tmp_path), _tokenizer()
  key = _open(text).key
  # The same, wherever it is read from.
  (tmp_path / 'elsewhere').mkdir()
  assert _open(_text(tmp_path / 'elsewhere', name='b.tsv')).key == key
  proto = sp_pb2.ModelProto.FromString(tok.proto)
  proto.pieces[-1].score -= 1
  other = tokenizer.from_proto(proto.SerializeToString(), 'other')
  changed = [
    _open(_text(tmp_path, name='b.tsv', word='mot')),
    _open(_text(tmp_path, 22, name='b.tsv')),
    _open(bitext.open_bitext(text.paths, 'en-fr', turned=True)),
    _open(bitext.open_bitext(text.paths, 'en-fr', (1, 3))),
    _open(text, tok=other),
    *(
      _open(text, dataclasses.replace(PLAIN, **change))
      for change in (
        {'prompt': 'English: {source}\nFrench: '},
        {'target_prefix': ''},
        {'target_bos': True},
        {'chat': True},
      )
    ),
  ]
  keys = {key, *(x.key for x in changed)}
  assert len(keys) == 1 + len(changed)
  assert {x.folder.parent for x in changed} == {_open(text).folder.parent}


def test_other_code_has_another_key(tmp_path, monkeypatch):
  text = _text(tmp_path)
  key = _open(text).key
  monkeypatch.setattr(store, 'encode', lambda pairs, tok, template: None)
  changed = _open(text).key
  monkeypatch.undo()
  assert key != changed


# Damaged blocks.


def _array(array):
  def damage(path):
    with open(path, 'wb') as f:
      np.save(f, array)

  return damage


DAMAGE = {
  'cut': lambda path: os.truncate(path, path.stat().st_size - 4),
  'half': lambda path: os.truncate(path, path.stat().st_size // 2),
  'only a header': lambda path: os.truncate(path, 128),
  'empty': lambda path: os.truncate(path, 0),
  'zeros': lambda path: path.write_bytes(bytes(path.stat().st_size)),
  'zeros at the end': lambda path: path.write_bytes(
    path.read_bytes()[:-64] + bytes(64)
  ),
  'text': lambda path: path.write_text('not an array\n' * 20),
  'a pickle': _array(np.array([{}], object)),
  'an archive': lambda path: path.write_bytes(b'PK\x03\x04' + bytes(200)),
  'floats': _array(np.zeros(99)),
  'two dimensions': _array(np.zeros((9, 9), np.int32)),
  'few numbers': _array(np.zeros(1, np.int32)),
  'no numbers': _array(np.zeros(0, np.int32)),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_block_is_made_again(tmp_path, monkeypatch, name):
  opened = _open(_text(tmp_path))
  want = _lists(opened.block(0))
  DAMAGE[name](_path(opened))
  counts = _count(monkeypatch)
  assert _lists(opened.block(0)) == want
  assert sum(counts) == len(opened.members(0))
  assert _lists(opened.block(0)) == want
  assert sum(counts) == len(opened.members(0)), 'made again and again'


def test_any_damaged_byte_at_all(tmp_path):
  opened = _open(_text(tmp_path, 3))
  want, path = _lists(opened.block(0)), _path(opened)
  raw = path.read_bytes()
  rng = np.random.default_rng(0)
  damage = list(enumerate(rng.integers(1, 256, len(raw)).tolist()))
  # Headers that NumPy's own reader stumbles over, each in another way.
  damage += [(at, raw[at] ^ new) for at, new in ((8, 1), (21, 44), (26, 66))]
  for at, change in damage:
    bad = bytearray(raw)
    bad[at] ^= change
    path.write_bytes(bad)
    assert _lists(opened.block(0)) == want, (at, change)


def test_the_block_of_another_text_is_made_again(tmp_path):
  """It is whole, but has another number of pairs."""
  opened = _open(_text(tmp_path))
  want = _lists(opened.block(0))
  other = _open(_text(tmp_path, 22, 'b.tsv'))
  assert len(other.block(3)) != len(opened.block(0))
  _path(opened).write_bytes(_path(other, 3).read_bytes())
  assert _lists(opened.block(0)) == want


def test_what_an_interrupted_process_left_does_not_matter(tmp_path):
  opened = _open(_text(tmp_path))
  want = _lists(opened.block(0))
  path = _path(opened)
  path.rename(path.with_suffix('.part'))
  os.truncate(path.with_suffix('.part'), 150)
  assert _lists(opened.block(0)) == want


# Several at once.


def test_two_at_once_make_a_block_once(tmp_path, monkeypatch):
  counts = _count(monkeypatch, pause=0.02)
  text = _text(tmp_path)
  got = []
  threads = [
    threading.Thread(target=lambda: got.append(_lists(_open(text).block(0))))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert len(got) == 4 and got.count(got[0]) == 4
  assert sum(counts) == len(_open(text).members(0))


def test_what_another_process_makes_is_waited_for(tmp_path, monkeypatch):
  opened = _open(_text(tmp_path))
  want, path = _lists(opened.block(0)), _path(opened)
  raw = path.read_bytes()
  path.unlink()
  counts, got = _count(monkeypatch), []
  with open(path.with_suffix('.lock'), 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # As the other process does.
    thread = threading.Thread(
      target=lambda: got.append(_lists(opened.block(0)))
    )
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not got
    path.write_bytes(raw)
  thread.join(20)
  assert got == [want] and counts == []


@pytest.mark.filterwarnings('error')  # Those of threads, too.
def test_blocks_are_prepared_in_the_background(tmp_path, monkeypatch):
  text = _text(tmp_path)
  opened = _open(text)
  real, may_start, working = template_lib.encode_pairs, threading.Event(), set()

  def encode(*args):
    working.add(threading.current_thread())
    assert may_start.wait(20)
    return real(*args)

  before = set(threading.enumerate())
  monkeypatch.setattr(template_lib, 'encode_pairs', encode)
  opened.prepare(1)  # Returns before anything is done.
  assert _numbers(opened) == []
  may_start.set()
  for thread in set(threading.enumerate()) - before:
    thread.join(20)
  assert _numbers(opened) == [1]
  assert len(working) == 1 and not working & before
  # What is there is not made again …
  monkeypatch.setattr(template_lib, 'encode_pairs', None)
  opened.prepare(1)
  assert set(threading.enumerate()) == before
  assert len(opened.block(1)) == len(opened.members(1))
  # … and what cannot be made is silent until it is asked for.
  os.unlink(text.paths[0])
  opened.prepare(2)
  for thread in set(threading.enumerate()) - before:
    thread.join(20)
  refusal(lambda: opened.block(2), text.paths[0])


# What cannot be done is one sentence.


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  opened = _open(_text(tmp_path))
  refusal(
    lambda: opened.block(0),
    opened.folder,
    'cannot keep tokenised text (Not a directory)',
    'XDG_CACHE_HOME',
  )


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk(tmp_path, monkeypatch):
  opened = _open(_text(tmp_path))

  opened.folder.mkdir(parents=True)
  part = opened.folder / '00000.part'
  part.symlink_to('/dev/full')
  refusal(lambda: opened.block(0), opened.folder, 'No space left', 'free some')
  assert not _numbers(opened)
  part.unlink()
  assert len(opened.block(0)) == len(opened.members(0))


def _rewrite(path):
  raw = path.read_bytes()
  path.write_bytes(raw.replace(b'mots', b'MOTS'))
  os.utime(path, ns=(1, 1))  # Else it could be too quick for the clock.


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (os.unlink, 'No such file'),
    (lambda path: os.truncate(path, 40), 'another size or time'),
    (_rewrite, 'another size or time'),
  ],
  ids=['gone', 'shorter', 'rewritten'],
)
def test_a_text_that_changed_in_the_meantime(tmp_path, change, words):
  text = _text(tmp_path)
  opened = _open(text)
  kept = _lists(opened.block(0))
  path = tmp_path / 'a.tsv'
  change(path)
  refusal(
    lambda: opened.block(1), path, 'changed or gone since', words, 'put the'
  )
  assert _numbers(opened) == [0]
  assert _lists(opened.block(0)) == kept  # It was made from what there was.
