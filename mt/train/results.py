"""A run's translations before and after training, scored and shown."""

from collections.abc import Callable
import dataclasses
import time

from mt.base import files
from mt.base import journal
from mt.base import processes
from mt.data import template as template_lib
from mt.evaluate import cached
from mt.evaluate import samples
from mt.evaluate import scores as scores_lib
from mt.gemma import model
from mt.train import run as run_lib


def translate_splits(
  run: run_lib.Run, when: str, params: Callable[[], model.Params], at: int
) -> None:
  """Leaves translations of the scored splits in the workdir.

  Those that are there, of this step and made like this, are not made again.

  Args:
    run: the run.
    when: 'before' or 'after' training.
    params: () -> the model that translates, see mt/gemma/model.py.
    at: the steps behind it.
  """
  config = run.config
  for split, pairs in run.data.scored.items():
    sources = [p.source for p in pairs]
    made = cached.provenance(at, config.decode, sources)
    path = _translations(run, split, when)
    if processes.agree(cached.read_if_current(path, made) is not None):
      continue
    progress = journal.Progress(f'translating {split} ({when})', len(sources))

    def work(sources=sources, progress=progress):
      return run.translator(params(), sources, progress.update)

    start = time.monotonic()
    if when == 'before':
      # With the languages' names, which come from data.pair.
      template = dataclasses.asdict(template_lib.from_config(config))
      key = [run.identity, template, config.decode.to_dict()]
      texts = cached.cached([*key, config.train.dtype, sources], work)
    else:
      texts = work()
    progress.close()
    journal.say(
      f'translated {split} ({when}, step {at}): {len(texts)} sentences, '
      f'{time.monotonic() - start:.0f} s'
    )
    columns = {'source': sources, 'reference': [p.target for p in pairs]}
    for name, lines in columns.items():
      files.write_lines(_translations(run, split, name), lines)
    cached.write(path, made, texts)


def _translations(run, split, name):
  return run.workdir / 'translations' / f'{split}.{name}.txt'


def drop_stale(run: run_lib.Run, when: str) -> None:
  """Takes scores and translations for not made: they are of other steps.

  Args:
    run: the run.
    when: 'before' or 'after' training; * for both.
  """
  files.remove(run.scores_path)
  for path in _translations(run, '*', when).parent.glob(f'*.{when}.json'):
    files.remove(path)


def valid_chrf(
  run: run_lib.Run, params: Callable[[], model.Params], at: int
) -> float:
  """chrF of the first eval.chrf_pairs of validation, 0 to 100.

  It decides which checkpoint is the best, and is the same in all processes.

  Args:
    run: the run.
    params: () -> the model that translates.
    at: the steps behind it. At step 0 the translations from before training are
      scored, which must be there.
  """
  pairs = run.data.scored['valid'][: run.config.eval.chrf_pairs or None]
  if at:
    texts = run.translator(params(), [p.source for p in pairs])
  elif processes.is_first():
    texts = files.read_lines(_translations(run, 'valid', 'before'))
  score = 0.0
  if processes.is_first():
    references = [p.target for p in pairs]
    score = scores_lib.score(texts[: len(pairs)], references)['chrf']
  return processes.broadcast_from_first(score)


def report(run: run_lib.Run, at: int) -> None:
  """Scores and samples out of the translations, on screen and on disk.

  Args:
    run: the run.
    at: the steps behind the model that translated after training.
  """
  steps, scores = {'before': 0, 'after': at}, {}
  for split, pairs in run.data.scored.items():
    texts = {
      when: files.read_lines(_translations(run, split, when))
      for when in ('before', 'after')
    }
    sources = [p.source for p in pairs]
    references = [p.target for p in pairs]
    language = run.config.data.pair.split('-')[0].lower()
    scores[split] = {}
    for when, lines in texts.items():
      found = {'step': steps[when]} | scores_lib.score(lines, references)
      scores[split][when] = found | {
        'noise': scores_lib.by_noise(sources, lines, references, language)
      }
    if split == 'valid':
      text = samples.samples(sources, references, **texts)
      files.write(run.workdir / 'samples.txt', text)
      journal.say('\n' + text)
  files.write_json(run.scores_path, scores)
  for split, both in scores.items():
    for name in scores_lib.NAMES:
      before, after = both['before'][name], both['after'][name]
      journal.say(
        f'{split} {name:9} {before:6.2f} -> {after:6.2f} '
        f'({after - before:+.2f})  {both["after"][name + "_signature"]}'
      )
