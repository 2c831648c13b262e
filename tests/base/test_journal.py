import json

import pytest

from mt.base import errors
from mt.base import journal


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with journal.open_metrics(path) as file:
    for step in (0, 1, 2, 3):
      journal.add_metrics(file, {'step': step, 'loss': 1 / 3})
      assert path.read_text().count('\n') == step + 1  # Whatever comes next.
  with open(path, 'ab') as f:
    f.write(b'\xff\0\n{"step": 2, "lo')  # A crash in the middle of a line.
  journal.cut_metrics(path, 2)
  lines = [json.loads(x) for x in path.read_text().splitlines()]
  assert [x['step'] for x in lines] == [0, 1, 2]
  assert lines[0]['loss'] == 1 / 3  # To the last bit.
  journal.cut_metrics(path, -1)
  assert path.read_text() == ''


def test_metrics_that_cannot_be_written(tmp_path):
  with pytest.raises(errors.UserError, match='cannot write it'):
    journal.open_metrics(tmp_path / 'no' / 'metrics.jsonl')
  with (
    open('/dev/full', 'wb', buffering=0) as file,
    pytest.raises(errors.UserError, match='/dev/full: cannot write metrics'),
  ):
    journal.add_metrics(file, {'step': 0})


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
  with journal.open_metrics(path) as file:
    for line in lines:
      journal.add_metrics(file, line)
  assert journal.since_best(path) == waited
