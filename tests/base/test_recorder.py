"""Event files, read back by a reader of our own.

A TFRecord is a length (uint64), its masked CRC-32C, the data, and theirs
(tensorflow/core/lib/io/record_writer.h).
"""

import json
import os
import struct

import pytest
from tensorboardX.proto import event_pb2

from configs import default
from mt.base import journal
from mt.base import recorder
from tests.fixtures.refusal import refusal


def _crc32c(data):
  """Castagnoli's CRC, bit by bit (RFC 3720, appendix B.4)."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def _masked(data):
  crc = _crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_reader_itself():
  assert (
    _crc32c(b'123456789') == 0xE3069283
  )  # RFC 3720's algorithm, check value.


def _read(workdir):
  """[(tag, step, value)] of all event files of a run."""
  out = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (size,) = struct.unpack_from('<Q', content, at)
      header = content[at : at + 8]
      data = content[at + 12 : at + 12 + size]
      assert struct.unpack_from('<I', content, at + 8)[0] == _masked(header)
      assert struct.unpack_from('<I', content, at + 12 + size)[0] == _masked(
        data
      )
      event = event_pb2.Event.FromString(data)
      if at == 0:
        assert event.file_version == 'brain.Event:2'
      out += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
      at += size + 16
  return out


def test_events_are_those_of_metrics_jsonl(tmp_path):
  made = recorder.Recorder(tmp_path, default.get_config(), -1)
  made.add({'step': 0, 'valid_loss': 2.5})
  made.add({'step': 1, 'loss': 0.1, 'targets': 12, 'bad': None})
  made.close()
  assert _read(tmp_path) == [
    ('valid_loss', 0, 2.5),
    ('loss', 1, pytest.approx(0.1)),
    ('targets', 1, 12.0),
  ]


def test_a_resumed_run_has_every_step_once(tmp_path):
  metrics = tmp_path / 'metrics.jsonl'
  for _ in range(2):
    made = recorder.Recorder(tmp_path, default.get_config(), 2)
    first = len(list(journal.read_metrics(metrics))) + 1
    for step in range(first, 5):
      made.add({'step': step, 'loss': step / 4})
    made.close()
    if first == 1:  # As if it were of an earlier second.
      (path,) = (tmp_path / 'tensorboard').iterdir()
      path.rename(path.with_name('events.out.tfevents.1.host'))
  assert _read(tmp_path) == [('loss', s, s / 4) for s in (1, 2, 3, 4)]


def test_a_resume_does_not_wait_for_the_disk_at_each_step(
  tmp_path, monkeypatch
):
  config, steps = default.get_config(), range(20)
  lines = (json.dumps({'step': n, 'loss': n / 4}) for n in steps)
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  flushed = []
  monkeypatch.setattr(os, 'fsync', flushed.append)
  made = recorder.Recorder(tmp_path, config, 20)
  assert len(flushed) < 5
  # And all are there before the next step is.
  assert _read(tmp_path) == [('loss', n, n / 4) for n in steps]
  made.add({'step': 20})
  assert len(flushed) < 6
  made.close()


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'tensorboard').write_text('')
  config = default.get_config()
  refusal(
    lambda: recorder.Recorder(tmp_path, config, -1),
    *(tmp_path, 'cannot write', '--workdir'),
  )


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
  path, config = tmp_path / 'metrics.jsonl', default.get_config()
  made = recorder.Recorder(tmp_path, config, -1)
  for step in (0, 1, 2, 3):
    made.add({'step': step, 'loss': 1 / 3})
    assert path.read_text().count('\n') == step + 1  # Whatever comes next.
  made.close()
  with open(path, 'ab') as f:
    f.write(b'\xff\0\n{"step": 2, "lo')  # A crash in the middle of a line.
  recorder.Recorder(tmp_path, config, 2).close()
  lines = [json.loads(x) for x in path.read_text().splitlines()]
  assert [x['step'] for x in lines] == [0, 1, 2]
  assert lines[0]['loss'] == 1 / 3  # To the last bit.
  recorder.Recorder(tmp_path, config, -1).close()
  assert path.read_text() == ''


def test_metrics_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  refusal(
    lambda: recorder.Recorder(tmp_path / 'file', default.get_config(), -1),
    *(tmp_path / 'file', 'cannot write it'),
  )
  with open('/dev/full', 'wb', buffering=0) as file:
    refusal(
      lambda: journal.add_metrics(file, {'step': 0}),
      '/dev/full: cannot write metrics',
    )
