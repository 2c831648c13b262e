"""The searches that the flags of `python -m mt.translate` ask for."""

import dataclasses

import pytest

from configs import default
from mt.translate import __main__ as terminal
from mt.translate import search as search_lib
from tests.fixtures.refusal import refusal
from tests.translate.test_terminal import VALUES


def _searches(of_run=1, mbr_of_run=0, /, **values):
  config = default.get_config()
  config.decode.beam, config.decode.length_penalty = of_run, 0.5
  config.decode.mbr = mbr_of_run
  return terminal.read_search(VALUES | values, config.decode)


def _search(*of_run, **values):
  search, sampling = _searches(*of_run, **values)
  assert sampling is None
  return search


def test_flags_come_before_the_config():
  search = search_lib.Search
  assert _search() == search(length_penalty=0.5)
  assert _search(4) == search(beam=4, length_penalty=0.5)
  assert _search(4, beam=2) == search(beam=2, length_penalty=0.5)
  assert _search(4, length_penalty=0.0) == search(beam=4, length_penalty=0.0)
  assert _search(4, n_best=3, json=True).n_best == 3
  # Drawing takes the place of the run's beam.
  drawn = {'temperature': 0.7, 'top_k': 5, 'top_p': 0.9, 'seed': 3}
  assert _search(4, **drawn) == search(length_penalty=0.5, **drawn)
  assert _search(n_best=9, json=True, temperature=1.0).width == 9


@pytest.mark.parametrize(
  'values, words',
  [
    ({'beam': 2, 'temperature': 1.0}, ('--beam is 2', '--temperature')),
    (
      {'n_best': 3, 'json': True},
      (
        '--n_best is 3, but a beam of 1 has',
        ' --beam=3 or --temperature above 0 expected.',
      ),
    ),
    ({'n_best': 2, 'beam': 2}, ('--n_best is 2', '--json')),
  ],
)
def test_flags_that_cannot_be(values, words):
  refusal(lambda: _search(**values), *words)


def test_what_is_drawn_beside_the_search():
  search, plain = search_lib.Search, search_lib.Search(length_penalty=0.5)
  drawn = search(temperature=0.7, n_best=16)
  assert _searches(mbr='chrf') == (plain, drawn)
  assert _searches(1, 5) == (plain, dataclasses.replace(drawn, n_best=5))
  assert _searches(1, 5, mbr='none') == (plain, None)
  assert _searches(mbr='comet') == (plain, drawn)
  given = {'temperature': 1.0, 'top_p': 0.9, 'n': 8}
  wide = dataclasses.replace(plain, beam=4)
  assert _searches(mbr='chrf', beam=4, **given) == (
    wide,
    search(temperature=1.0, top_p=0.9, n_best=8),
  )
  # What is said against repetitions holds for both.
  averse = {'no_repeat_ngram': 3, 'repetition_penalty': 2.0}
  assert _searches(mbr='chrf', **averse) == (
    dataclasses.replace(plain, **averse),
    dataclasses.replace(drawn, **averse),
  )
  # Drawing takes the place of the run's search.
  of_run = search(length_penalty=0.5, temperature=1.0)
  assert _searches(4, 5, temperature=1.0) == (of_run, None)
  assert _searches(mbr='chrf', n_best=17, json=True)[0].n_best == 17
  refusal(
    lambda: _searches(mbr='chrf', n_best=18, json=True),
    '--n_best is 18, but a beam of 1 and 16 samples have no more',
    ' --beam=2 or --n=17 expected.',
  )


def test_what_has_no_effect_is_said(capsys):
  assert _search(top_k=5).top_k == 5
  told = '--top_k has no effect without --temperature above 0'
  assert told in capsys.readouterr().err
