"""A run's translations before and after training, scored and shown."""

import dataclasses
import time

from mt import evaluate
from mt import journal
from mt import model
from mt import run as run_lib
from mt import scores as scores_lib
from mt import template as template_lib
from mt import workdir as workdir_lib


def translate_splits(
  run: run_lib.Run, when: str, params: model.Params, at: int
) -> None:
  """Leaves translations of the scored splits in the workdir.

  Args:
    run: the run.
    when: 'before' or 'after' training.
    params: of the model that translates, see mt/model.py.
    at: the steps behind it.
  """
  config = run.config
  for split, pairs in run.data.scored.items():
    sources = [p.source for p in pairs]
    progress = journal.Progress(f'translating {split} ({when})', len(sources))

    def work(sources=sources, progress=progress):
      return run.translator(params, sources, progress.update)

    start = time.monotonic()
    if when == 'before':
      # With the languages' names, which come from data.pair.
      template = dataclasses.asdict(template_lib.from_config(config))
      key = [run.identity, template, config.decode.to_dict()]
      texts = evaluate.remember([*key, config.train.dtype, sources], work)
    else:
      texts = work()
    progress.close()
    journal.say(
      f'translated {split} ({when}): {len(texts)} sentences, '
      f'{time.monotonic() - start:.0f} s'
    )
    columns = {'source': sources, 'reference': [p.target for p in pairs]}
    for name, lines in columns.items():
      workdir_lib.write_lines(_translations(run, split, name), lines)
    made = evaluate.made_by(at, config.decode, sources)
    evaluate.keep(_translations(run, split, when), made, texts)


def _translations(run, split, name):
  return run.workdir / 'translations' / f'{split}.{name}.txt'


def report(run: run_lib.Run) -> None:
  """Scores and samples out of the translations, on screen and on disk."""
  scores = {}
  for split, pairs in run.data.scored.items():
    texts = {
      when: workdir_lib.read_lines(_translations(run, split, when))
      for when in ('before', 'after')
    }
    sources = [p.source for p in pairs]
    references = [p.target for p in pairs]
    language = run.config.data.pair.split('-')[0].lower()
    scores[split] = {}
    for when, lines in texts.items():
      scores[split][when] = scores_lib.score(lines, references) | {
        'noise': scores_lib.by_noise(sources, lines, references, language)
      }
    if split == 'valid':
      text = evaluate.samples(sources, references, **texts)
      workdir_lib.write(run.workdir / 'samples.txt', text)
      journal.say('\n' + text)
  workdir_lib.write_json(run.scores_path, scores)
  for split, both in scores.items():
    for name in scores_lib.NAMES:
      before, after = both['before'][name], both['after'][name]
      journal.say(
        f'{split} {name:9} {before:6.2f} -> {after:6.2f} '
        f'({after - before:+.2f})  {both["after"][name + "_signature"]}'
      )
