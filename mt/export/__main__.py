"""A run's model for other programs.

  python -m mt.export --workdir=W --to=hf --out=DIR

--to=hf    a folder that transformers, and whatever reads its format, loads;
           low-rank factors are added into their matrices
--to=gemma the same in Google's own Flax layout, for the gemma package
--to=peft  the low-rank factors alone, an adapter folder that PEFT loads; its
           base is what --to=hf --base writes

--source=NAME --adapter=DIR in the place of --workdir adds an adapter of PEFT's
into the model that it was made for.
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
from mt.gemma import parameters
from mt.train import checkpoint
from mt.weights import flax_out
from mt.weights import hf
from mt.weights import peft
from mt.weights import pretrained

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
    _write_hf(part, source, params, dtype)


def _write_hf(part, source, params, dtype):
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
    _write_gemma(part, source, params, dtype)


def _write_gemma(part, source, params, dtype):
  flax_out.write(part, source.config, params, source.tokenizer, dtype)


def merge(
  name: str, adapter: str, to: str, out: pathlib.Path, dtype: str
) -> None:
  """Writes a model with an adapter of PEFT's added in, without a run.

  Args:
    name: of the model, see `weights.source`.
    adapter: its folder, see `weights.adapter`; '' for the model as it is.
    to: hf or gemma.
    out, dtype: see to_hf.
  """
  write = {'hf': _write_hf, 'gemma': _write_gemma}.get(to)
  if write is None:
    raise errors.UserError(
      f'--to={to} is of a run (--workdir); with --source hf or gemma expected.'
    )
  source = pretrained.open_source(name, '', '', seed=0, texts=())
  params = source.read()
  if adapter:
    read = peft.read(pretrained.find_adapter(adapter), source.config)
    journal.say(f'adapter: {adapter}, made for {read.base}')
    flat, scale = parameters.flatten(params), read.alpha / read.rank
    params = lora.fold(lora.merge(read.factors, flat, lora_scale=scale))
  with files.new_folder(out) as part:
    write(part, source, params, dtype)


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
  if bool(f.workdir) == bool(f.source) or (f.adapter and not f.source):
    raise errors.UserError(
      '--workdir of a run expected, or --source of a model, with --adapter if '
      'you like.'
    )
  if f.source:
    merge(f.source, f.adapter, f.to, out, f.dtype)
  else:
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
  flags.DEFINE_string(
    'source', '', 'A model instead of a run, see weights.source.'
  )
  flags.DEFINE_string('adapter', '', 'Merged into it, see weights.adapter.')
  flags.mark_flags_as_required(['out'])
  cli.run(main)
