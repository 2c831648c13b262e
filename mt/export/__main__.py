"""A run's model for other programs.

  python -m mt.export --workdir=W --to=hf --out=DIR

--to=hf    a folder that transformers, and whatever reads its format, loads;
           low-rank factors are added into their matrices
--to=gemma the same in Google's own Flax layout, for the gemma package
--to=peft  the low-rank factors alone, an adapter folder that PEFT loads; its
           base is what --to=hf --base writes
"""

import pathlib

from absl import flags
import ml_dtypes
import numpy as np

from mt.base import cli
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.gemma import lora
from mt.train import checkpoint
from mt.weights import flax_out
from mt.weights import hf
from mt.weights import peft

_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def _step(workdir, which):
  """The step of the checkpoint that is exported, which is said."""
  at, about = checkpoint.find_step(workdir, which)
  journal.say(f'checkpoint: {about}')
  return at


def _load(workdir, base, which):
  """Where a run's weights come from, and the parameters to be written."""
  if base:
    _, source = checkpoint.open_source(workdir)
    return source, source.read()
  _, source, params = checkpoint.load_finetuned(
    workdir, _step(workdir, which), exact=True
  )
  return source, lora.fold(params)


def to_hf(
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool,
  which: str = '',
) -> None:
  """Writes a folder of Hugging Face's.

  Args:
    workdir: of a run.
    out: a new folder.
    dtype: 'float32' or 'bfloat16', of the weights in the files.
    base: the weights that the run started from, instead of what it made.
    which: of the run's checkpoints, see checkpoint.find_step.
  """
  source, params = _load(workdir, base, which)
  with files.new_folder(out) as part:
    hf.write(part, source.config, params, source.tokenizer, _DTYPES[dtype])


def to_gemma(
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool,
  which: str = '',
) -> None:
  """Writes Google's own Flax layout; the arguments are those of to_hf."""
  source, params = _load(workdir, base, which)
  with files.new_folder(out) as part:
    flax_out.write(part, source.config, params, source.tokenizer, dtype)


def to_peft(
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool,
  which: str = '',
) -> None:
  """Writes an adapter folder of PEFT's; the arguments are those of to_hf."""
  if base:
    raise errors.UserError(
      '--base has no meaning with --to=peft: an adapter holds only what was '
      'trained; use --to=hf --base for its base.'
    )
  parts = run_folder.read_config(workdir).train.parts
  if parts != 'lora':
    raise errors.UserError(
      f'{workdir}: train.parts is {parts!r}, and only lora gives an adapter; '
      'use --to=hf.'
    )
  at = _step(workdir, which)
  config, source, trained, _ = checkpoint.load_trained(workdir, at)
  with files.new_folder(out) as part:
    peft.write(
      part,
      source.config,
      trained,
      alpha=config.train.lora_alpha,
      base=config.weights.source,
      dtype=_DTYPES[dtype],
    )


# --to= -> (workdir, out, dtype, base, which) -> None.
_WRITERS = {'hf': to_hf, 'gemma': to_gemma, 'peft': to_peft}


def main(_):
  f = flags.FLAGS
  out = pathlib.Path(f.out)
  files.check_new(out)  # Before minutes go into it.
  _WRITERS[f.to](pathlib.Path(f.workdir), out, f.dtype, f.base, f.checkpoint)
  journal.say(f'written: {out}')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of train.py.')
  flags.DEFINE_string('checkpoint', '', checkpoint.WHICH)
  flags.DEFINE_enum('to', 'hf', sorted(_WRITERS), 'Format.')
  flags.DEFINE_string('out', None, 'New folder to be written.')
  flags.DEFINE_enum(
    'dtype', 'float32', sorted(_DTYPES), 'Of the weights in the files.'
  )
  flags.DEFINE_bool(
    'base', False, 'Export the weights that the run started from.'
  )
  flags.mark_flags_as_required(['workdir', 'out'])
  cli.run(main)
