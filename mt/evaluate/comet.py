"""COMET (Rei et al. 2020, arXiv 2009.09025), in an environment of its own.

`make comet` makes it: COMET wants torch and an older numpy. A model is the path
of a .ckpt, or a name such as Unbabel/wmt22-comet-da, which COMET fetches; those
without references (CometKiwi) leave them aside. A .ckpt is trusted like code.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import chex
import numpy as np
from sacrebleu import significance

from mt.base import errors
from mt.translate import mbr

PYTHON = pathlib.Path(__file__).parents[2] / '.venv-comet' / 'bin' / 'python'
_PROGRAM = pathlib.Path(__file__).with_name('comet_program.py')
Ask = Callable[[dict[str, Any]], dict[str, Any]]
_RESAMPLES, _SEED = 1000, 12345  # As sacreBLEU has them.


def find() -> pathlib.Path:
  """The Python that has COMET; errors.UserError where there is none."""
  if not PYTHON.exists():
    raise errors.UserError(f'--comet: there is no {PYTHON}; run `make comet`.')
  return PYTHON


@contextlib.contextmanager
def _running(model: str) -> Iterator[tuple[Ask, dict[str, str]]]:
  """COMET in a process of its own: what asks it, and what it says it is.

  Requests and answers: see comet_program.py.
  """
  with (
    tempfile.TemporaryFile('w+', errors='replace') as said,
    subprocess.Popen(
      [find(), '-P', _PROGRAM, model],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=said,
      encoding='utf-8',
    ) as process,
  ):

    def ask(request=None):
      with contextlib.suppress(BrokenPipeError):
        if request:
          print(json.dumps(request), file=process.stdin, flush=True)
      answer = process.stdout.readline()
      if not answer:
        with contextlib.suppress(BrokenPipeError):  # Else raised at the end.
          process.stdin.close()
        process.wait()
        said.seek(0)
        last = said.read().strip().splitlines()[-1:] or ['it was killed']
        raise errors.UserError(
          f'--comet={model}: COMET cannot score with it ({last[0][:300]}); the '
          "path of a .ckpt, or a model's name and a network expected."
        )
      return json.loads(answer)

    try:
      yield ask, ask()
    finally:
      process.kill()  # Else a command that is to end waits for its answer.


def segments(
  model: str,
  sources: Sequence[str],
  hypotheses: Sequence[str],
  references: Sequence[str],
) -> tuple[np.ndarray, str]:
  """COMET of each sentence [n], times 100, and what the signature says.

  Raises:
    errors.UserError: no environment; no such model, or COMET cannot use it.
  """
  chex.assert_equal([len(sources)] * 2, [len(hypotheses), len(references)])
  texts = zip(sources, hypotheses, references, strict=True)
  samples = [dict(zip(('src', 'mt', 'ref'), row, strict=True)) for row in texts]
  with _running(model) as (ask, about):
    found = ask({'samples': samples})
  signature = f'model:{model}|version:{about["version"]}'
  return 100 * np.array(found['scores']), signature


@contextlib.contextmanager
def expected(model: str) -> Iterator[mbr.Expected]:
  """For Translator.expected: the expected COMET of candidates, times 100.

  Raises:
    errors.UserError: as `segments`, or another kind of model.
  """
  with _running(model) as (ask, about):
    if about['kind'] != 'regression_metric':
      raise errors.UserError(
        f'--comet={model} is a {about["kind"]}; for expected scores a '
        'regression_metric with references, such as Unbabel/wmt22-comet-da, '
        'expected.'
      )

    def of(sources, candidates):
      found = ask({'sources': sources, 'candidates': candidates})
      scores = [100 * np.array(row) for row in found['scores']]
      if not all(np.isfinite(row).all() for row in scores):
        raise errors.UserError(
          f'--comet={model}: a score is no number; another model expected.'
        )
      return scores

    yield of


def compare(
  baseline: np.ndarray, scores: np.ndarray, signature: str
) -> dict[str, Any]:
  """Paired bootstrap over sentences [n], with the keys of scores.compare."""
  chex.assert_equal_shape([baseline, scores])
  rng, size = np.random.default_rng(_SEED), len(scores)
  drawn = rng.integers(size, size=(_RESAMPLES, size))
  old, new = baseline[drawn].mean(1), scores[drawn].mean(1)
  change = abs((new - old) - (new - old).mean())
  real = abs(scores.mean() - baseline.mean())
  p = (1 + (change >= real).sum()) / (_RESAMPLES + 1)
  found = {
    'baseline': baseline.mean(),
    'score': scores.mean(),
    'baseline_interval': significance.estimate_ci(old)[1],
    'interval': significance.estimate_ci(new)[1],
  }
  return {name: round(float(x), 2) for name, x in found.items()} | {
    'p': round(float(p), 4) if real else 1.0,
    'signature': f'bs:{_RESAMPLES}|seed:{_SEED}|{signature}',
  }
