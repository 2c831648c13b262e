"""Translation compiles a few programs, however many sentences there are."""

import dataclasses
import pathlib

import pytest

from configs import gemma3_270m
from mt.train import machine
from mt.translate import decode
from mt.translate import translator as translator_lib
from tests.benchmarks import recompiles
from tests.benchmarks.sides import ours

_SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared'
_FILE = _SHARED / 'data' / 'MTNT' / 'train' / 'train.en-fr.tsv'


@pytest.mark.heavy
@pytest.mark.skipif(not _FILE.exists(), reason=f'{_FILE} is not there')
def test_a_thousand_sentences_of_like_lengths_share_their_programs():
  """Sources of 56 lengths, 1 to 92 tokens; and no program more the next time.

  The narrow model has the vocabulary, the tokens and the shapes of the real
  one.
  """
  texts = recompiles.sources(_FILE)[:1000]
  compilations = recompiles.Compilations()
  source = ours.open_weights()
  cfg, params = recompiles.narrow_model(source)
  translator = translator_lib.from_config(
    machine.here(gemma3_270m.get_config()),
    dataclasses.replace(source, config=cfg),
  )
  params = decode.unstack(params)
  first = recompiles.run(translator, params, texts, compilations)
  assert 5 < len(first) <= 30, first
  again = recompiles.run(translator, params, texts, compilations)
  assert again == []
