"""Loading needs little more memory than the parameters take."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.benchmarks import memory
from tests.fixtures import gguf_fixture

_ROOT = pathlib.Path(__file__).parents[2]
_BYTES = 700e6  # Enough for what a process takes anyhow not to matter.


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/clear_refs').exists(),
  reason='the peak of a process is read from /proc, which Linux has',
)
@pytest.mark.parametrize('kind', ('float32', 'bfloat16', 'gguf'))
def test_the_peak_is_1_3_times_the_parameters_and_one_tensor(tmp_path, kind):
  # In float32 the file is as large as the result: kept in memory beside it, or
  # each leaf made twice, would be far above.
  path = tmp_path / 'weights'
  if kind == 'gguf':
    cfg, params = memory.zeros(_BYTES)
    proto = gguf_fixture.train_proto()
    gguf_fixture.write_gguf(path, cfg, params, proto)
  else:
    memory.make(path, _BYTES / (2 if kind == 'bfloat16' else 1), kind)
  done = subprocess.run(
    [sys.executable, '-m', 'tests.benchmarks.memory', str(path)],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert done.stdout.startswith('parameters '), done.stderr
  assert done.returncode == 0, done.stdout
