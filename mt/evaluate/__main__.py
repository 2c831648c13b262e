"""What a run translates, scored, compared and shown.

  python -m mt.evaluate --workdir=W --split=test [--against=W2]

scores what a run's best checkpoint makes of a split (--checkpoint=best, last or
a step; see mt/train/checkpoint.py). What the run itself has translated with it
is not translated again. W/evaluation/ has then

  SPLIT.json          scores, chrF by class of noise (see
                      mt/evaluate/noise.py), which translations go round and
                      which are cut off at their limit (decode.max_ratio,
                      decode.max_extra), by number from 0, and the comparison,
                      if any
  SPLIT.*.txt         source, reference and hypothesis, one a line

  python -m mt.evaluate --report runs/a runs/b [runs/c [runs/d]]

makes one page of several runs: comparison.html in the folder of the first.

Of a run with several directions each is scored, as SPLIT-PAIR, and their mean
is SPLIT; --pair names one.

With --noise=0.3 a copy is scored, as SPLIT-noise30, in which that share of
words and sentences is made noisy; see mt/data/noising.py.

With --data=TEXT any text that data.source takes is scored instead, such as a
file or sacrebleu:wmt24; SPLIT is then SPLIT-TEXT in these names.

With --json what is printed is one object: under each SPLIT what SPLIT.json has,
and as `texts` the paths of its three .txt.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

from configs import knobs
from mt.base import cli
from mt.base import compiling
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.base import screen
from mt.data import corpus
from mt.data import directions
from mt.data import noising
from mt.evaluate import cached
from mt.evaluate import comet
from mt.evaluate import comparison
from mt.evaluate import noise
from mt.evaluate import report
from mt.evaluate import scores
from mt.train import checkpoint
from mt.train import manifest
from mt.translate import decode
from mt.translate import translator as translator_lib


@dataclasses.dataclass(frozen=True)
class Text:
  """What is to be translated and scored.

  Attributes:
    split: valid or test.
    pair: one of the run's directions; '' where it has no other.
    pairs: the first ones of the split, 0 for all; None for as many as the run
      itself translates (of another text, all).
    data: knobs of `config.data` to take in place of the run's: under the
      split's name another text, and its `columns`.
    noise: share of the sources' words and of sentences, made noisy first.
  """

  split: str
  pair: str = ''
  pairs: int | None = None
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  noise: float = 0.0

  @property
  def suffix(self) -> str:
    """Of the names of its files."""
    percent = f'{100 * self.noise:.10g}'.replace('.', '_')
    return f'-noise{percent}' if self.noise else ''

  def title(self, name: str) -> str:
    """What it is called where people read; `name` is without the suffix."""
    title = self.data.get(self.split, name)
    return f'{title}, noise {self.noise:.10g}' if self.noise else title


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """A split, translated with the checkpoint of a step."""

  name: str  # Of its files.
  languages: tuple[str, str]  # Source and target.
  step: int
  sources: list[str]
  references: list[str]
  hypotheses: list[str]
  cut_off: list[int]  # Which hypotheses are.


def translate_split(
  workdir: pathlib.Path, text: Text, which: str = ''
) -> Evaluated:
  """Translates a text with one of a run's checkpoints, if that is not done.

  `which`: see checkpoint.find_step.
  """
  config, split = run_folder.read_config(workdir), text.split
  narrowed = directions.only(config, text.pair)
  pair = narrowed.data.pair
  name = directions.name(config.data.pair, split, pair)
  step, _ = checkpoint.find_step(workdir, which)
  of_run = workdir / 'translations' / f'{name}.after.txt'
  pairs = config.eval.translate_pairs
  if text.data:
    config, pairs = narrowed, 0  # A text of this direction.
    config.data.update(text.data)
    name += '-' + re.sub(r'\W+', '_', text.data[split])[-100:]
  name += text.suffix
  pairs = pairs if text.pairs is None else text.pairs
  found = corpus.read_splits(config.data, [split])[split]
  (read,) = (of_pair.read() for of_pair in found if of_pair.pair == pair)
  chosen = read[: pairs or None]
  sources, languages = [p.source for p in chosen], directions.languages(pair)
  if text.noise:
    sources = [
      noising.noised(source, text.noise, (0, i), languages[0])
      for i, source in enumerate(sources)
    ]
  references = [p.target for p in chosen]
  made = cached.provenance(step, config.decode, sources)
  # The run removes its own when it is trained anew; another may have this step.
  known = made | {'weights': manifest.crc(workdir / 'checkpoints', step)}
  own = workdir / 'evaluation' / f'{name}.hypothesis.txt'
  texts, cut_off = (
    cached.read_if_current(of_run, made)
    or cached.read_if_current(own, known)
    or _translate(workdir, step, name, sources, pair)
  )
  texts = [text.replace('\n', ' ') for text in texts]  # As files have them.
  for side, of_side in (('source', sources), ('reference', references)):
    files.write_lines(own.with_name(f'{name}.{side}.txt'), of_side)
  cached.write(own, known, (texts, cut_off))
  return Evaluated(name, languages, step, sources, references, texts, cut_off)


def _translate(workdir, step, name, sources, pair):
  config, source, params = checkpoint.load_finetuned(workdir, step)
  params = decode.unstack(params, config.train.dtype)  # In place of the stacks.
  progress = journal.Progress(f'translating {name}', len(sources))
  translator = translator_lib.from_config(directions.only(config, pair), source)
  found = translator.translate(params, sources, progress.update)
  progress.close()
  return found


def evaluate(
  workdir: pathlib.Path,
  text: Text,
  which: str = '',
  against: pathlib.Path | None = None,
  comet_model: str = '',
) -> dict[str, Any]:
  """Scores one of a run's checkpoints, and leaves W/evaluation/SPLIT.json.

  Args:
    workdir: of the run.
    text: what is translated.
    which: of its checkpoints, see checkpoint.find_step.
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
  own, other = translate_split(workdir, text, which), None
  path = workdir / 'evaluation' / f'{own.name}.json'
  out = {
    'name': own.name,
    'text': text.title(own.name.removesuffix(text.suffix)),
    'step': own.step,
    'scores': scores.score(own.hypotheses, own.references, own.languages[1]),
    'noise': scores.by_noise(
      own.sources, own.hypotheses, own.references, own.languages[0]
    ),
    'loops': scores.looping(own.sources, own.hypotheses),
    'cut_off': own.cut_off,
  }
  if against:
    other = translate_split(against, text)
    if (other.sources, other.references) != (own.sources, own.references):
      raise errors.UserError(
        f'{against}: its {text.split} split has other sentences '
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
  if cut_off := result.get('cut_off'):
    number = result['scores']['sentences']
    out.append(translator_lib.limit_note(len(cut_off), number))
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
    own = given.get_key_flags_for_module(sys.argv[0])
    others = {f.name for f in own if f.present} - {'report', 'traceback'}
    if others:
      raise errors.UserError(
        '--report compares what the runs have translated already, and takes no '
        f'--{" or --".join(sorted(others))}; leave one or the other out.'
      )
    workdirs = [pathlib.Path(name) for name in (*given.report, *argv[1:])]
    out = workdirs[0] / 'comparison.html'
    files.write(out, comparison.page(workdirs))
    print(f'written: {out}')
    return
  if not given.workdir:
    raise errors.UserError('--workdir of a run expected, or --report of some.')
  compiling.keep_compiled_programs()
  workdir, text = pathlib.Path(given.workdir), _text(given)
  against = pathlib.Path(given.against) if given.against else None
  with contextlib.redirect_stdout(sys.stderr):  # What a model says, loading.
    found = [
      evaluate(workdir, of_pair, given.checkpoint, against, given.comet)
      for of_pair in _of_each_pair(workdir, text, against)
    ]
  if len(found) > 1:
    name, title = given.split + text.suffix, text.title(given.split)
    mean = {'name': name, 'text': title, 'step': found[0]['step']}
    mean['scores'] = scores.mean([result['scores'] for result in found])
    files.write_json(workdir / 'evaluation' / f'{name}.json', mean)
    found.append(mean)
  report.write(workdir)
  if given.json:
    found = {result['name']: _with_paths(workdir, result) for result in found}
    print(json.dumps(found, ensure_ascii=False))
    screen.check()  # Else what counts is in files.
  else:
    print(*map(describe, found), sep='\n')


def _with_paths(workdir, result) -> dict[str, Any]:
  """A result with the paths of its texts, as COMET's own command wants them."""
  path = workdir / 'evaluation' / result['name']
  sides = 'source', 'hypothesis', 'reference'
  texts = {side: f'{path}.{side}.txt' for side in sides}
  return result | {'texts': texts} if 'noise' in result else result


def _text(given) -> Text:
  """What the flags ask for."""
  data = {given.split: given.data} if given.data else {}
  if columns := given.columns:
    numbers = all(name.isdecimal() for name in columns)
    data['columns'] = tuple(map(int, columns) if numbers else columns)
    if not knobs.COLUMNS.test(data['columns']) or not given.data:
      raise errors.UserError(
        f'--columns={",".join(columns)}: {knobs.COLUMNS.expected} expected, of '
        'the text that --data names.'
      )
  return Text(given.split, given.pair, given.pairs, data, given.noise)


def _of_each_pair(workdir, text, against) -> list[Text]:
  """A text of each direction of the run; of --pair or --data only one."""
  config = run_folder.read_config(workdir)
  if text.pair or text.data:
    pairs = [directions.only(config, text.pair).data.pair]
  else:
    pairs = directions.each(config.data.pair)
  if against:  # Before minutes go into the pairs that it has.
    known = run_folder.read_config(against).data.pair
    if others := [x for x in pairs if x not in directions.each(known)]:
      raise errors.UserError(
        f'--against={against}: that run has learned {known}, and not '
        f'{", ".join(others)}; a --pair that both have expected.'
      )
  return [dataclasses.replace(text, pair=pair) for pair in pairs]


if __name__ == '__main__':
  text, number = flags.DEFINE_string, flags.DEFINE_float
  text('workdir', None, 'Folder of a run of train.py.')
  text('checkpoint', '', checkpoint.WHICH)
  flags.DEFINE_enum('split', 'valid', ['valid', 'test'], 'What is scored.')
  text('data', '', 'Score this, in any form that data.source takes, instead.')
  text('pair', '', 'The direction, such as en-fr; else all.')
  number('noise', 0.0, 'Make this share of source words noisy first.', 0.0, 1.0)
  flags.DEFINE_list('columns', [], "Of --data; without it the run's.")
  text('against', '', 'Folder of another run, compared by paired bootstrap.')
  text('comet', '', 'Score with COMET too: the path of a .ckpt, or a name.')
  flags.DEFINE_integer(
    'pairs',
    None,
    'The first ones, 0 for all; without it as many as the run translates.',
    lower_bound=0,
  )
  flags.DEFINE_bool('json', False, 'Print JSON: each text with its scores.')
  flags.DEFINE_list(
    'report',
    [],
    'Folders of two to four runs, compared in comparison.html of the first.',
  )
  cli.run(main, words_of='report')
