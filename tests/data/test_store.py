"""Tokenised text on disk: blocks, made once, mapped, and made again if bad."""

import dataclasses
import itertools
import os
import threading
import time
import types
import zlib

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.base import processes
from mt.data import batches
from mt.data import bitext
from mt.data import epochs
from mt.data import faults
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from mt.data import tokenizer
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal

PLAIN = template_lib.Template('English: {source}\nFrench:', ' ')
BLOCK = 7  # Pairs at most; _text has 23, so that there are four blocks.


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  """Blocks of a few pairs, two of them tokenised at once, in an empty cache."""
  monkeypatch.setattr(store, '_BLOCK', BLOCK)
  monkeypatch.setattr(store, '_CHUNK', 2)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  yield
  numbered_rows.wait_for_blocks()


def _text(folder, n=23, name='a.tsv', word='mots'):
  path = folder / name
  rows = [
    f'{i}\tsome {"words " * (i % 5)}{i}\tdes {word} {i}' for i in range(n)
  ]
  path.write_text(''.join(row + '\n' for row in rows))
  return bitext.open_bitext([path], 'en-fr')


def _open(text, template=PLAIN, tok=None):
  return store.open_store(
    text, tok or numbered_rows.sample_tokenizer(), template
  )


def _lists(examples):
  ids = [examples.ids(i).tolist() for i in range(len(examples))]
  return ids, examples.target_starts.tolist()


def _count(monkeypatch):
  """Numbers of pairs that are tokenised from now on."""
  counts, real = [], template_lib.encode

  def encode(pairs, *rest):
    counts.append(len(pairs))
    return real(pairs, *rest)

  monkeypatch.setattr(template_lib, 'encode', encode)
  return counts


def _files(made):
  """Names of blocks in the folder."""
  return sorted(p.name for p in made.folder.glob('*.int32'))


# Blocks.


@pytest.mark.parametrize(
  ('pairs', 'blocks'), [(1, 1), (7, 1), (8, 2), (14, 2), (23, 4)]
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
    tok = numbered_rows.sample_tokenizer()
    assert _lists(block) == _lists(template_lib.encode(chosen, tok, PLAIN))
    assert block.tokens.dtype == block.target_starts.dtype == np.int32
    # The tokens stay on disk.
    assert isinstance(block.tokens, np.memmap)
    assert not block.tokens.flags.writeable


def test_a_block_is_tokenised_once_and_when_it_is_asked_for(
  tmp_path, monkeypatch
):
  counts = _count(monkeypatch)
  text = _text(tmp_path)
  opened = _open(text)
  assert len(opened) == 4 and counts == []
  want = _lists(opened.block(2))
  assert sum(counts) == len(opened.members(2))
  assert max(counts) == 2  # A few at a time.
  assert _files(opened) == ['00002.2.int32']
  monkeypatch.setattr(template_lib, 'encode', None)  # Nobody tokenises.
  os.unlink(text.where)
  assert _lists(_open(text).block(2)) == want


def test_lines_that_are_no_pairs_are_left_out_and_counted(
  tmp_path, capsys, monkeypatch
):
  rows = [f'{"x" * n} y\t{n} z' for n in range(23)]
  rows[3] = rows[17] = 'no second column'
  path = tmp_path / 'a.tsv'
  path.write_text('\n'.join(rows))
  text = bitext.open_bitext([path], 'en-fr', max_bad_fraction=0.5)
  opened, sources = _open(text), []
  for block in range(4):
    number = len(opened.block(block))
    pairs = opened.pairs(block, range(number))
    assert len(pairs) == number
    sources += [p.source for p in pairs]
  want = {row.split('\t')[0] for row in rows} - {'no second column'}
  assert len(sources) == 21 and {*sources} == want
  assert opened.unusable(range(4)) == {'fewer than 2 columns': (2, 4)}
  said = capsys.readouterr().out
  assert said.count('1 fewer than 2 columns') == 2
  # One in a block of five or six is more than a tenth; of all it is less.
  text = dataclasses.replace(text, max_bad_fraction=0.1)
  for block in range(4):
    _open(text).block(block)
  monkeypatch.setattr(bitext, '_LOOK_AT_ALL', 22)
  text = dataclasses.replace(text, max_bad_fraction=0)
  stopped = 0
  for block in range(4):  # Blocks that are there already, too.
    try:
      _open(text).block(block)
    except errors.UserError as e:
      assert '1 of some ' in str(e) and 'data.max_bad_fraction=0;' in str(e)
      stopped += 1
  assert stopped == 2


def test_a_block_may_be_empty(tmp_path):
  """Where data.filter leaves nothing of it; but not all blocks."""
  path = tmp_path / 'a.tsv'
  path.write_text(''.join(f'a {i}\t{"ab"[i % 2]} {i}\n' for i in range(16)))
  text = bitext.open_bitext([path], 'en-fr')
  rules = faults.Rules('en-fr', 0.0, left_out=frozenset(['copies']))
  tok = numbered_rows.sample_tokenizer()
  text = dataclasses.replace(text, rules=rules)
  made = store.open_store(text, tok, PLAIN, shards=8)
  sizes = [len(made.block(i)) for i in range(8)]
  assert 0 in sizes and sum(sizes) == 8
  rows = epochs.Epochs(made, 64, 0)
  assert rows.row(len([n for n in sizes if n]) - 1)[1]
  empty = sizes.index(0)
  refusal(
    lambda: epochs.Epochs(made, 64, 0, shard=(empty, 8)).row(0),
    path,
    f'part {empty + 1} of data.shards=8: no pair in it (2 copies',
    'data.filter',
  )


@pytest.mark.parametrize('first', [True, False])
def test_the_next_block_is_made_ahead_and_rows_are_kept(
  tmp_path, monkeypatch, first
):
  """In each process: a shard's rows are asked for by one of them alone."""
  monkeypatch.setattr(processes, 'is_first', lambda: first)
  opened = _open(_text(tmp_path))
  rows = epochs.Epochs(opened, 200, 0)
  rows.row(0)
  deadline = time.monotonic() + 20
  while len(_files(opened)) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert len(_files(opened)) == 2
  last = sum(len(rows.block(n)[1]) for n in range(9)) - 1
  want = numbered_rows.make_row(rows, last)
  # A later start packs only the block that it needs.
  again, packed = epochs.Epochs(opened, 200, 0), []
  pack = epochs.Epochs._pack
  monkeypatch.setattr(
    epochs.Epochs, '_pack', lambda *args: packed.append(1) or pack(*args)
  )
  numbered_rows.equal(numbered_rows.make_row(again, last), want)
  assert len(packed) == 1
  # Rows of another length are others.
  other = epochs.Epochs(opened, 60, 0)
  other.row(last)
  assert other._first_rows[:5] != again._first_rows[:5]


def test_a_text_has_a_block_for_each_shard(tmp_path):
  text, tok = _text(tmp_path), numbered_rows.sample_tokenizer()

  def make(shards):
    return store.open_store(text, tok, PLAIN, shards=shards)

  assert [len(make(n)) for n in (1, 4, 5, 23)] == [4, 4, 5, 23]
  # The same blocks are kept once, others apart.
  keys = [make(n).key for n in (1, 2, 4, 5, 23)]
  assert len({*keys[:3]}) == 1 and len({*keys[2:]}) == 3
  sizes = [make(23).block(i).sizes for i in range(23)]
  assert [len(s) for s in sizes] == [1] * 23
  refusal(lambda: make(24), 'a.tsv', '23 lines', 'data.shards=24')


@pytest.mark.parametrize('shards', [1, 4])
def test_a_block_is_made_noisy_once_an_epoch(tmp_path, monkeypatch, shards):
  """However many shards take turns in one process."""
  tok, made, real = numbered_rows.sample_tokenizer(), [], store.Store._noised

  def noised(self, which, epoch):
    made.extend((line, epoch) for line in which.tolist())
    return real(self, which, epoch)

  monkeypatch.setattr(store.Store, '_noised', noised)
  # At once: a thread that starts late makes what is not wanted any more.
  monkeypatch.setattr(store.Store, 'make_ahead', store.Store.block)
  text = _text(tmp_path, 16 * BLOCK)
  opened = store.open_store(text, tok, PLAIN, noise=0.3, shards=shards)
  rows = epochs.Epochs(opened, 200, 0, shard=(0, shards))
  iterator = batches.TrainBatches([rows], [1], 4, 16, shards=shards)
  assert len([*iterator]) == 16
  iterator.close()
  assert len(made) == len({*made}) > 8 * BLOCK


def test_noise_knows_a_language_by_its_long_code(tmp_path):
  path, tok = tmp_path / 'a.tsv', numbered_rows.sample_tokenizer()
  rows = [f'because you are right {i}\tdes mots {i}\n' for i in range(BLOCK)]
  path.write_text(''.join(rows))

  def made(pair):
    text = bitext.open_bitext([path], pair)
    opened = store.open_store(text, tok, PLAIN, noise=0.5)
    return _lists(opened.block(0))

  assert made('eng-fra_Latn') == made('en-fr') != made('de-fr')


def test_a_block_is_given_up_when_the_process_ends(tmp_path, monkeypatch):
  opened = _open(_text(tmp_path))
  over = types.SimpleNamespace(is_alive=lambda: False)
  monkeypatch.setattr(threading, 'main_thread', lambda: over)
  with pytest.raises(SystemExit):
    opened.block(0)
  assert not _files(opened)


# Whose blocks they are.


def test_the_key_is_that_of_text_tokenizer_template_and_version(
  tmp_path, monkeypatch
):
  text, tok = _text(tmp_path), numbered_rows.sample_tokenizer()
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
    _open(bitext.open_bitext([text.where], 'en-fr', reversed_pair=True)),
    _open(bitext.open_bitext([text.where], 'en-fr', (3, 2))),
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
  monkeypatch.setattr(store, '_VERSION', store._VERSION + 1)
  changed.append(_open(text))
  assert len({key, *(x.key for x in changed)}) == 1 + len(changed)
  assert {x.folder.parent for x in changed} == {_open(text).folder.parent}


def test_other_tokens_have_another_version():
  """Golden: raise store._VERSION when this changes, or old blocks are read."""
  pairs = [lines.Pair('1', 'Hi you', 'Salut !'), lines.Pair('2', 'no', 'non')]
  tok = numbered_rows.sample_tokenizer()
  chat = template_lib.Template('{source} =>', target_bos=True, chat=True)
  plain = template_lib.encode(pairs, tok, PLAIN)
  turns = template_lib.encode(pairs, tok, chat)
  found = [
    np.concatenate([made.tokens, made.sizes, made.target_starts])
    for made in (plain, turns)
  ]
  assert store._VERSION == 1
  assert zlib.crc32(np.concatenate(found)) == 1321244300


# Blocks that are not whole.

DAMAGE = {
  'cut': lambda raw: raw[:-4],
  'no whole number': lambda raw: raw[:-3],
  'empty': lambda raw: b'',
  'zeros': lambda raw: bytes(len(raw)),
  'text': lambda raw: b'not an array....' * 20,
  'sizes': lambda raw: raw[:40] + raw[44:48] + raw[44:],
}


@pytest.mark.parametrize('name', DAMAGE)
def test_a_block_that_is_not_whole_is_made_again(tmp_path, monkeypatch, name):
  opened = _open(_text(tmp_path))
  want = _lists(opened.block(0))
  path = opened.folder / '00000.2.int32'
  path.write_bytes(DAMAGE[name](path.read_bytes()))
  counts = _count(monkeypatch)
  for _ in range(2):  # And not again and again.
    assert _lists(opened.block(0)) == want
    assert sum(counts) == len(opened.members(0))


# What cannot be done is one sentence.


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  opened = _open(_text(tmp_path))
  refusal(lambda: opened.block(0), opened.folder, 'Not a directory')


def _rewrite(path):
  path.write_bytes(path.read_bytes().replace(b'mots', b'MOTS'))
  os.utime(path, ns=(1, 1))  # Else it could be too quick for the clock.


@pytest.mark.parametrize('change', [os.unlink, _rewrite])
def test_a_text_that_changed_in_the_meantime(tmp_path, change):
  text = _text(tmp_path)
  opened = _open(text)
  kept = _lists(opened.block(0))
  change(tmp_path / 'a.tsv')
  with pytest.raises(errors.UserError, match='changed or gone since'):
    opened.block(1)
  assert _files(opened) == ['00000.2.int32']
  assert _lists(opened.block(0)) == kept  # It was made from what there was.
