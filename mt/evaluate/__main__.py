"""What a run translates, scored, compared and shown.

  python -m mt.evaluate --workdir=W --split=test [--against=W2]

scores what a run's best checkpoint makes of a split (--checkpoint=best, last or
a step; see mt/train/checkpoint.py). What the run itself has translated with it
is not translated again. W/evaluation/ has then

  SPLIT.json          scores, chrF by class of noise (see
                      mt/evaluate/noise.py), and the comparison, if any
  SPLIT.*.txt         source, reference and hypothesis, one a line

  python -m mt.evaluate --report runs/a runs/b [runs/c [runs/d]]

makes one page of several runs: comparison.html in the folder of the first.

Of a run with several directions each is scored, as SPLIT-PAIR, and their mean
is SPLIT; --pair names one.

With --noise=0.3 a copy is scored, as SPLIT-noise30, in which that share of
words and sentences is made noisy; see mt/data/noising.py.

With --data=TEXT any text that data.source takes is scored instead, such as a
file or sacrebleu:wmt24; SPLIT is then SPLIT-TEXT in these names.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re
from typing import Any

from absl import flags

from configs import knobs
from mt.base import cli
from mt.base import compiling
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.data import corpus
from mt.data import directions
from mt.data import lines
from mt.data import noising
from mt.evaluate import cached
from mt.evaluate import comet
from mt.evaluate import comparison
from mt.evaluate import noise
from mt.evaluate import report
from mt.evaluate import scores
from mt.train import checkpoint
from mt.translate import translator as translator_lib


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """A split, translated with the checkpoint of a step."""

  name: str  # Of its files.
  languages: tuple[str, str]  # Source and target.
  step: int
  sources: list[str]
  references: list[str]
  hypotheses: list[str]


def translate_split(
  workdir: pathlib.Path,
  split: str,
  pairs: int | None = None,
  which: str = '',
  data: Mapping[str, Any] | None = None,
  pair: str = '',
  noise_share: float = 0.0,
) -> Evaluated:
  """Translates a split with a run's checkpoint, if that is not done.

  Args:
    workdir: of the run.
    split: valid or test.
    pairs: the first ones of the split, 0 for all; None for as many as the run
      itself translates (of another text, all).
    which: of its checkpoints, see checkpoint.find_step.
    data: knobs of `config.data` to take in place of the run's: under the
      split's name another text, and its `columns`.
    pair: one of the run's directions; '' where it has no other.
    noise_share: of the sources' words and of sentences, made noisy first.
  """
  config, data = run_folder.read_config(workdir), data or {}
  narrowed = directions.only(config, pair)
  pair = narrowed.data.pair
  name = directions.name(config.data.pair, split, pair)
  step, _ = checkpoint.find_step(workdir, which)
  if pairs is None:
    pairs = 0 if data else config.eval.translate_pairs
  of_run = workdir / 'translations' / f'{name}.after.txt'
  if split in data:  # A text of this direction.
    config = narrowed
  config.data.update(data)
  chosen = _read(workdir, config.data, split, pair)[: pairs or None]
  if split in data:
    name += '-' + re.sub(r'\W+', '_', data[split])[-100:]
  sources, languages = [p.source for p in chosen], directions.languages(pair)
  if noise_share:
    name += _suffix(noise_share)
    sources = [
      noising.noised(text, noise_share, (0, i), languages[0])
      for i, text in enumerate(sources)
    ]
  references = [p.target for p in chosen]
  made = cached.provenance(step, config.decode, sources)
  own = workdir / 'evaluation' / f'{name}.hypothesis.txt'
  texts = cached.read_if_current(of_run, made)
  if texts is None:
    texts = cached.read_if_current(own, made)
  if texts is None:
    texts = _translate(workdir, step, name, sources, pair)
  for side, of_side in (('source', sources), ('reference', references)):
    files.write_lines(own.with_name(f'{name}.{side}.txt'), of_side)
  cached.write(own, made, texts)
  return Evaluated(name, languages, step, sources, references, texts)


def _read(workdir, data, split, pair) -> list[lines.Pair]:
  """A direction of a split."""
  if corpus.split_source(data, split) is None:
    raise errors.UserError(
      f'{workdir}: the run has no {split} split (data.{split} is empty); name '
      'a text with --data.'
    )
  texts = corpus.read_splits(data, [split])[split]
  return next(text for text in texts if text.pair == pair).read()


def _suffix(noise_share) -> str:
  return f'-noise{round(100 * noise_share)}' if noise_share else ''


def _translate(workdir, step, name, sources, pair):
  config, source, params = checkpoint.load_finetuned(workdir, step)
  progress = journal.Progress(f'translating {name}', len(sources))
  translator = translator_lib.from_config(directions.only(config, pair), source)
  texts = translator(params, sources, progress.update)
  progress.close()
  return texts


def evaluate(
  workdir: pathlib.Path,
  split: str,
  against: pathlib.Path | None = None,
  pairs: int | None = None,
  which: str = '',
  data: Mapping[str, Any] | None = None,
  comet_model: str = '',
  pair: str = '',
  noise_share: float = 0.0,
) -> dict[str, Any]:
  """Scores one of a run's checkpoints, and leaves W/evaluation/SPLIT.json.

  Args:
    workdir, split, pairs, which, data, pair, noise_share: see
      translate_split.
    against: the folder of another run, to compare with: with its best
      checkpoint, or its last where there is no best one.
    comet_model: see mt/evaluate/comet.py; '' for scores without COMET.

  Returns:
    What SPLIT.json holds.

  Raises:
    errors.UserError: the runs have other sentences.
  """
  if comet_model:
    comet.find()  # Before minutes go into translating.
  of_both = {'data': data, 'pair': pair, 'noise_share': noise_share}
  own, other = translate_split(workdir, split, pairs, which, **of_both), None
  text = (data or {}).get(split, own.name)
  if data and noise_share:
    text += f', noise {noise_share:g}'
  out = {
    'text': text,
    'step': own.step,
    'scores': scores.score(own.hypotheses, own.references, own.languages[1]),
    'noise': scores.by_noise(
      own.sources, own.hypotheses, own.references, own.languages[0]
    ),
    'loops': scores.looping(own.sources, own.hypotheses),
  }
  if against:
    other = translate_split(against, split, pairs, **of_both)
    if (other.sources, other.references) != (own.sources, own.references):
      raise errors.UserError(
        f'{against}: its {split} split has other sentences '
        f'({len(other.sources)}) than that of {workdir} ({len(own.sources)}); '
        'compare runs with the same data, and give both --pairs.'
      )
    out['against'] = {
      'workdir': str(against),
      'step': other.step,
      'scores': scores.compare(
        other.hypotheses, own.hypotheses, own.references, own.languages[1]
      ),
    }
  path = workdir / 'evaluation' / f'{own.name}.json'
  files.write_json(path, out)
  if comet_model:
    add_comet(out, comet_model, own, other)
    files.write_json(path, out)
  return out


def add_comet(
  result: dict[str, Any], model: str, own: Evaluated, other: Evaluated | None
) -> None:
  """Adds COMET to what `evaluate` returns; `other` is the run compared with."""
  texts = own.sources, own.hypotheses, own.references
  found, signature = comet.segments(model, *texts)
  result['scores']['comet'] = round(float(found.mean()), 2)
  result['scores']['comet_signature'] = signature
  if other:
    texts = other.sources, other.hypotheses, other.references
    baseline, _ = comet.segments(model, *texts)
    row = comet.compare(baseline, found, signature)
    result['against']['scores']['comet'] = row


def describe(result: dict[str, Any]) -> str:
  """What `evaluate` returns, as lines to read."""
  found = result['scores']
  size = f'{found["sentences"]:,} sentences, compared in NFC'
  out = [f'{result["text"]}, step {result["step"]}, {size}']
  for name in scores.names(found):
    out.append(f'{name:10} {found[name]:6.2f}  {found[name + "_signature"]}')
  if 'noise' in result:  # A mean has none.
    out += _by_noise(result['noise'])
  if found := result.get('loops'):
    numbers = ', '.join(str(i + 1) for i in found)
    out.append(f'go round and round: {len(found)} (number {numbers})')
  if other := result.get('against'):
    out.append(f'against {other["workdir"]}, step {other["step"]}')
    for name, row in other['scores'].items():
      out.append(
        f'{name:10} {row["baseline"]:6.2f} ±{row["baseline_interval"]:.2f} -> '
        f'{row["score"]:6.2f} ±{row["interval"]:.2f}  '
        f'({row["score"] - row["baseline"]:+.2f}, p = {row["p"]:.4f})  '
        f'{row["signature"]}'
      )
  return '\n'.join(out)


def _by_noise(found) -> list[str]:
  out = ['chrF by noise (a sentence may be in several classes)']
  for name in (*noise.CLASSES, scores.NO_CLASS):
    row = found.get(name)
    if row is None:
      text = '     -  no rule for the source language'
    elif not row['sentences']:
      text = '     0  no sentence'
    else:
      text = f'{row["sentences"]:6,}  {row["chrf"]:6.2f}'
    out.append(f'  {name:14}{text}')
  return out


def main(argv):
  given = flags.FLAGS
  if given.report:
    workdirs = [pathlib.Path(name) for name in (*given.report, *argv[1:])]
    out = workdirs[0] / 'comparison.html'
    files.write(out, comparison.page(workdirs))
    print(f'written: {out}')
    return
  if not given.workdir:
    raise errors.UserError('--workdir of a run expected, or --report of some.')
  compiling.keep_compiled_programs()
  workdir = pathlib.Path(given.workdir)
  against = pathlib.Path(given.against) if given.against else None
  data = {given.split: given.data} if given.data else {}
  if columns := given.columns:
    numbers = all(name.isdecimal() for name in columns)
    data['columns'] = tuple(map(int, columns) if numbers else columns)
    if not knobs.COLUMNS.test(data['columns']) or not given.data:
      raise errors.UserError(
        f'--columns={",".join(columns)}: {knobs.COLUMNS.expected} expected, of '
        'the text that --data names.'
      )
  found = []
  for pair in _asked(workdir, given.pair, given.data):
    found.append(
      evaluate(
        *(workdir, given.split, against, given.pairs, given.checkpoint, data),
        comet_model=given.comet,
        pair=pair,
        noise_share=given.noise,
      )
    )
    print(describe(found[-1]))
  if len(found) > 1:
    mean = scores.mean([result['scores'] for result in found])
    name = given.split + _suffix(given.noise)
    mean = {'text': name, 'step': found[0]['step'], 'scores': mean}
    files.write_json(workdir / 'evaluation' / f'{name}.json', mean)
    print(describe(mean))
  report.write(workdir)


def _asked(workdir, pair, data) -> list[str]:
  """The directions to be scored: all of the run, or --pair."""
  config = run_folder.read_config(workdir)
  if pair or data:  # A text is of one direction.
    return [directions.only(config, pair).data.pair]
  return directions.each(config.data.pair)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of train.py.')
  flags.DEFINE_string('checkpoint', '', checkpoint.WHICH)
  flags.DEFINE_enum('split', 'valid', ['valid', 'test'], 'What is scored.')
  flags.DEFINE_string(
    'data', '', 'A text to score instead, in any form that data.source takes.'
  )
  flags.DEFINE_string('pair', '', 'The direction, such as en-fr; else all.')
  flags.DEFINE_float(
    'noise',
    0.0,
    'Score a copy of the split in which this share of source words is noisy.',
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_list('columns', [], "Of --data; without it the run's.")
  flags.DEFINE_string(
    'against', '', 'Folder of another run, compared by paired bootstrap.'
  )
  flags.DEFINE_string(
    'comet', '', 'Score with COMET too: the path of a .ckpt, or a name.'
  )
  flags.DEFINE_integer(
    'pairs',
    None,
    'The first ones, 0 for all; without it as many as the run translates.',
    lower_bound=0,
  )
  flags.DEFINE_list(
    'report',
    [],
    'Folders of two to four runs, compared in comparison.html of the first.',
  )
  cli.run(main, words_of='report')
