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


def test_differences_are_named():
  old = {'a': {'x': 1, 'y': (1, 2)}, 'b': 0}
  new = {'a': {'x': 2, 'y': (1, 2)}, 'c': 0}
  assert list(run_folder.differences(old, new)) == [
    ('a.x', 1, 2),
    ('b', 0, None),
    ('c', None, 0),
  ]
