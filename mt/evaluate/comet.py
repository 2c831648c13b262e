"""COMET (Rei et al. 2020, arXiv 2009.09025), in an environment of its own.

`make comet` makes it: COMET wants torch and an older numpy. A model is the path
of a .ckpt, or a name such as Unbabel/wmt22-comet-da, which COMET fetches; those
without references (CometKiwi) leave them aside. A .ckpt is trusted like code.
"""

from collections.abc import Sequence
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import chex
import numpy as np
from sacrebleu import significance

from mt.base import errors

PYTHON = pathlib.Path(__file__).parents[2] / '.venv-comet' / 'bin' / 'python'
# COMET's own command computes in float16, and takes a lone carriage return for
# the end of a line.
_PROGRAM = """
import importlib.metadata, json, sys
import comet, torch
model, given, out = sys.argv[1:]
if not model.endswith('.ckpt'):
  model = comet.download_model(model)
with open(given, encoding='utf-8') as f:
  samples = json.load(f)
found = comet.load_from_checkpoint(model).predict(
  samples, gpus=min(1, torch.cuda.device_count()), progress_bar=False
)
version = importlib.metadata.version('unbabel-comet')
with open(out, 'w', encoding='utf-8') as f:
  json.dump({'scores': found.scores, 'version': version}, f)
"""
_RESAMPLES, _SEED = 1000, 12345  # As sacreBLEU has them.


def find() -> pathlib.Path:
  """The Python that has COMET; errors.UserError where there is none."""
  if not PYTHON.exists():
    raise errors.UserError(f'--comet: there is no {PYTHON}; run `make comet`.')
  return PYTHON


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
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, 'given'), pathlib.Path(folder, 'out')
    given.write_text(json.dumps(samples), encoding='utf-8')
    done = subprocess.run(
      [find(), '-P', '-c', _PROGRAM, model, given, out],
      capture_output=True,
      text=True,
      errors='replace',
    )
    if done.returncode:
      last = done.stderr.strip().splitlines()[-1:] or ['it was killed']
      raise errors.UserError(
        f'--comet={model}: COMET cannot score with it ({last[0][:300]}); the '
        "path of a .ckpt, or a model's name and a network expected."
      )
    found = json.loads(out.read_text(encoding='utf-8'))
  signature = f'model:{model}|version:{found["version"]}'
  return 100 * np.array(found['scores']), signature


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
