"""One run, from the config to the scores.

The order is fixed: first validation; then, again and again, evaluate, save,
next batch, step, log. Whatever is evaluated at step n is on disk before the
checkpoint of step n, so that a resumed run neither misses nor repeats it.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import time

import chex
import grain
import jax
import ml_collections

from mt import batches
from mt import checkpoint
from mt import compiling
from mt import corpus
from mt import evaluate
from mt import journal
from mt import settings
from mt import step
from mt import tokenizer
from mt import trainable
from mt import translate
from mt import weights
from mt import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Data:
  """Everything read from disk, as text and as tokens.

  Attributes:
    train: iterator over all training rows.
    train_digest: of the training examples.
    valid: batches of the validation loss.
    scored: split -> pairs to be translated and scored.
  """

  train: grain.DatasetIterator
  train_digest: int
  valid: list[batches.Batch]
  scored: dict[str, list[corpus.Pair]]


def run(config: ml_collections.ConfigDict, folder: str | pathlib.Path) -> None:
  """Trains, or goes on training, and leaves scores in `folder`.

  Args:
    config: see configs/default.py.
    folder: the run's own, see mt/workdir.py.

  Raises:
    errors.UserError: anything that the user can mend.
  """
  started = time.monotonic()
  settings.check(config)
  workdir = pathlib.Path(folder)
  workdir_lib.open_run(workdir, config)
  compiling.keep_compiled_programs()

  pairs = read_corpus(config)
  source = open_weights(config, workdir, pairs['train'])
  data = read_data(config, source.tokenizer, pairs)
  params = source.read()
  identity = checkpoint.identity(source.config, params)
  identity['data'] = data.train_digest
  journal.say(
    f'model: {config.weights.source}, '
    f'{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.0f}M parameters'
  )

  optimizer = step.make_optimizer(config.optim, config.train.max_steps)
  state = step.init_state(
    params, config.train, optimizer, jax.random.key(config.seed)
  )
  journal.say(
    f'training: {config.train.parts}, '
    f'{sum(x.size for x in state.trained.values()) / 1e6:.2f}M parameters, '
    f'{config.train.max_steps} steps'
  )
  del params
  manager = checkpoint.open_manager(
    workdir, every=config.checkpoint.every, keep=config.checkpoint.keep
  )
  restored = checkpoint.restore(manager, state, identity)
  metrics_path = workdir / 'metrics.jsonl'
  scores_path = workdir / 'scores.json'
  if restored is not None:
    state, data_state = restored
    data.train.set_state(data_state)
    journal.say(f'resumed: {workdir} at step {int(state.step)}')
  first_step = int(state.step)
  journal.cut_metrics(metrics_path, first_step if restored else -1)
  if first_step < config.train.max_steps:
    scores_path.unlink(missing_ok=True)

  translator = translate.from_config(config, source)
  eval_step = step.make_eval_step(source.config, config.train)
  if restored is None:
    validate(eval_step, state, data.valid, metrics_path)
    translate_splits(
      'before', config, translator, state, data, workdir, identity
    )
  state = train(
    config,
    state,
    data,
    step.make_train_step(source.config, config.train, optimizer),
    eval_step,
    lambda s: checkpoint.save(manager, s, data.train.get_state(), identity),
    metrics_path,
    started,
  )
  manager.close()
  if not scores_path.exists():
    translate_splits(
      'after', config, translator, state, data, workdir, identity
    )
  report(workdir, data)
  journal.say(f'done in {time.monotonic() - started:.0f} s: {workdir}')


def read_corpus(
  config: ml_collections.ConfigDict,
) -> dict[str, list[corpus.Pair]]:
  """The pairs of the splits that the run needs."""
  splits = settings.SPLITS if config.eval.test else settings.SPLITS[:2]
  return {
    split: corpus.read_pairs(
      corpus.split_path(config.data.source, split, config.data.pair)
    )
    for split in splits
  }


def open_weights(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  pairs: Sequence[corpus.Pair],
) -> weights.Source:
  """The pretrained model; its tokenizer stays in the workdir ever after."""
  kept = workdir / 'tokenizer.model'
  source = weights.open_source(
    config.weights.source,
    config.weights.size,
    kept if kept.exists() else config.weights.tokenizer,
    seed=config.seed,
    texts=[text for p in pairs for text in (p.source, p.target)],
  )
  if not kept.exists():
    workdir_lib.write(kept, source.tokenizer.proto)
  return source


def read_data(
  config: ml_collections.ConfigDict,
  tok: tokenizer.Tokenizer,
  pairs: dict[str, list[corpus.Pair]],
) -> Data:
  """Tokenises the splits and says what became of them."""
  template = batches.Template(**config.template)
  length, size = config.data.length, config.train.batch_size
  examples = {}
  for split in ('train', 'valid'):
    chosen = pairs[split]
    if split == 'valid' and config.eval.loss_pairs:
      chosen = chosen[: config.eval.loss_pairs]
    e = batches.encode(chosen, tok, template, length, split)
    journal.say(
      f'{split}: {len(chosen):,} pairs, {e.too_long:,} dropped '
      f'(more than data.length={length} tokens), {len(e.tokens):,} tokens, '
      f'{e.num_targets:,} of them targets'
    )
    examples[split] = e
  rows = batches.PackedRows(
    examples['train'],
    length,
    config.seed,
    num_rows=config.train.max_steps * size,
    packing=config.data.packing,
  )
  number = config.eval.translate_pairs or None
  return Data(
    train=batches.train_iterator(rows, size),
    train_digest=examples['train'].digest,
    valid=list(batches.eval_batches(examples['valid'], length, size)),
    scored={k: v[:number] for k, v in pairs.items() if k != 'train'},
  )


def validate(eval_step, state, valid, metrics_path) -> None:
  """Mean loss in nats per target token over the validation batches."""
  start = time.monotonic()
  sums = [eval_step(state, batch) for batch in valid]
  nll, targets = (sum(float(m[k]) for m in sums) for k in ('nll', 'targets'))
  loss, at = nll / targets, int(state.step)
  journal.add_metrics(metrics_path, {'step': at, 'valid_loss': loss})
  journal.say(
    f'step {at}: validation loss {loss:.4f} '
    f'({targets:.0f} targets, {time.monotonic() - start:.0f} s)'
  )


def train(
  config: ml_collections.ConfigDict,
  state: step.TrainState,
  data: Data,
  train_step,
  eval_step,
  save,
  metrics_path: pathlib.Path,
  started: float,
) -> step.TrainState:
  """Takes the state to step `train.max_steps`."""
  chex.assert_rank(state.step, 0)
  first, last = int(state.step), config.train.max_steps
  progress = journal.Progress('step', last, first, config.log.every)
  clock = time.monotonic()
  pending = None  # Metrics of the step before, fetched after the next dispatch.

  def log():
    nonlocal clock
    at, metrics = pending
    metrics = {k: float(v) for k, v in metrics.items()}
    now = time.monotonic()
    speed, clock = metrics['targets'] / (now - clock), now
    loss = metrics['nll'] / max(1.0, metrics['targets'])
    line = {'step': at, 'loss': loss, 'targets_per_s': round(speed, 1)}
    line |= {k: metrics[k] for k in ('targets', 'tokens', 'grad_norm')}
    journal.add_metrics(metrics_path, line)
    progress.update(at, f'loss {loss:.3f}  {speed:.0f} target tokens/s')
    if at == first + 1:
      journal.say(f'first step after {now - started:.1f} s')

  for done in range(first, last + 1):
    evaluating = done > first and (
      done % config.eval.every == 0 or done == last
    )
    saving = done > first and (
      done % config.checkpoint.every == 0 or done == last
    )
    if pending and (evaluating or saving):
      log()
      pending = None
    if evaluating:
      validate(eval_step, state, data.valid, metrics_path)
    if saving:
      save(state)
    if done == last:
      break
    if evaluating or saving:
      clock = time.monotonic()
    batch = next(data.train)
    state, metrics = train_step(state, batch)
    if pending:
      log()
    pending = done + 1, metrics
  progress.close()
  return state


def translate_splits(
  when, config, translator, state, data, workdir, identity
) -> None:
  """Translates the scored splits and leaves the texts in the workdir."""
  params = step.model_params(config.train, state.trained, state.frozen)
  params = trainable.fold(params)
  for split, pairs in data.scored.items():
    sources = [p.source for p in pairs]
    progress = journal.Progress(f'translating {split} ({when})', len(sources))

    def work(sources=sources, progress=progress):
      return translator(params, sources, lambda done: progress.update(done))

    start = time.monotonic()
    if when == 'before':
      key = [identity, config.template.to_dict(), config.decode.to_dict()]
      texts = evaluate.remember([*key, config.train.dtype, sources], work)
    else:
      texts = work()
    progress.close()
    journal.say(
      f'translated {split} ({when}): {len(texts)} sentences, '
      f'{time.monotonic() - start:.0f} s'
    )
    folder = workdir / 'translations'
    columns = {when: texts, 'source': sources}
    columns['reference'] = [p.target for p in pairs]
    for name, lines in columns.items():
      workdir_lib.write_lines(folder / f'{split}.{name}.txt', lines)


def report(workdir: pathlib.Path, data: Data) -> None:
  """Scores and samples out of the translations, on screen and on disk."""
  scores = {}
  for split, pairs in data.scored.items():
    folder = workdir / 'translations'
    texts = {
      when: workdir_lib.read_lines(folder / f'{split}.{when}.txt')
      for when in ('before', 'after')
    }
    references = [p.target for p in pairs]
    scores[split] = {
      when: evaluate.score(lines, references) for when, lines in texts.items()
    }
    if split == 'valid':
      text = evaluate.samples([p.source for p in pairs], references, **texts)
      workdir_lib.write(workdir / 'samples.txt', text)
      journal.say('\n' + text)
  workdir_lib.write_json(workdir / 'scores.json', scores)
  for split, both in scores.items():
    for name in ('bleu', 'bleu_intl', 'chrf'):
      before, after = both['before'][name], both['after'][name]
      journal.say(
        f'{split} {name:9} {before:6.2f} -> {after:6.2f} '
        f'({after - before:+.2f})  {both["after"][name + "_signature"]}'
      )
