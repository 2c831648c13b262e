"""Pairs to rows: templates, packing, order, positions in the data."""

import dataclasses
import functools
import itertools
import json
import pathlib

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt import batches
from mt import corpus
from mt import errors
from mt import tokenizer

SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'tokenizers'
PLAIN = batches.Template('English: {source}\nFrench:', ' ')


def _pair(source, target='Salut !'):
  return corpus.Pair('1', source, target)


@functools.cache
def _tokenizer():
  pairs = corpus.read_pairs(corpus.split_path('sample', 'valid', 'en-fr'))
  return tokenizer.train([t for p in pairs for t in (p.source, p.target)], 400)


def _gemma(name):
  path = SHARED / name / 'tokenizer.model'
  if not path.exists():
    pytest.skip(f'no {path}')
  proto = sp_pb2.ModelProto.FromString(path.read_bytes())
  # The rebuilt file of Gemma 1 lacks the names of its own special pieces.
  proto.trainer_spec.bos_piece = '<bos>'
  proto.trainer_spec.eos_piece = '<eos>'
  return tokenizer.from_proto(proto.SerializeToString(), str(path))


def _encode(pairs, template=PLAIN, length=1000, tok=None):
  return batches.encode(pairs, tok or _tokenizer(), template, length, 'train')


def _nth(examples, i):
  at = slice(*examples.offsets[i : i + 2])
  return examples.tokens[at].tolist()


# One example.


@pytest.mark.parametrize(
  'template',
  [
    PLAIN,
    batches.Template('{source}\n'),
    batches.Template('Translate this into French:\n{source}\n'),
    batches.Template('{source} =>', ' '),
    batches.Template('{"en": "{source}",\n "fr": "', '{'),
  ],
)
def test_an_example_is_bos_prompt_target_eos(template):
  tok = _tokenizer()
  pairs = [
    _pair('Hi!'),
    _pair('  two  spaces ', ' deux  espaces\u00a0!'),
    # Text that looks like a special piece, or like a template, is text.
    _pair('<s> or <bos> </s> {source} {0} %s', '</s><pad> {source}'),
    _pair('😀 مرحبا', '日本'),
  ]
  examples = _encode(pairs, template)
  assert len(examples) == len(pairs) and examples.too_long == 0
  for i, pair in enumerate(pairs):
    before, after = template.prompt.split('{source}')
    prompt = tok.encode(before + pair.source + after)
    target = tok.encode(template.target_prefix + pair.target)
    ids = _nth(examples, i)
    assert ids == [tok.bos_id, *prompt, *target, tok.eos_id]
    assert ids.count(tok.bos_id) == ids.count(tok.eos_id) == 1
    assert examples.target_starts[i] == 1 + len(prompt)
    row = batches.build_row(examples, [i], len(ids) + 2)
    # Learned: the target and EOS, and nothing else.
    want = (
      [False] * (1 + len(prompt)) + [True] * (len(target) + 1) + [False] * 2
    )
    assert row['target_mask'].tolist() == want
    # Translation starts from what training has before the target.
    got = batches.prompt_ids(pair.source, tok, template)
    assert got == ids[: examples.target_starts[i]]
  assert examples.num_targets == sum(
    len(tok.encode(template.target_prefix + p.target)) + 1 for p in pairs
  )
  assert examples.tokens.dtype == examples.target_starts.dtype == np.int32
  assert examples.offsets.dtype == np.int64


def test_the_second_bos_stands_before_the_target():
  tok = _tokenizer()
  template = dataclasses.replace(PLAIN, target_bos=True)
  ids = _nth(_encode([_pair('Hi!')], template), 0)
  prompt = tok.encode('English: Hi!\nFrench:')
  target = tok.encode(' Salut !')
  assert ids == [tok.bos_id, *prompt, tok.bos_id, *target, tok.eos_id]


def test_the_example_in_the_docstring():
  """With the tokenizer of Gemma 3; kept true, as readers learn from it."""
  tok = _gemma('gemma3')
  shown = {
    words[0]: words[1:]
    for line in batches.__doc__.splitlines()
    if (words := line.split()) and words[0] in ('tokens', 'target_mask')
  }
  examples = _encode([_pair('Hi!', 'Salut !')], tok=tok)
  row = batches.build_row(examples, [0], len(examples.tokens))
  pieces = [tok.spm.id_to_piece(i) for i in row['tokens'].tolist()]
  assert [p.replace('\n', '\\n') for p in pieces] == shown['tokens']
  mask = [str(int(m)) for m in row['target_mask']]
  assert mask == shown['target_mask']
  assert mask[-1] == '1'  # EOS.


def test_a_pair_that_does_not_fit_is_left_out_and_counted():
  pairs = [_pair('a' * n, 'b' * n) for n in (9, 1, 30, 5, 12)]
  sizes = np.diff(_encode(pairs).offsets)
  assert len(set(sizes)) == 5, 'the lengths have to differ'
  examples = _encode(pairs, length=int(sizes[0]))  # The first just fits.
  assert examples.too_long == 2
  kept = [_nth(_encode([pairs[i]]), 0) for i in (0, 1, 3)]
  assert [_nth(examples, i) for i in range(len(examples))] == kept
  # One token less, and it is out: a target is never cut.
  assert _encode(pairs, length=int(sizes[0]) - 1).too_long == 3


def test_no_pair_fits():
  pairs = [
    _pair('somewhat longer text', 'texte'),
    _pair('short', 'court'),
  ] * 600
  shortest = int(np.diff(_encode(pairs[:2]).offsets).min())
  with pytest.raises(errors.UserError) as caught:
    batches.encode(pairs, _tokenizer(), PLAIN, shortest - 1, 'valid')
  message = str(caught.value)
  assert message.startswith('valid: none of its 1,200 pairs fits')
  assert f'data.length={shortest - 1} ' in message
  assert f'the shortest needs {shortest})' in message
  # The advice works.
  assert _encode(pairs, length=shortest).too_long == 600


# Packing.


@st.composite
def _items(draw):
  length = draw(st.integers(1, 70))  # Past 64: the bits of the free space.
  sizes = draw(st.lists(st.integers(1, length), max_size=60))
  return np.array(sizes, np.int64), length


@given(_items())
def test_best_fit(items):
  sizes, length = items
  rows = batches.best_fit(sizes, length)
  assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
  assert all(0 < sum(sizes[i] for i in row) <= length for row in rows)
  assert len(rows) <= len(sizes)
  assert batches.best_fit(sizes, length) == rows
  # Replayed in order: each item went into the fullest row that took it, and a
  # new row was opened only where none did. Ties are free.
  row_of = {i: r for r, row in enumerate(rows) for i in row}
  free = []
  for item, size in enumerate(sizes):
    fitting = [f for f in free if f >= size]
    if row_of[item] == len(free):
      assert not fitting
      free.append(length)
    assert free[row_of[item]] == min(fitting, default=length)
    free[row_of[item]] -= size


def test_best_fit_by_hand():
  # 3 opens a row, 2 closes it; 4, 3: a row each; 1 goes to 4 and not to 3.
  sizes = np.array([3, 2, 4, 3, 1, 5, 2])
  assert batches.best_fit(sizes, 5) == [[0, 1], [2, 4], [3, 6], [5]]


def _examples(sizes):
  """Example i has `sizes[i]` tokens, none of them in another example."""
  sizes = np.array(sizes)
  numbers = np.arange(len(sizes))
  return batches.Examples(
    tokens=np.concatenate(
      [1000 * (i + 1) + np.arange(s) for i, s in enumerate(sizes)]
    ).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    target_starts=np.minimum(1 + numbers % 3, sizes - 1).astype(np.int32),
    too_long=0,
  )


def _recover(examples, row):
  """The examples in a row, in order, after a check of everything in it."""
  found = []
  ids = row['segment_ids']
  count = ids.max()
  used = np.count_nonzero(ids)
  # Segments 1, 2, … one after the other, then padding.
  assert sorted(ids[:used]) == ids[:used].tolist()
  assert set(ids[:used]) == set(range(1, count + 1)) and not ids[used:].any()
  for segment in range(1, count + 1):
    at = ids == segment
    tokens = row['tokens'][at]
    i = tokens[0] // 1000 - 1
    assert tokens.tolist() == _nth(examples, i), 'cut, or mixed up'
    size = len(tokens)
    assert row['positions'][at].tolist() == list(range(size))
    mask = np.arange(size) >= examples.target_starts[i]
    assert row['target_mask'][at].tolist() == mask.tolist()
    found.append(int(i))
  for name in ('tokens', 'positions', 'target_mask'):
    assert not row[name][used:].any(), f'{name} in the padding'
  return found


def test_a_row_by_hand():
  examples = batches.Examples(
    tokens=np.array([2, 7, 8, 1, 2, 0, 9, 9, 1], np.int32),
    offsets=np.array([0, 4, 9]),
    target_starts=np.array([2, 3], np.int32),
    too_long=0,
  )
  row = batches.build_row(examples, [1, 0], 11)
  want = {
    # A token 0 inside an example is text and stays in its segment.
    'tokens': [2, 0, 9, 9, 1, 2, 7, 8, 1, 0, 0],
    'positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
    'segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    'target_mask': [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0],
  }
  assert {k: v.astype(int).tolist() for k, v in row.items()} == want
  assert row.pop('target_mask').dtype == bool
  assert {v.dtype for v in row.values()} == {np.dtype(np.int32)}
  empty = batches.build_row(examples, [], 4)
  assert all(v.shape == (4,) and not v.any() for v in empty.values())


# Rows by number.

LENGTH = 20
_SIZES = np.random.default_rng(5).integers(2, LENGTH + 1, 40)


def _rows(num_rows=200, seed=0, packing=True, sizes=_SIZES):
  return batches.PackedRows(_examples(sizes), LENGTH, seed, num_rows, packing)


def _epochs(rows, number):
  """Which examples each row of each epoch has: [epoch][row][…]."""
  at, out = 0, []
  for epoch in range(number):
    end = at + rows.epoch_size(epoch)
    out.append([_recover(rows.examples, rows[i]) for i in range(at, end)])
    at = end
  return out


@pytest.mark.parametrize('packing', [True, False])
def test_an_epoch_has_every_example_once(packing):
  rows = _rows(packing=packing)
  epochs = _epochs(rows, 4)
  for epoch in epochs:
    assert sorted(itertools.chain(*epoch)) == list(range(len(_SIZES)))
  if packing:
    full = -(-int(_SIZES.sum()) // LENGTH)
    assert all(full <= len(e) < 0.7 * len(_SIZES) for e in epochs)
  else:
    assert all(len(e) == len(_SIZES) for e in epochs)
    assert all(len(row) == 1 for e in epochs for row in e)
  # Another order each time, of examples and not only of rows.
  orders = [list(itertools.chain(*e)) for e in epochs]
  assert len(set(map(tuple, orders))) == 4
  assert orders[0] != list(range(len(_SIZES)))
  if packing:
    packings = {frozenset(map(frozenset, e)) for e in epochs}
    assert len(packings) == 4


@pytest.mark.parametrize('packing', [True, False])
def test_a_row_is_decided_by_seed_and_number(packing):
  make = functools.partial(_rows, packing=packing, num_rows=100)
  forward = [
    _recover(make().examples, r) for r in map(make().__getitem__, range(100))
  ]
  # Another object, asked backwards and by NumPy's numbers.
  again = make()
  backward = [
    _recover(again.examples, again[np.int64(i)]) for i in reversed(range(100))
  ]
  assert forward == backward[::-1]
  other = make(seed=1)
  assert forward != [_recover(other.examples, other[i]) for i in range(100)]
  # How long training lasts does not change what it starts with.
  longer = make(num_rows=500)
  assert forward == [_recover(longer.examples, longer[i]) for i in range(100)]
  assert (len(again), len(longer)) == (100, 500)


def test_seed_and_epoch_do_not_add_up():
  """Were the order drawn from seed + epoch, runs would share their epochs."""
  zero, one = _epochs(_rows(seed=0), 3), _epochs(_rows(seed=1), 3)
  assert not any(a == b for a in zero for b in one)


def test_half_empty_rows_are_spread_over_the_epoch():
  """Best fit opens them last; steps at an epoch's end would see less."""
  epochs = _epochs(_rows(), 40)
  places = []
  for epoch in epochs:
    fill = [sum(_SIZES[i] for i in row) for row in epoch]
    places.append(np.argmin(fill) / (len(fill) - 1))
  # Uniform would be 0.5, with a deviation of 0.29 / sqrt(40) = 0.05.
  assert 0.3 < np.mean(places) < 0.7


# Batches for training.


def _equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def test_training_batches_are_the_rows_in_order():
  rows = _rows(num_rows=51)
  got = list(batches.train_iterator(rows, 4))
  assert len(got) == 12  # The three rows too few for a batch are left.
  for n, batch in enumerate(got):
    for name, dtype in {
      'tokens': np.int32,
      'positions': np.int32,
      'segment_ids': np.int32,
      'target_mask': bool,
    }.items():
      assert batch[name].shape == (4, LENGTH) and batch[name].dtype == dtype
      want = [rows[4 * n + i][name] for i in range(4)]
      np.testing.assert_array_equal(batch[name], np.stack(want))


def test_a_state_brings_back_the_very_next_batches():
  rows, size = _rows(num_rows=160), 4
  border = rows.epoch_size(0)
  assert border % size, 'a batch should have rows of two epochs'
  whole = list(batches.train_iterator(rows, size))
  assert 4 * len(whole) > border + rows.epoch_size(1) + size
  at = [0, 1, 2, border // size, border // size + 1, len(whole) - 1, len(whole)]

  states = {}
  used = batches.train_iterator(rows, size)
  for n in range(len(whole) + 1):
    if n in at:
      # As the checkpoint keeps it.
      states[n] = json.loads(json.dumps(used.get_state()))
    if n < len(whole):
      _equal(next(used), whole[n])

  for n, state in states.items():
    fresh = batches.train_iterator(_rows(num_rows=160), size)
    if n % 2:  # An iterator that has read ahead must forget what it read.
      next(fresh)
    fresh.set_state(state)
    left = list(fresh)
    assert len(left) == len(whole) - n
    for got, want in zip(left, whole[n:], strict=True):
      _equal(got, want)

  # Backwards, on an iterator at its end.
  used.set_state(states[2])
  _equal(next(used), whole[2])
  assert used.get_state() != states[2]


# Batches for validation.


@pytest.mark.parametrize('size', [1, 4, 64])
def test_evaluation_has_every_example_once(size):
  examples = _examples(_SIZES)
  got = list(batches.eval_batches(examples, LENGTH, size))
  found = []
  for batch in got:
    assert all(v.shape == (size, LENGTH) for v in batch.values())
    for i in range(size):
      found += _recover(examples, {k: v[i] for k, v in batch.items()})
  assert sorted(found) == list(range(len(_SIZES)))
  # Only the end is filled up, and by less than a batch.
  used = [bool(row.any()) for b in got for row in b['segment_ids']]
  assert used == sorted(used, reverse=True)
  assert used.count(False) < size
  for a, b in zip(
    got, batches.eval_batches(examples, LENGTH, size), strict=True
  ):
    _equal(a, b)


def test_evaluation_fills_up_the_last_batch():
  (batch,) = batches.eval_batches(_examples([5, 5, 4]), 5, 4)
  assert batch['segment_ids'].any(axis=1).tolist() == [True, True, True, False]
  assert not batch['target_mask'][3].any()


# The tutorial. What it prints is copied from ../shared/seed_tutorial.ko.txt.

TUTORIAL = batches.Template(
  'Translate this into French:\n{source}\n', '', target_bos=True
)
_PROMPT = [2, 49688, 736, 1280, 6987, 235292, 108]

# "Example 0" and "Example 1" of the tokenizer's test: texts, src, dst.
_PRINTED_SEQUENCES = [
  (
    'The group of “eastern conference potential all stars but not making it '
    'in the West” group.',
    'Le groupe de " toutes les étoiles potentielles de la conférence de '
    "l'Est mais qui ne s'en sortent pas dans le groupe de l'Ouest \".",
    """2  49688    736   1280   6987 235292    108    651   2778    576
    1080 104745  11982   5736    832   8995    901    780   3547    665
    575    573   4589 235369   2778 235265    108""",
    """2   2025  29653    581    664  16298   1437  55563  41435   7840
    581    683 111452    581    533 235303   9776   4108   2459    679
    485 235303    479   6728    579   1806   2499    709  29653    581
    533 235303 101323  16054      1""",
  ),
  (
    'Is Kameron a Little Salty About Her Lack of Air Time?',
    "Kameron est-elle un peu aigrie de son manque de temps à l'écran ?",
    """2  49688    736   1280   6987 235292    108   2437  87150    477
    476  11709 230461   8045   3636  40268    576   4252   4897 235336
    108""",
    """2 213606    477   1455 235290   3510    748   8268 191017   2809
    581   2032  69972    581  11495   1305    533 235303  65978   1654
    1""",
  ),
]

# The two batches of three at max_seq_len=20: input_tokens, and how many False
# and then how many True the target_mask has; False for the rest.
_PRINTED_BATCHES = [
  (
    """2  49688    736   1280   6987 235292    108  10924    665  12302
    235341    108      2   4397  63011   1437  38696   1241      1      0""",
    (12, 7),
  ),
  (
    """2  49688    736   1280   6987 235292    108  13835   1517 235265
    108      2  69875    540  19713 235265      1      0      0      0""",
    (11, 6),
  ),
  (
    """2  49688    736   1280   6987 235292    108   6956   1586 235297
    235265    108      2  78368   1586 235297 235265      1      0      0""",
    (12, 6),
  ),
  (
    """2  49688    736   1280   6987 235292    108  18874 235341    108
    2 115905   6425   1241      1      0      0      0      0      0""",
    (10, 5),
  ),
  (
    """2  49688    736   1280   6987 235292    108   7574   3356 235341
    108      2   7997  20707   1241      1      0      0      0      0""",
    (11, 5),
  ),
  (
    """2  49688    736   1280   6987 235292    108   8703    665 235265
    108      2 235338 235303  90006  20133 235265      1      0      0""",
    (11, 7),
  ),
]


def _ids(printed):
  return [int(i) for i in printed.split()]


@pytest.mark.parametrize('printed', _PRINTED_SEQUENCES, ids=['0', '1'])
def test_the_sequences_of_the_tutorial(printed):
  source, target, src, dst = printed
  tok = _gemma('gemma1')
  examples = _encode([_pair(source, target)], TUTORIAL, tok=tok)
  assert _nth(examples, 0) == _ids(src) + _ids(dst)
  # Without the second BOS, which the model never sees when it translates.
  examples = _encode(
    [_pair(source, target)],
    dataclasses.replace(TUTORIAL, target_bos=False),
    tok=tok,
  )
  assert _nth(examples, 0) == _ids(src) + _ids(dst)[1:]
  assert examples.target_starts[0] == len(_ids(src))


def _printed_rows():
  """Texts read off the printed ids, and our rows for them."""
  tok = _gemma('gemma1')
  pairs = []
  for printed, _ in _PRINTED_BATCHES:
    ids = _ids(printed)
    assert ids[: len(_PROMPT)] == _PROMPT
    second = ids.index(tok.bos_id, 1)
    source = tok.decode(ids[len(_PROMPT) : second - 1])  # 108 is the newline.
    target = tok.decode(ids[second + 1 : ids.index(tok.eos_id)])
    pairs.append(_pair(source, target))
  examples = _encode(pairs, TUTORIAL, length=20, tok=tok)
  assert examples.too_long == 0
  rows = [batches.build_row(examples, [i], 20) for i in range(len(pairs))]
  return examples, rows


def test_the_tokens_of_the_tutorial():
  examples, rows = _printed_rows()
  for row, (tokens, _) in zip(rows, _PRINTED_BATCHES, strict=True):
    assert row['tokens'].tolist() == _ids(tokens)
  # So do the batches of training, in their own order.
  packed = batches.PackedRows(examples, 20, seed=0, num_rows=6, packing=False)
  got = [b['tokens'].tolist() for b in batches.train_iterator(packed, 3)]
  assert sorted(got[0] + got[1]) == sorted(_ids(t) for t, _ in _PRINTED_BATCHES)


def test_the_masks_of_the_tutorial():
  """They begin at the second BOS, which is part of what the tutorial learns."""
  _, rows = _printed_rows()
  for row, (_, (before, learned)) in zip(rows, _PRINTED_BATCHES, strict=True):
    want = [False] * before + [True] * learned
    want += [False] * (20 - len(want))
    assert row['target_mask'].tolist() == want
