"""When translation compiles: one call with all sentences, then another.

  python -m tests.benchmarks.recompiles FILE.tsv [--sentences=1000] [--real]

FILE has an English text in its second column, as MTNT has. Printed is each
program that XLA was asked for, by the time and by the sentences that were done
by then. The model has the tokenizer and the vocabulary of Gemma 3 270M and
random, narrow layers, unless --real takes the whole of it: the programs are the
same. Exit code 1 if the second call compiled one that takes over a second.
"""

import dataclasses
import pathlib
import sys
import time

from absl import flags
import jax

from configs import gemma3_270m
from mt.base import cli
from mt.base import errors
from mt.gemma import parameters
from mt.gemma import sizes
from mt.train import machine
from mt.translate import decode
from mt.translate import translator as translator_lib
from mt.weights import pretrained
from tests.benchmarks.sides import ours

# A program that is found in the cache of compiled ones counts as well.
_EVENT = '/jax/core/compile/backend_compile_duration'


class Compilations:
  """Listens, from its making on, to all that JAX compiles in this process.

  Attributes:
    times: when each was done, by time.monotonic().
    seconds: what each took.
  """

  def __init__(self):
    self.times, self.seconds = [], []
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event, seconds, **kwargs):
    if event == _EVENT:
      self.times.append(time.monotonic())
      self.seconds.append(seconds)


def narrow_model(source: pretrained.Source) -> tuple[sizes.ModelConfig, dict]:
  """A model in which a step takes next to no time."""
  cfg = dataclasses.replace(
    sizes.SIZES['debug'], vocab_size=source.config.vocab_size, embed_dim=8
  )
  return cfg, parameters.init(cfg, jax.random.key(0))


def run(
  translator: translator_lib.Translator,
  params: parameters.Params,
  texts: list[str],
  compilations: Compilations,
) -> list[tuple[float, float, int]]:
  """Translates in one call.

  Returns:
    (after so many seconds, took, texts done) of each program.
  """
  start, before = time.monotonic(), len(compilations.times)
  done = []  # (time, number).

  def on_progress(number):
    done.append((time.monotonic(), number))

  translator.translate(params, texts, on_progress)
  found = []
  for at, seconds in zip(
    compilations.times[before:], compilations.seconds[before:], strict=True
  ):
    number = max((n for t, n in done if t <= at), default=0)
    found.append((at - start, seconds, number))
  return found


def sources(path: pathlib.Path) -> list[str]:
  """The second column."""
  lines = path.read_text('utf-8').split('\n')
  return [line.split('\t')[1] for line in lines if line.count('\t') == 2]


def main(argv):
  if len(argv) != 2:
    raise errors.UserError('one FILE.tsv is wanted: see the docstring.')
  f, compilations = flags.FLAGS, Compilations()
  texts = sources(pathlib.Path(argv[1]))
  source = ours.open_weights()
  if f.real:
    cfg, params = source.config, source.read()
  else:
    cfg, params = narrow_model(source)
  source = dataclasses.replace(source, config=cfg)
  config = machine.here(gemma3_270m.get_config())
  translator = translator_lib.from_config(config, source)
  params = decode.unstack(params)
  n = f.sentences
  late = False
  for name, part in (('first', texts[:n]), ('next', texts[n : 2 * n])):
    start = time.monotonic()
    found = run(translator, params, part, compilations)
    compiling = sum(seconds for _, seconds, _ in found)
    print(
      f'{name} {len(part)} sentences: {time.monotonic() - start:.0f} s, '
      f'{len(found)} programs, {compiling:.1f} s of compiling',
      flush=True,
    )
    for at, seconds, number in found:
      print(f'  after {at:6.1f} s, {number:5} done: {seconds:.2f} s')
    late |= name == 'next' and any(seconds > 1 for _, seconds, _ in found)
  sys.exit(late)


if __name__ == '__main__':
  flags.DEFINE_integer('sentences', 1000, 'In each of the two calls.', 1)
  flags.DEFINE_bool('real', False, 'The whole of Gemma 3 270M.')
  cli.run(main)
