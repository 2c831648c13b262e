"""Names of accelerators that are not here."""

import importlib.util

import pytest

from mt.train import targets
from tests.fixtures.refusal import refusal


@pytest.mark.parametrize(
  'on', ['h1000', 'h100:x', 'h100:0', 'h100:2x4', 'v5e', 'v5e:8', 'v5e:2x4x4x4']
)
def test_another_name_is_refused_with_those_there_are(on):
  refusal(
    lambda: targets.compile_only(on), f'--on={on}:', 'h100, h200', 'v5e:2x4'
  )


@pytest.mark.parametrize('on', ['h100', 'l4:8', 'v5e:2x4', 'v5p:2x2x2'])
def test_without_compilers_the_command_that_installs_them_is_named(
  on, monkeypatch
):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  refusal(
    lambda: targets.compile_only(on), f'make plan ON={on} CONFIG=', 'a guess'
  )


@pytest.mark.parametrize(
  'kind, name',
  [
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA A100-SXM4-40GB', 'a100'),
    ('NVIDIA GeForce RTX 4090', 'rtx4090'),
    ('NVIDIA RTX PRO 6000 Blackwell Workstation Edition', 'rtx6000pro'),
    ('NVIDIA L4', 'l4'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
  ],
)
def test_a_device_that_is_here_is_known_by_its_kind(kind, name):
  assert targets.chip_of(kind) is targets.CHIPS[name]


@pytest.mark.parametrize(
  'kind',
  [
    'cpu',
    'NVIDIA L40S',
    'NVIDIA H100 PCIe',
    'NVIDIA H100 NVL',
    'NVIDIA H200 NVL',
    'NVIDIA GeForce RTX 4090 Laptop GPU',
  ],
)
def test_a_device_of_other_rates_has_no_estimate(kind):
  assert targets.chip_of(kind) is None
