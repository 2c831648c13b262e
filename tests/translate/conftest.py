"""Most of the time of this room's tests is compiling."""

import pytest


@pytest.fixture(scope='module', autouse=True)
def compiled_quickly(quick_compilation):
  """For every file of the room."""
