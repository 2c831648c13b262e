"""All that a run reads: rows, validation batches, and what says who it was."""

import pathlib

import numpy as np
import pytest

from configs import default
from mt.data import bitext
from mt.data import corpus
from mt.data import splits
from mt.gemma import sharding
from tests.fixtures import numbered_rows
from tests.fixtures.refusal import refusal


def _write(path, lengths, word='mot'):
  """A pair of each length, in words, on both sides."""
  path.write_text(
    ''.join(
      f'{i}{" word" * n}\t{i}{f" {word}" * n}\n' for i, n in enumerate(lengths)
    )
  )
  return str(path)


@pytest.fixture
def config(tmp_path):
  c = default.get_config()
  c.data.source = _write(tmp_path / 'train.tsv', [*range(9)] * 4)
  c.data.valid = _write(tmp_path / 'valid.tsv', range(1, 13))
  c.data.length = 64
  c.train.max_steps, c.train.batch_size = 30, 4
  return c


def _read(config, mesh=None):
  tok = numbered_rows.sample_tokenizer()
  texts = corpus.read_splits(config.data, corpus.splits(config))
  return splits.read(config, tok, texts, mesh)


# Training.


def test_batches_are_those_of_the_config(config):
  got = list(_read(config).train)
  # train.max_steps, over several epochs, none like the other.
  assert len(got) == len({b['tokens'].tobytes() for b in got}) == 30
  assert {x.shape for b in got for x in b.values()} == {(4, 64)}
  assert max(b['segment_ids'].max() for b in got) > 1
  numbered_rows.all_equal(list(_read(config).train), got)
  config.seed = 1
  other = list(_read(config).train)
  assert any(
    (a['tokens'] != b['tokens']).any() for a, b in zip(got, other, strict=True)
  )


def test_each_process_reads_its_part(config, monkeypatch):
  whole = list(_read(config).train)
  for process in (0, 1):
    own = list(range(2 * process, 2 * process + 2))
    monkeypatch.setattr(sharding, 'own_rows', lambda *_, own=own: own)
    part = slice(2 * process, 2 * process + 2)
    numbered_rows.all_equal(
      list(_read(config, mesh='of two processes').train),
      [{k: v[part] for k, v in b.items()} for b in whole],
    )


def _sources(config, tmp_path, weights=()):
  """Two more, told apart by their words, of 36, 12 and 4 pairs."""
  config.data.source = ','.join(
    [
      config.data.source,
      _write(tmp_path / 'b.tsv', [3] * 12, 'XX'),
      _write(tmp_path / 'c.tsv', [3] * 4, 'YY'),
    ]
  )
  config.data.weights = weights
  config.data.packing = False
  config.train.max_steps = 260


@pytest.mark.parametrize(
  ('weights', 'shares'),
  [((), (36, 12, 4)), ((1, 1, 2), (1, 1, 2)), ((0.7, 0.2, 0.1), (7, 2, 1))],
)
def test_sources_are_mixed(config, tmp_path, weights, shares):
  """Without weights, in proportion to their pairs: every row is a pair."""
  _sources(config, tmp_path, weights)
  tok = numbered_rows.sample_tokenizer()
  counts = np.zeros(3)
  for batch in _read(config).train:
    for tokens in batch['tokens'].tolist():
      text = tok.decode(tokens)
      counts[('XX' in text) + 2 * ('YY' in text)] += 1
  assert counts.sum() == 1040
  want = 1040 * np.array(shares) / sum(shares)
  np.testing.assert_allclose(counts, want, atol=2)


# Whose data it was.


def test_the_digest_changes_with_what_is_learned(config, tmp_path):
  digests = [_read(config).train_digest]
  assert _read(config).train_digest == digests[0]

  def changed():
    digests.append(_read(config).train_digest)

  config.data.length = 60
  changed()
  config.template.prompt += ' '
  changed()
  config.template.target_prefix = ''
  changed()
  _write(tmp_path / 'train.tsv', [*range(9)] * 4, 'mots')
  changed()
  _sources(config, tmp_path)
  changed()
  config.data.weights = (36, 12, 5)
  changed()
  config.data.source = ','.join(reversed(config.data.source.split(',')))
  changed()
  assert len(set(digests)) == len(digests)


def test_the_digest_does_not_change_with_other_things(config, tmp_path):
  digest = _read(config).train_digest
  # More steps of the same, other validation, another place.
  config.train.max_steps = 99
  config.data.valid = _write(tmp_path / 'v.tsv', [3, 4], 'autre')
  config.data.source = _write(tmp_path / 'moved.tsv', [*range(9)] * 4)
  assert _read(config).train_digest == digest


# Validation and scores.


def _rows_of(valid):
  return [
    row[ids == segment].tolist()
    for batch in valid
    for row, ids in zip(batch['tokens'], batch['segment_ids'], strict=True)
    for segment in range(1, ids.max() + 1)
  ]


def test_validation_has_the_first_pairs_that_fit(config):
  got = _read(config)
  assert {b['tokens'].shape for b in got.valid} == {(4, 64)}
  lengths = sorted(map(len, _rows_of(got.valid)))
  assert 0 < len(lengths) < 12 and lengths[-1] <= 64  # Some do not fit.
  # What does not fit is scored all the same.
  assert [p.source for p in got.scored['valid']] == [
    p.source for p in bitext.open_bitext([config.data.valid], 'en-fr').read()
  ]
  config.eval.loss_pairs = 3
  few = _rows_of(_read(config).valid)
  assert len(few) == 3
  assert [
    numbered_rows.sample_tokenizer().decode(r).count('word')
    for r in sorted(few)
  ] == [1, 2, 3]


def test_scored_pairs(config, tmp_path):
  config.data.test = _write(tmp_path / 'test.tsv', [2] * 7)
  config.data.allow_leaks = True
  assert {k: len(v) for k, v in _read(config).scored.items()} == {'valid': 12}
  config.eval.test = True
  config.eval.translate_pairs = 5
  scored = _read(config).scored
  assert {k: len(v) for k, v in scored.items()} == {'valid': 5, 'test': 5}
  assert [p.id for p in scored['valid']] == ['1', '2', '3', '4', '5']


# What is said, and what is refused.


def test_what_became_of_the_pairs_is_said(config, capsys, tmp_path):
  long = [*range(9)] * 4 + [70, 80]
  config.data.source = _write(tmp_path / 'train.tsv', long)
  config.data.length = 48
  config.eval.loss_pairs = 10
  rows = _read(config).train
  said = capsys.readouterr().out
  tok = numbered_rows.sample_tokenizer()
  texts = corpus.read_splits(config.data, ['train'])['train']
  (source,), _ = splits.training_rows(config, tok, texts)
  examples, plan = source.block(0)
  # By hand, from the examples themselves.
  kept = [i for i in range(38) if examples.sizes[i] <= 48]
  tokens = sum(int(examples.sizes[i]) for i in kept)
  prompts = sum(int(examples.target_starts[i]) for i in kept)
  dropped = 38 - len(kept)
  assert dropped >= 2
  assert (
    f'train: 38 pairs, {dropped} dropped (more than data.length=48 tokens), '
    f'{tokens:,} tokens, {tokens - prompts:,} of them targets, in {len(plan)} '
    f'rows, {1 - tokens / (48 * len(plan)):.1%} of which is padding\n'
  ) in said
  assert f'train: {config.data.source}: 38 lines, 38 pairs\n' in said
  assert f'valid: {config.data.valid}: 12 lines, 12 pairs\n' in said
  found = _rows_of(_read(config).valid)
  assert (
    f'valid: 10 pairs for the loss, {10 - len(found)} of them dropped; '
  ) in said
  rows.close()


def test_a_validation_of_which_nothing_fits(config):
  _write(pathlib.Path(config.data.valid), [40, 30, 50])
  words = config.data.valid, 'none of its pairs fits', 'data.length=64 '
  refusal(lambda: _read(config), *words, 'raise data.length')


def test_one_source_of_several_of_which_nothing_fits(config, tmp_path):
  """Else the others would be trained on in silence."""
  path = tmp_path / 'long.tsv'
  config.data.source += ',' + _write(path, [200, 100])
  refusal(lambda: _read(config), path, 'none of its pairs fits')


# The sample of training pairs.


def test_a_sample_of_training_pairs(config):
  assert _read(config).minitrain == []
  config.eval.minitrain_pairs = 5
  first, again = _read(config).minitrain, _read(config).minitrain
  numbered_rows.all_equal(first, again)
  assert sum(int(b['segment_ids'].max(1).sum()) for b in first) == 5
  config.seed = 1
  other = _read(config).minitrain
  assert not np.array_equal(first[0]['tokens'], other[0]['tokens'])
  config.eval.minitrain_pairs, config.eval.loss_pairs = 30, 4
  capped = _read(config).minitrain
  assert sum(int(b['segment_ids'].max(1).sum()) for b in capped) == 4


def test_a_sample_of_which_nothing_is_used(config, tmp_path, capsys):
  """Most lines are left out by data.filter, and few are drawn."""
  (tmp_path / 'train.tsv').write_text('a b\tc d\n' * 300 + 'e f\tg h\n')
  config.data.filter, config.eval.minitrain_pairs = 'duplicates', 1
  assert _read(config).minitrain == []
  assert 'minitrain: none of the training lines' in capsys.readouterr().out


def test_the_sample_is_drawn_by_share(tmp_path):
  texts = [
    bitext.open_bitext(
      [_write(tmp_path / f'{word}.tsv', range(50), word)], 'en-fr'
    )
    for word in ('mot', 'motus')
  ]
  drawn = splits.draw(texts, [0.9, 0.1], 40, seed=0)
  pairs = [pair for of_text in drawn for pair in of_text]
  assert len(pairs) == len(set(pairs)) == 40
  own = [{p.target for p in text.read()} for text in texts]
  counts = [sum(p.target in o - {'0'} for p in pairs) for o in own]
  assert counts[0] > 25 and 0 < counts[1] < 15
  assert [len(d) for d in splits.draw(texts, [1.0, 0.0], 80, seed=0)] == [50, 0]


def test_a_sample_that_does_not_fit(config):
  config.data.source = _write(
    pathlib.Path(config.data.source), [1] + [300] * 40
  )
  config.eval.minitrain_pairs = 1
  refusal(lambda: _read(config), 'eval.minitrain_pairs=1', 'data.length=64')


# Several directions.


@pytest.mark.parametrize(
  ('temperature', 'shares'), [(1.0, (36, 4)), (2.0, (6, 2))]
)
def test_directions_are_mixed_by_temperature(
  config, tmp_path, temperature, shares
):
  """Each with the names of its languages; a resume goes on with the same."""
  for pair, number in (('en-fr', 36), ('en-ja', 4)):
    _write(tmp_path / f'm.{pair}.tsv', [3] * number)
  config.data.source = str(tmp_path / 'm.{pair}.tsv')
  config.data.pair, config.data.temperature = 'en-fr,en-ja', temperature
  config.data.valid = str(tmp_path / '{lang}.valid')
  for language in ('en', 'fr', 'ja'):
    (tmp_path / f'{language}.valid').write_text(f'{language}\n')
  config.data.packing, config.train.max_steps = False, 40
  got = _read(config)
  assert list(got.scored) == ['valid-en-fr', 'valid-en-ja']
  tok, made = numbered_rows.sample_tokenizer(), list(got.train)
  texts = [tok.decode(row) for b in made for row in b['tokens'].tolist()]
  japanese = sum('Japanese:' in text for text in texts)
  assert japanese + sum('French:' in text for text in texts) == 160
  want = 160 * shares[1] / sum(shares)
  assert abs(japanese - want) <= 2
  # The loss of validation is of both.
  assert sum(int(b['segment_ids'].max(1).sum()) for b in got.valid) == 2
  resumed = _read(config).train
  resumed.set_state({'batches_taken': 17})
  numbered_rows.all_equal(list(resumed), made[17:])
  config.data.temperature += 1
  assert _read(config).train_digest != got.train_digest


# Noise.


def test_noise_is_drawn_anew_each_epoch_and_again_by_a_resume(
  config, monkeypatch
):
  monkeypatch.setattr(splits.store, '_BLOCK', 18)  # Two blocks.
  clean = _read(config)
  config.data.noise = 0.5
  noisy = _read(config)
  numbered_rows.all_equal(noisy.valid, clean.valid)
  tok, made = numbered_rows.sample_tokenizer(), list(noisy.train)
  sources, targets = [], []
  for batch in made:
    text = ''.join(tok.decode(row) for row in batch['tokens'].tolist())
    sources += [x.partition('\nFrench:')[0] for x in text.split('English: ')]
    learned = batch['tokens'][batch['target_mask']]
    targets += tok.decode(learned.tolist()).split()
  # Nothing in the targets, and not twice the same in the sources.
  assert {t for t in targets if not t.isdigit()} == {'mot'}
  long = [x for x in sources if len(x) > 24]
  assert len(long) > 40 and len({*long}) > 0.9 * len(long)
  resumed = _read(config).train
  resumed.set_state({'batches_taken': 17})
  numbered_rows.all_equal(list(resumed), made[17:])
  numbered_rows.wait_for_blocks()
