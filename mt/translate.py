"""Text to text: batches of prompts through the greedy decoder.

  python -m mt.translate --workdir=W < in.txt > out.txt

One line in, one line out, in order. An empty line stays empty.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import itertools
import os
import pathlib
import sys

from absl import flags
import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mt import checkpoint
from mt import compiling
from mt import decode
from mt import errors
from mt import model
from mt import sharding
from mt import sizes
from mt import template as template_lib
from mt import tokenizer
from mt import weights

Translator = Callable[..., list[str]]  # See make_translator.

_SMALLEST_BUCKET = 32
_FULL_BATCH = 256  # The widest bucket with batch_size rows.
_LINES_AT_ONCE = 1024  # Sorted by length among themselves.


def stop_ids(
  tok: tokenizer.Tokenizer, template: template_lib.Template
) -> np.ndarray:
  """What ends a translation: [n] int32.

  EOS, the template's own end and, as one line is one text, every piece of
  newlines.
  """
  pieces = (tok.spm.id_to_piece(i) for i in range(tok.vocab_size))
  newlines = [
    i for i, p in enumerate(pieces) if p == '<0x0A>' or not p.strip('\n')
  ]
  ends = {tok.eos_id, template_lib.end_id(tok, template)}
  return np.array([*sorted(ends), *newlines], np.int32)


def bucket(length: int) -> int:
  """The padded prompt length: the next power of two, 32 at least."""
  chex.assert_scalar_positive(length)
  return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def make_translator(
  cfg: sizes.ModelConfig,
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
  *,
  batch_size: int,
  max_ratio: float,
  max_extra: int,
  dtype: jnp.dtype = jnp.float32,
  mesh: Mesh | None = None,
) -> Translator:
  """A function (params, texts, on_progress=…) -> translations.

  It compiles once per bucket, and calls on_progress with the number of
  sentences done. Sentences are sorted by length, so that a batch holds prompts
  of one bucket and ends at about the same step; the order of the result is that
  of `texts`.

  Args:
    cfg: the model's shape.
    tok: its tokenizer.
    template: the one that the model was trained with.
    batch_size: B; less in buckets wider than 256 tokens.
    max_ratio: a translation ends at max_ratio * source tokens + max_extra.
    max_extra: see max_ratio.
    dtype: of the activations.
    mesh: where the parameters are, if not on one device.
  """
  chex.assert_scalar_positive(batch_size)
  chex.assert_scalar_positive(max_ratio)
  stops = stop_ids(tok, template)
  unstack = jax.jit(decode.unstack)

  def limit(source_tokens: int) -> int:
    return int(max_ratio * source_tokens) + max_extra

  @functools.cache
  def decoder(width: int):
    def greedy(params, tokens, lengths, limits):
      return decode.greedy(
        cfg,
        params,
        tokens,
        lengths,
        limits,
        jnp.asarray(stops),
        max_new=limit(width),
        dtype=dtype,
      )

    # Every process reads what comes out.
    places = None if mesh is None else sharding.whole(mesh)
    return compiling.jit_once(greedy, out_shardings=places)

  def translate(
    params: model.Params,
    texts: Sequence[str],
    on_progress: Callable[[int], None] = lambda done: None,
  ) -> list[str]:
    params = unstack(params)
    out = [''] * len(texts)
    prompts = {
      i: template_lib.prompt_ids(text, tok, template)
      for i, text in enumerate(texts)
      if text.strip()
    }
    limits = {i: limit(len(tok.encode(texts[i]))) for i in prompts}
    groups: dict[int, list[int]] = {}
    for i in sorted(prompts, key=lambda i: len(prompts[i])):
      groups.setdefault(bucket(len(prompts[i])), []).append(i)
    done = len(texts) - len(prompts)
    for width, members in groups.items():
      # Attention takes memory by rows * width^2: fewer rows for long texts.
      size = max(1, min(batch_size, batch_size * _FULL_BATCH // width))
      for at in range(0, len(members), size):
        chosen = members[at : at + size]
        tokens = np.zeros((size, width), np.int32)
        lengths, most = np.ones(size, np.int32), np.zeros(size, np.int32)
        for row, i in enumerate(chosen):
          tokens[row, : len(prompts[i])] = prompts[i]
          lengths[row], most[row] = len(prompts[i]), limits[i]
        made, counts = decoder(width)(params, tokens, lengths, most)
        for i, ids, count in zip(
          chosen, np.asarray(made), np.asarray(counts), strict=False
        ):
          out[i] = _clean(tok.decode(ids[:count].tolist()), template)
        done += len(chosen)
        on_progress(done)
    return out

  return translate


def _clean(text: str, template: template_lib.Template) -> str:
  text = text.removeprefix(template.target_prefix)
  return ' '.join(text.splitlines()).strip()


def from_config(
  config: ml_collections.ConfigDict,
  source: weights.Source,
  mesh: Mesh | None = None,
) -> Translator:
  """The translator of `config.decode`."""
  return make_translator(
    source.config,
    source.tokenizer,
    template_lib.from_config(config),
    batch_size=config.decode.batch_size,
    max_ratio=config.decode.max_ratio,
    max_extra=config.decode.max_extra,
    dtype=jnp.dtype(config.train.dtype),
    mesh=mesh,
  )


def _read_lines(stream) -> Iterator[str]:
  """Lines of UTF-8, ended by LF or CRLF and nothing else."""
  for number, line in enumerate(stream, 1):
    try:
      text = line.decode()
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f'standard input, line {number}: not UTF-8 ({e.reason} at byte '
        f'{e.start}); convert it to UTF-8.'
      ) from None
    yield text.removesuffix('\n').removesuffix('\r')


def main(argv):
  if len(argv) > 1:
    raise errors.UserError(
      f'{argv[1]!r} is no flag; give the text on standard input.'
    )
  compiling.keep_compiled_programs()
  config, source, params = checkpoint.load_finetuned(
    pathlib.Path(flags.FLAGS.workdir)
  )
  translator = from_config(config, source)
  lines = _read_lines(sys.stdin.buffer)
  try:
    while chunk := list(itertools.islice(lines, _LINES_AT_ONCE)):
      for text in translator(params, chunk):
        sys.stdout.buffer.write(text.encode() + b'\n')
      sys.stdout.buffer.flush()
  except BrokenPipeError:  # The reader has what it wanted.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of train.py.')
  flags.mark_flag_as_required('workdir')
  errors.run(main)
