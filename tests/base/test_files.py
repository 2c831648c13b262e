"""Files and folders are written whole or not at all."""

import os

import pytest

from configs import default
from mt.base import files
from mt.base import run_folder
from tests.fixtures.refusal import refusal


def test_lines_come_back_as_they_were(tmp_path):
  lines = ['a', '', ' b ', 'c\rd', 'e\x0bf\x85g\u2028h', 'é 😂']
  files.write_lines(tmp_path / 'x.txt', lines)
  assert files.read_lines(tmp_path / 'x.txt') == lines
  files.write_lines(tmp_path / 'x.txt', ['one\ntwo'])
  assert files.read_lines(tmp_path / 'x.txt') == ['one two']


def test_damaged_files_are_one_sentence(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_bytes(b'caf\xe9\n')
  refusal(lambda: files.read_lines(path), path, 'not UTF-8 at byte 3')
  refusal(lambda: files.read_json(path), path, 'not UTF-8')
  path.write_text('{"a": ')
  refusal(lambda: files.read_json(path), path, 'damaged JSON')
  path.unlink()
  refusal(lambda: files.read_lines(path), path, 'cannot read it')


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'new' / 'x'
  with files.new_file(path) as f:
    f.write(b'old')
    assert not path.exists()
  with pytest.raises(ZeroDivisionError), files.new_file(path) as f:
    f.write(1 / 0)
  assert path.read_text() == 'old'
  files.write(path, 'é')
  assert path.read_bytes() == 'é'.encode()
  assert [p.name for p in path.parent.iterdir()] == ['x']

  def into_a_file():
    with files.new_file(path / 'y'):
      raise AssertionError

  refusal(into_a_file, path, 'cannot write', '--workdir')


def test_who_writes_the_same_file_is_in_no_ones_way(tmp_path):
  """Processes of several containers, which share a cache, have one number."""
  path = tmp_path / 'a'
  with files.new_file(path) as f:
    f.write(b'one')
    with files.new_file(path) as other:
      other.write(b'another')
    assert path.read_bytes() == b'another'
  assert path.read_bytes() == b'one' and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('target', ['there', 'not yet'])
def test_a_link_stays(tmp_path, target):
  (tmp_path / 'there').write_text('old')
  (tmp_path / 'link').symlink_to(target)
  files.write(tmp_path / 'link', 'new')
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / target).read_text() == 'new'


def test_a_pipe_is_written_to_and_stays(tmp_path):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # Waits for no writer.
  files.write(pipe, 'text')
  assert os.read(reader, 9) == b'text'
  os.close(reader)
  assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_the_folder_appears_when_it_is_whole(tmp_path):
  out = tmp_path / 'out'
  with files.new_folder(out) as part:
    (part / 'a').write_text('')
    assert not out.exists()
  assert [p.name for p in out.iterdir()] == ['a']


def test_what_a_killed_program_left_is_in_no_ones_way(tmp_path):
  """In a container the next one has the same number, and the same name."""
  left = tmp_path / f'out.{os.getpid()}.part'
  left.mkdir()
  (left / 'half').write_text('')
  with files.new_folder(tmp_path / 'out') as part:
    (part / 'a').write_text('')
  assert [p.name for p in tmp_path.rglob('*')] == ['out', 'a']


def test_a_mount_is_refused_before_it_is_too_late(tmp_path, monkeypatch):
  """Nothing can take its place."""
  monkeypatch.setattr(type(tmp_path), 'is_mount', lambda _: True)
  refusal(lambda: files.check_new(tmp_path), tmp_path, 'name a new folder')


def test_a_race_for_the_folder_is_lost_politely(tmp_path):
  out = tmp_path / 'out'

  def other_was_faster():
    with files.new_folder(out) as part:
      (part / 'a').write_text('')
      out.mkdir()
      (out / 'precious').write_text('')

  refusal(other_was_faster, out, 'there already')
  assert [p.name for p in out.iterdir()] == ['precious']


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')

  def into_a_file():
    with files.new_folder(tmp_path / 'file' / 'out'):
      raise AssertionError

  refusal(into_a_file, tmp_path / 'file', 'cannot write', '--out')


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.model'])
def test_the_folder_of_a_model_is_no_workdir(tmp_path, name):
  (tmp_path / name).write_text('{}')
  config = default.get_config()
  refusal(lambda: run_folder.claim(tmp_path, config), tmp_path, name, 'lost')
  assert [p.name for p in tmp_path.iterdir()] == [name]
  assert (tmp_path / name).read_text() == '{}'


def test_the_folder_of_a_model_is_no_run(tmp_path):
  """Else its weights would be those of the default config."""
  (tmp_path / 'config.json').write_text('{"model_type": "gemma3_text"}')
  path = tmp_path / 'config.json'
  refusal(lambda: run_folder.read_config(tmp_path), path, '--workdir')


def test_differences_are_named():
  old = {'a': {'x': 1, 'y': (1, 2)}, 'b': 0}
  new = {'a': {'x': 2, 'y': (1, 2)}, 'c': 0}
  assert list(run_folder.differences(old, new)) == [
    ('a.x', 1, 2),
    ('b', 0, None),
    ('c', None, 0),
  ]
