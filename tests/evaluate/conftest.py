"""What the tests of the pages share."""

import pytest

from configs import default
from mt.base import files
from mt.evaluate import report
from tests.evaluate import pages


@pytest.fixture
def folder(tmp_path):
  """A run's folder, without a run."""
  config = default.get_config()
  config.train.max_steps = 20
  config.optim.learning_rate = 0.5
  config.data.source = '<script>evil()</script>'
  files.write_json(tmp_path / 'config.json', config.to_dict())
  environment = {'python': '3.11', 'command': ['train.py', '--x=</table>']}
  files.write_json(tmp_path / 'environment.json', environment)
  for step in range(21):
    line = {'step': step, 'loss': 3 - step / 10, 'targets_per_s': 50 + step}
    pages.add_metrics(tmp_path, line)
  return tmp_path


@pytest.fixture
def curves(monkeypatch):
  """title -> name -> number of points, of what a page shows."""
  shown = {}

  def lines(title, series):
    shown[title] = {name: len(points) for name, points in series}
    return '<svg></svg>'

  monkeypatch.setattr(report.chart, 'lines', lines)
  return shown
