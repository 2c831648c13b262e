"""The rows and batches that the tutorial prints (its text is the origin)."""

import dataclasses

import pytest

from mt.data import batches
from mt.data import bitext
from mt.data import epochs
from mt.data import lines
from mt.data import store
from mt.data import template as template_lib
from tests.fixtures import numbered_rows

TUTORIAL = template_lib.Template(
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


def _pair(source, target):
  return lines.Pair('1', source, target)


def _ids(printed):
  return [int(i) for i in printed.split()]


@pytest.mark.parametrize('printed', _PRINTED_SEQUENCES, ids=['0', '1'])
def test_the_sequences_of_the_tutorial(printed):
  source, target, src, dst = printed
  tok = numbered_rows.gemma('gemma1')
  examples = template_lib.encode([_pair(source, target)], tok, TUTORIAL)
  assert examples.ids(0).tolist() == _ids(src) + _ids(dst)
  # Without the second BOS, which the model never sees when it translates.
  template = dataclasses.replace(TUTORIAL, target_bos=False)
  examples = template_lib.encode([_pair(source, target)], tok, template)
  assert examples.ids(0).tolist() == _ids(src) + _ids(dst)[1:]
  assert examples.target_starts[0] == len(_ids(src))


def test_the_batches_of_the_tutorial(tmp_path):
  """From a file to the padded batches of training, in their own order.

  The texts are read off the printed ids. What is learned begins at the second
  BOS, which is part of it in the tutorial.
  """
  tok = numbered_rows.gemma('gemma1')
  pairs, want = [], []
  for printed, (before, learned) in _PRINTED_BATCHES:
    ids = _ids(printed)
    assert ids[: len(_PROMPT)] == _PROMPT
    second = ids.index(tok.bos_id, 1)
    source = tok.decode(ids[len(_PROMPT) : second - 1])  # 108 is the newline.
    target = tok.decode(ids[second + 1 : ids.index(tok.eos_id)])
    pairs.append(_pair(source, target))
    rest = 20 - before - learned
    want.append((ids, [False] * before + [True] * learned + [False] * rest))
  path = tmp_path / 'a.tsv'
  path.write_text(
    ''.join(f'{p.source}\t{p.target}\n' for p in pairs), encoding='utf-8'
  )
  text = bitext.open_bitext([path], 'en-fr')
  made = store.open_store(text, tok, TUTORIAL)
  rows = epochs.Epochs(made, 20, 0, packing=False, group=3)
  got = list(batches.TrainBatches([rows], [6], 3, 2))
  assert [b['tokens'].shape for b in got] == [(3, 20)] * 2
  found = [
    (tokens.tolist(), mask.tolist())
    for b in got
    for tokens, mask in zip(b['tokens'], b['target_mask'], strict=True)
  ]
  assert sorted(found) == sorted(want)
