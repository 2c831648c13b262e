"""BLEU and chrF, as sacreBLEU has them: of all, by noise, of two systems."""

from collections.abc import Sequence
from typing import Any

import chex
import sacrebleu
from sacrebleu import significance

from mt.evaluate import noise

NAMES = ('bleu', 'bleu_intl', 'chrf')
NO_CLASS = 'none of these'
_RESAMPLES = 1000


def _metrics():
  return {
    'bleu': sacrebleu.BLEU(),
    'bleu_intl': sacrebleu.BLEU(tokenize='intl'),
    'chrf': sacrebleu.CHRF(),
  }


def score(
  hypotheses: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
  """BLEU (tokenisers 13a and intl) and chrF2, 0 to 100, with signatures.

  Texts are detokenised; there is one reference for each hypothesis.
  """
  chex.assert_equal(len(hypotheses), len(references))
  out = {'sentences': len(references)}
  for name, metric in _metrics().items():
    result = metric.corpus_score(list(hypotheses), [list(references)])
    out[name] = round(result.score, 2)
    out[f'{name}_signature'] = str(metric.get_signature())
  return out


def by_noise(
  sources: Sequence[str],
  hypotheses: Sequence[str],
  references: Sequence[str],
  language: str,
) -> dict[str, dict[str, Any]]:
  """chrF2 of the sentences of each class of noise, see mt/evaluate/noise.py.

  Args:
    sources, hypotheses, references: of each pair; the source's classes count.
    language: of the sources. A class without a rule for it is left out.

  Returns:
    class -> `sentences` and `chrf`, which is None where there are none. Classes
    overlap; NO_CLASS has the sentences without any.
  """
  chex.assert_equal([len(sources)] * 2, [len(hypotheses), len(references)])
  found = [noise.classes(text, language) or (NO_CLASS,) for text in sources]
  names = [name for name in noise.CLASSES if noise.has_rule(name, language)]
  out = {}
  for name in [*names, NO_CLASS]:
    at = [i for i, classes in enumerate(found) if name in classes]
    out[name] = {'sentences': len(at), 'chrf': None}
    if at:
      chosen = [hypotheses[i] for i in at], [[references[i] for i in at]]
      out[name]['chrf'] = round(sacrebleu.CHRF().corpus_score(*chosen).score, 2)
  return out


def compare(
  baseline: Sequence[str],
  hypotheses: Sequence[str],
  references: Sequence[str],
) -> dict[str, dict[str, Any]]:
  """Paired bootstrap resampling (Koehn 2004, W04-3250), as sacreBLEU does it.

  Args:
    baseline, hypotheses, references: of each sentence.

  Returns:
    metric -> `baseline` and `score`, half the width of the 95 % intervals of
    both, `p`, how likely chance alone makes such a difference, and `signature`,
    with the seed. 1.0 is the `p` of two equal scores (sacreBLEU gives 0.001).
  """
  chex.assert_equal([len(references)] * 2, [len(baseline), len(hypotheses)])
  out = {}
  # One test a metric: sacreBLEU keeps results by name, and both BLEUs have one.
  for name, metric in _metrics().items():
    signatures, results = significance.PairedTest(
      [('baseline', baseline), ('system', hypotheses)],
      {name: metric},
      [list(references)],
      test_type='bs',
      n_samples=_RESAMPLES,
    )()
    ((key, signature),) = signatures.items()
    old, new = results[key]
    out[name] = {
      'baseline': round(old.score, 2),
      'score': round(new.score, 2),
      'baseline_interval': round(float(old.ci), 2),
      'interval': round(float(new.ci), 2),
      'p': 1.0 if old.score == new.score else round(new.p_value, 4),
      'signature': str(signature),
    }
  return out
