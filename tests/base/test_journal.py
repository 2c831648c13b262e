import json

import pytest

from mt.base import journal


def test_plain_lines_where_there_is_no_terminal(capsys):
  progress = journal.Progress('step', 5, every=2)
  for done in range(1, 6):
    progress.update(done, f'loss {done}')
  lines = capsys.readouterr().out.splitlines()
  assert [x.split('  ')[:2] for x in lines] == [
    ['step 2/5', 'loss 2'],
    ['step 4/5', 'loss 4'],
    ['step 5/5', 'loss 5'],
  ]
  silent = journal.Progress('translating', 3)
  silent.update(3)
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  'scores, waited',
  [
    ([], 0),
    ([1.0], 0),
    ([1.0, 2.0], 0),
    ([2.0, 1.0], 1),
    ([1.0, 2.0, 2.0, 1.5], 2),  # As good is not better.
    ([2.0, 1.0, 2.5, 2.0], 1),
    ([0.0, 0.0], 1),
  ],
)
def test_validations_without_a_better_chrf(tmp_path, scores, waited):
  path = tmp_path / 'metrics.jsonl'
  assert journal.since_best(path) == 0
  # The pretrained model was better than all of them.
  lines = [{'step': 0, 'valid_loss': 1.0, 'valid_chrf': 99.0}]
  for i, chrf in enumerate(scores):
    lines.append({'step': 2 * i + 1, 'loss': 1.0})
    lines.append({'step': 2 * i + 2, 'valid_loss': 1.0})
    lines.append({'step': 2 * i + 2, 'valid_chrf': chrf})
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert journal.since_best(path) == waited
