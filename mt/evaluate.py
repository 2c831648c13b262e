"""Scores of translations, as sacreBLEU has them, and samples to read."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import hashlib
import inspect
import json
import pathlib
from typing import Any

import chex
import numpy as np
import sacrebleu

from mt import decode
from mt import distributed
from mt import errors
from mt import journal
from mt import model
from mt import template
from mt import tokenizer
from mt import translate
from mt import weights
from mt import workdir as workdir_lib


def score(
  hypotheses: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
  """BLEU (tokenisers 13a and intl) and chrF2, 0 to 100, with signatures.

  Args:
    hypotheses: detokenised translations.
    references: one for each.
  """
  chex.assert_equal(len(hypotheses), len(references))
  metrics = {
    'bleu': sacrebleu.BLEU(),
    'bleu_intl': sacrebleu.BLEU(tokenize='intl'),
    'chrf': sacrebleu.CHRF(),
  }
  out = {'sentences': len(references)}
  for name, metric in metrics.items():
    result = metric.corpus_score(list(hypotheses), [list(references)])
    out[name] = round(result.score, 2)
    out[f'{name}_signature'] = str(metric.get_signature())
  return out


def remember(key: Any, make: Callable[[], list[str]]) -> list[str]:
  """What `make` returns, kept on disk under everything that decides it.

  The pretrained model's translations of a validation set are the same in every
  run that starts from it; a sweep pays for them once.

  Args:
    key: JSON; the code of the decoder is added.
    make: () -> translations.
  """
  modules = (model, decode, translate, template, tokenizer)
  code = [inspect.getsource(m) for m in modules]
  digest = hashlib.sha256(json.dumps([key, code]).encode()).hexdigest()
  path = weights.cache_dir() / 'translations' / f'{digest}.json'
  texts = None
  if distributed.is_first() and path.exists():
    with contextlib.suppress(errors.UserError):  # Damaged: made once more.
      texts = workdir_lib.read_json(path)
  if distributed.agree(texts is not None):
    return texts or []  # Only the first process has a use for them.
  texts = make()
  workdir_lib.write_json(path, texts)
  return texts


def show_texts(
  translator: translate.Translator,
  params: model.Params,
  texts: Sequence[str],
  workdir: pathlib.Path,
) -> None:
  """Translates texts, shows them, leaves them in translations/texts.*.txt."""
  made = translator(params, list(texts))
  for name, lines in (('source', texts), ('after', made)):
    path = workdir / 'translations' / f'texts.{name}.txt'
    workdir_lib.write_lines(path, lines)
  for source, after in zip(texts, made, strict=True):
    journal.say(f'source     {source}\nafter      {after}')


def samples(
  sources: Sequence[str],
  references: Sequence[str],
  before: Sequence[str],
  after: Sequence[str],
  number: int = 8,
) -> str:
  """`number` sentences, evenly spread over the split, to be read."""
  chex.assert_equal(
    [len(sources)] * 3, [len(references), len(before), len(after)]
  )
  chosen = np.unique(np.linspace(0, len(sources) - 1, number).astype(int))
  out = []
  for i in chosen.tolist():
    out.append(
      f'source     {sources[i]}\n'
      f'reference  {references[i]}\n'
      f'before     {before[i]}\n'
      f'after      {after[i]}\n'
    )
  return '\n'.join(out)
