"""Configs with other values train or are one sentence, see config_fuzz.py."""

import pytest

from tests.stress import config_fuzz


def test_a_few_mutated_configs():
  counts = config_fuzz.run(8, seed=0)
  assert counts['refused'] > 2


@pytest.mark.heavy
@pytest.mark.parametrize('seed', range(1, 11))
def test_mutated_configs(seed):
  counts = config_fuzz.run(100, seed)
  assert counts['refused'] > 30 and counts['trained'] > 10
