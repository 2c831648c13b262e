"""A run's model for other programs.

  python -m mt.export --workdir=W --to=hf --out=DIR

--to=hf    a folder that transformers, and whatever reads its format, loads;
           low-rank factors are added into their matrices
--to=gguf  the same as a GGUF file, for llama.cpp and whatever is built on it
--to=gemma the same in Google's own Flax layout, for the gemma package
--to=peft  the low-rank factors alone, an adapter folder that PEFT loads; its
           base is the run's, if from Hugging Face, or what --to=hf --base
           writes

With what decoding has to know beside, where the format has a place for it, and
a model card. --push=hf:USER/NAME sends the folder to the Hugging Face hub, as a
private model; with --public all may see it.

--source=NAME --adapter=DIR in the place of --workdir adds an adapter of PEFT's
into the model that it was made for.
"""

import pathlib
from typing import Any

from absl import flags
import ml_collections

from mt.base import cli
from mt.base import errors
from mt.base import files
from mt.base import journal
from mt.base import run_folder
from mt.data import chat
from mt.data import directions
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.evaluate import card
from mt.gemma import lora
from mt.gemma import parameters
from mt.gemma import sharding
from mt.gemma import sizes
from mt.train import checkpoint
from mt.train import state as state_lib
from mt.translate import translator
from mt.weights import flax_out
from mt.weights import gguf_out
from mt.weights import hf
from mt.weights import hub
from mt.weights import peft
from mt.weights import pretrained

FORMATS = 'gemma', 'gguf', 'hf', 'peft'


def generation(
  config: ml_collections.ConfigDict | None,
  cfg: sizes.ModelConfig,
  tok: tokenizer.Tokenizer,
) -> dict[str, Any]:
  """What transformers decodes a model with, as far as it means the same.

  Its no_repeat_ngram_size and repetition_penalty count the prompt, too. Without
  the config of a run only what our search never chooses, either.
  """
  never = translator.never_ids(tok)
  spare = range(tok.vocab_size, cfg.vocab_size)
  out = {'suppress_tokens': [*never, *spare]} if never else {}
  if config is None:
    return out
  d, template = config.decode, template_lib.from_config(config)
  longest = int(d.max_ratio * config.data.length) + d.max_extra
  ends = list(translator.end_ids(tok, template))
  out |= {'eos_token_id': ends, 'max_new_tokens': longest}
  if d.beam > 1:
    out |= {'num_beams': d.beam, 'length_penalty': d.length_penalty}
  return out


def check(to: str, source: pretrained.Source) -> None:
  """Refuses a model that a format cannot say, before minutes go into it.

  Raises:
    errors.UserError: with what it cannot say.
  """
  if to == 'gguf':
    gguf_out.check(source.config)
  if to == 'gemma':
    flax_out.published(source.config, source.tokenizer)


def write(
  out: pathlib.Path,
  params: parameters.Params,
  about: card.Model,
  chat_template: str = '',
) -> None:
  """Writes a new folder with a model (of peft: its factors) and its card.

  Without a run the chat template is the given one.
  """
  cfg, tok, config = about.cfg, about.tok, about.config
  if config is not None:  # Of a run; '' without turns.
    template = template_lib.from_config(config)
    prompt = template.prompt
    chat_template = chat.jinja(prompt, tok) if template.chat else ''
  serving = generation(config, cfg, tok), chat_template
  with files.new_folder(out) as part:
    if about.to == 'hf':
      hf.write(part, cfg, params, tok, about.dtype, *serving)
    elif about.to == 'gguf':
      path = part / gguf_out.file_name(about.dtype)
      gguf_out.write(path, cfg, params, tok, about.dtype, chat_template)
    elif about.to == 'gemma':
      flax_out.write(part, cfg, params, tok, about.dtype)
    else:
      # A revision, a file and the 4 bits of a package are other weights.
      base, alpha = about.source, config.train.lora_alpha
      if base == f'hf:{card.hub_name(base)}':
        base = card.hub_name(base)
      else:
        journal.say(
          f'note: adapter_config.json names {base} as its base, which PEFT '
          'does not find elsewhere: set base_model_name_or_path in it to a '
          f'folder that {card.base_folder(about)}'
        )
      peft.write(
        part,
        cfg,
        params,
        alpha=alpha,
        base=base,
        dtype=about.dtype,
        multimodal=about.multimodal,
      )
      hf.write_serving(part, cfg, tok, *serving)
    card.write(part, about)


def from_run(
  to: str,
  workdir: pathlib.Path,
  out: pathlib.Path,
  dtype: str,
  base: bool = False,
  which: str = '',
  push: str = '',
) -> None:
  """Writes a run's model.

  Args:
    to: one of FORMATS.
    workdir: of a run.
    out: a new folder.
    dtype: 'float32' or 'bfloat16', of the weights in the files; of GGUF 'q8_0',
      too.
    base: its pretrained weights, instead of what it made.
    which: of the run's checkpoints, see checkpoint.find_step.
    push: USER/NAME that it is for, as the model card says.

  Raises:
    errors.UserError: no such run or checkpoint, one that has no adapter, or
      what the format cannot hold.
  """
  parts = run_folder.read_config(workdir).train.parts
  if to == 'peft' and (base or parts != 'lora'):
    raise errors.UserError(
      f'{workdir}: --to=peft is what a run with train.parts=lora has trained, '
      f'found {parts!r}{" and --base" if base else ""}; use --to=hf.'
    )
  at, about = None, 'before training'
  if not base:
    at, about = checkpoint.find_step(workdir, which)
    journal.say(f'checkpoint: {about}')
  opened = config, source = checkpoint.open_source(workdir)
  check(to, source)
  if base:
    params = sharding.on_host(source.read)
  else:
    whole = to != 'peft'
    _, _, params, frozen = checkpoint.load_trained(workdir, at, whole, opened)
    if whole:
      params = state_lib.model_params(config.train, params, frozen)
      params = lora.fold(params)
  first, *others = directions.each(config.data.pair)
  if others:
    journal.say(
      f'note: the prompt in the folder is that of {first}; for '
      f'{", ".join(others)} put their languages into it'
    )
  config = directions.only(config, first)
  model = card.Model(
    to=to,
    name=push or out.absolute().name,
    source=config.weights.source,
    about=about,
    cfg=source.config,
    tok=source.tokenizer,
    config=config,
    workdir=workdir,
    dtype=dtype,
    multimodal=source.multimodal,
  )
  write(out, params, model)


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
    out, dtype, push: see from_run.
  """
  if to == 'peft':
    raise errors.UserError(
      '--to=peft is of a run (--workdir); with --source hf, gguf or gemma '
      'expected.'
    )
  if name == 'random':
    raise errors.UserError(
      '--source=random: a model that is somewhere expected; random weights are '
      'exported out of a run, with --workdir.'
    )
  source = pretrained.open_source(name, '', '', seed=0, texts=())
  check(to, source)
  about, read = 'as it is', source.read
  if adapter:
    found = peft.read(pretrained.find_adapter(adapter), source.config)
    journal.say(f'adapter: {adapter}, made for {found.base}')
    about = f'with the adapter {pathlib.PurePath(adapter).name}'

    def read():
      flat, scale = parameters.flatten(source.read()), found.alpha / found.rank
      return lora.fold(lora.merge(found.factors, flat, lora_scale=scale))

  params = sharding.on_host(read)
  model = card.Model(
    to=to,
    name=push or out.absolute().name,
    source=name,
    about=about,
    cfg=source.config,
    tok=source.tokenizer,
    dtype=dtype,
  )
  write(out, params, model, source.chat_template)


def main(_):
  f = flags.FLAGS
  out = pathlib.Path(f.out)
  files.check_new(out)  # Before minutes go into it.
  if bool(f.workdir) == bool(f.source):
    raise errors.UserError('exactly one of --workdir and --source expected.')
  if sum(map(bool, (f.source, f.base, f.checkpoint))) > 1:
    raise errors.UserError(
      'at most one of --source, --base and --checkpoint expected.'
    )
  if f.public and not f.push:
    raise errors.UserError('--public is of --push, which is not given.')
  push = hub.check_upload(f.push) if f.push else ''
  if f.adapter and not f.source:
    raise errors.UserError('--adapter is of --source, which is not given.')
  if f.dtype == 'q8_0' and f.to != 'gguf':
    raise errors.UserError(
      f'--dtype={f.dtype} is of --to=gguf alone; float32 or bfloat16 expected.'
    )
  if f.source:
    merge(f.source, f.adapter, f.to, out, f.dtype, push)
  else:
    workdir = pathlib.Path(f.workdir)
    from_run(f.to, workdir, out, f.dtype, f.base, f.checkpoint, push)
  journal.say(f'written: {out}')
  if push:
    journal.say(f'sent: {hub.upload(out, push, public=f.public)}')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of train.py.')
  flags.DEFINE_string('checkpoint', '', checkpoint.WHICH)
  flags.DEFINE_enum('to', 'hf', FORMATS, 'Format.')
  flags.DEFINE_string('out', None, 'New folder to be written.')
  flags.DEFINE_enum(
    'dtype', 'float32', sorted(gguf_out.KINDS), 'Of the weights in the files.'
  )
  flags.DEFINE_bool(
    'base', False, 'Export the pretrained weights of the run instead.'
  )
  flags.DEFINE_string(
    'source', '', 'A model instead of a run, see weights.source.'
  )
  flags.DEFINE_string('adapter', '', 'Merged into it, see weights.adapter.')
  flags.DEFINE_string(
    'push', '', 'hf:USER/NAME: a model of the hub that the folder is sent to.'
  )
  flags.DEFINE_bool('public', False, 'Make that model one that all may see.')
  flags.mark_flag_as_required('out')
  cli.run(main)
