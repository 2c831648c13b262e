"""A run's model for other programs.

  python -m mt.export --workdir=W --to=hf --out=DIR

--to=hf    a folder that transformers, and whatever reads its format, loads;
           low-rank factors are added into their matrices
--to=gguf  the same as a GGUF file, for llama.cpp and whatever is built on it
--to=gemma the same in Google's own Flax layout, for the gemma package
--to=peft  the low-rank factors alone, an adapter folder that PEFT loads; its
           base is what --to=hf --base writes

With what decoding has to know beside, where the format has a place for it, and
a model card. --push=hf:USER/NAME sends the folder to the Hugging Face hub.

--source=NAME --adapter=DIR in the place of --workdir adds an adapter of PEFT's
into the model that it was made for.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from absl import flags
import ml_collections
import ml_dtypes
import numpy as np

from mt.base import cli
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.data import directions
from mt.data import template as template_lib
from mt.evaluate import card
from mt.gemma import lora
from mt.gemma import parameters
from mt.train import checkpoint
from mt.translate import translator
from mt.weights import flax_out
from mt.weights import gguf_out
from mt.weights import hf
from mt.weights import hub
from mt.weights import peft
from mt.weights import pretrained

_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
  """What is exported.

  Attributes:
    source: its base, with shape and tokenizer.
    params: to be written; of an adapter the factors alone.
    about: which checkpoint it is, for people.
    config: of its run, which knows how it decodes; None without one.
    workdir: of the run.
  """

  source: pretrained.Source
  params: dict[str, Any]
  about: str
  config: ml_collections.ConfigDict | None = None
  workdir: pathlib.Path | None = None

  @property
  def chat_template(self) -> str:
    """In Jinja; '' where the run has learned no turns."""
    if self.config is None:
      return ''
    template = template_lib.from_config(self.config)
    return template_lib.chat_template(template, self.source.tokenizer)

  @property
  def generation(self) -> dict[str, Any]:
    """What transformers decodes with, as far as it means the same there.

    Its no_repeat_ngram_size and repetition_penalty count the prompt, too.
    """
    if self.config is None:
      return {}
    d, template = self.config.decode, template_lib.from_config(self.config)
    ends = translator.end_ids(self.source.tokenizer, template)
    longest = int(d.max_ratio * self.config.data.length) + d.max_extra
    out = {'eos_token_id': list(ends), 'max_new_tokens': longest}
    if d.beam > 1:
      out |= {'num_beams': d.beam, 'length_penalty': d.length_penalty}
    return out


def _direction(config):
  """The config of a run's first direction, whose prompt the folder has."""
  first, *others = directions.each(config.data.pair)
  if others:
    journal.say(
      f'note: the prompt in the folder is that of {first}; for '
      f'{", ".join(others)} put their languages into it'
    )
  return directions.only(config, first)


def _step(workdir, which):
  """The step of the checkpoint that is exported, which is said."""
  at, about = checkpoint.find_step(workdir, which)
  journal.say(f'checkpoint: {about}')
  return at, about


def _load(workdir, base, which):
  if base:
    config, source = checkpoint.open_source(workdir)
    params, config = source.read(), _direction(config)
    return Model(source, params, 'before training', config, workdir)
  at, about = _step(workdir, which)
  config, source, params = checkpoint.load_finetuned(workdir, at, exact=True)
  params, config = lora.fold(params), _direction(config)
  return Model(source, params, about, config, workdir)


def _write_hf(part, model, dtype):
  hf.write(
    part,
    model.source.config,
    model.params,
    model.source.tokenizer,
    _DTYPES[dtype],
    model.generation,
    model.chat_template,
  )


def _write_gguf(part, model, dtype):
  gguf_out.write(
    part / gguf_out.file_name(dtype),
    model.source.config,
    model.params,
    model.source.tokenizer,
    dtype,
    model.chat_template,
  )


def _write_gemma(part, model, dtype):
  cfg, tok = model.source.config, model.source.tokenizer
  flax_out.write(part, cfg, model.params, tok, dtype)


def _write_peft(part, model, dtype):
  config, source = model.config, model.source
  # A revision, a file and the 4 bits of a package are other weights.
  base = config.weights.source
  base = card.hub_name(base) if base == f'hf:{card.hub_name(base)}' else base
  peft.write(
    part,
    source.config,
    model.params,
    alpha=config.train.lora_alpha,
    base=base,
    dtype=_DTYPES[dtype],
  )
  hf.write_serving(
    part,
    source.config,
    source.tokenizer,
    model.generation,
    model.chat_template,
  )


_WRITERS = {
  'hf': _write_hf,
  'gguf': _write_gguf,
  'gemma': _write_gemma,
  'peft': _write_peft,
}


def _write(to, model, name, out, dtype, push=''):
  with files.new_folder(out) as part:
    _WRITERS[to](part, model, dtype)
    about = card.text(model, to, push or out.absolute().name, name, dtype)
    files.write(part / 'README.md', about)


def _to(
  to: str,
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool,
  which: str = '',
  push: str = '',
) -> None:
  """Writes a run's model in the format `to`.

  Args:
    workdir: of a run.
    out: a new folder.
    dtype: 'float32' or 'bfloat16', of the weights in the files; of GGUF 'q8_0',
      too.
    base: the weights that the run started from, instead of what it made.
    which: of the run's checkpoints, see checkpoint.find_step.
    push: USER/NAME that it is for, as the model card says.
  """
  model = _load(workdir, base, which)
  _write(to, model, model.config.weights.source, out, dtype, push)


to_hf = functools.partial(_to, 'hf')
to_gguf = functools.partial(_to, 'gguf')
to_gemma = functools.partial(_to, 'gemma')


def merge(
  name: str,
  adapter: str,
  to: str,
  out: pathlib.Path,
  dtype: str,
  push: str = '',
) -> None:
  """Writes a model with an adapter of PEFT's added in, without a run.

  Args:
    name: of the model, see `weights.source`.
    adapter: its folder, see `weights.adapter`; '' for the model as it is.
    to: hf, gguf or gemma.
    out, dtype, push: see to_hf.
  """
  if to == 'peft':
    raise errors.UserError(
      '--to=peft is of a run (--workdir); with --source hf, gguf or gemma '
      'expected.'
    )
  source = pretrained.open_source(name, '', '', seed=0, texts=())
  params, about = source.read(), 'as it is'
  if adapter:
    read = peft.read(pretrained.find_adapter(adapter), source.config)
    journal.say(f'adapter: {adapter}, made for {read.base}')
    flat, scale = parameters.flatten(params), read.alpha / read.rank
    params = lora.fold(lora.merge(read.factors, flat, lora_scale=scale))
    about = f'with the adapter {pathlib.PurePath(adapter).name}'
  _write(to, Model(source, params, about), name, out, dtype, push)


def to_peft(
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool,
  which: str = '',
  push: str = '',
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
  at, about = _step(workdir, which)
  config, source, trained, _ = checkpoint.load_trained(workdir, at)
  model = Model(source, trained, about, _direction(config), workdir)
  _write('peft', model, config.weights.source, out, dtype, push)


# --to= -> (workdir, out, dtype, base, which, push) -> None.
_FORMATS = {'hf': to_hf, 'gguf': to_gguf, 'gemma': to_gemma, 'peft': to_peft}


def main(_):
  f = flags.FLAGS
  out = pathlib.Path(f.out)
  files.check_new(out)  # Before minutes go into it.
  push = hub.check_upload(f.push) if f.push else ''
  if bool(f.workdir) == bool(f.source) or (f.adapter and not f.source):
    raise errors.UserError(
      '--workdir of a run expected, or --source of a model, with --adapter if '
      'you like.'
    )
  if f.dtype not in _DTYPES and f.to != 'gguf':
    raise errors.UserError(
      f'--dtype={f.dtype} is of --to=gguf alone; float32 or bfloat16 expected.'
    )
  if f.source:
    merge(f.source, f.adapter, f.to, out, f.dtype, push)
  else:
    workdir = pathlib.Path(f.workdir)
    _FORMATS[f.to](workdir, out, f.dtype, f.base, f.checkpoint, push)
  journal.say(f'written: {out}')
  if push:
    journal.say(f'sent: {hub.upload(out, push, public=f.public)}')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of train.py.')
  flags.DEFINE_string('checkpoint', '', checkpoint.WHICH)
  flags.DEFINE_enum('to', 'hf', sorted(_FORMATS), 'Format.')
  flags.DEFINE_string('out', None, 'New folder to be written.')
  flags.DEFINE_enum(
    'dtype', 'float32', sorted(gguf_out.KINDS), 'Of the weights in the files.'
  )
  flags.DEFINE_bool(
    'base', False, 'Export the weights that the run started from.'
  )
  flags.DEFINE_string(
    'source', '', 'A model instead of a run, see weights.source.'
  )
  flags.DEFINE_string('adapter', '', 'Merged into it, see weights.adapter.')
  flags.DEFINE_string(
    'push', '', 'hf:USER/NAME: a model of the hub that the folder is sent to.'
  )
  flags.DEFINE_bool('public', False, 'Make that model one that all may see.')
  flags.mark_flags_as_required(['out'])
  cli.run(main)
