"""How a pair becomes tokens: prompt, target, and what ends it.

One example is  BOS prompt target EOS;  the target and EOS are learned.
With `prompt='{source_language}: {source}\\n{target_language}:'` and
`target_prefix=' '`, English to French:

  source 'Hi!'  target 'Salut !'
  tokens         <bos> English :  ▁Hi  !  \\n French :  ▁Salut ▁! <eos>
  target_mask      0     0     0    0  0   0   0    0     1     1   1

With `chat` the prompt is a user's turn, in the form that Gemma's
instruction-tuned models were trained with (ai.google.dev/gemma/docs, "Gemma
formatting and system instructions"), and the learned part ends with
<end_of_turn> instead of EOS:

  <bos><start_of_turn>user
  PROMPT<end_of_turn>
  <start_of_turn>model
  TARGET<end_of_turn>

With a tokenizer of Gemma 4 the two pieces are <|turn> and <turn|>. Its large
models answer after a thought, and the prompt ends with an empty one.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import pathlib

import chex
import ml_collections
import numpy as np

from mt.base import errors
from mt.data import chat
from mt.data import lines
from mt.data import tokenizer

_TARGET = '\0'  # Stands for the target after its prefix; no text has it.

# Code of ISO 639, English name as TranslateGemma has it; codes of ISO 639-3, as
# FLORES has them; scripts, if not Latin.
_FOLDER = pathlib.Path(__file__).parent
_ROWS = [
  row.split('\t')
  for row in (_FOLDER / 'languages.tsv').read_text('utf-8').splitlines()
]
LANGUAGES = {code: name for code, name, *_ in _ROWS}
SCRIPTS = {code: x.split() for code, _, *rest in _ROWS for x in rest[1:]}
_SHORT = {x: row[0] for row in _ROWS for x in ' '.join(row[2:3]).split()}

# Prompts that a model was trained with, by name: of TranslateGemma, in a chat
# (arXiv 2601.09012; chat_template.jinja of google/translategemma-4b-it).
PROMPTS = {
  path.stem: path.read_text('utf-8').removesuffix('\n')
  for path in (_FOLDER / 'prompts').glob('*.txt')
}

# Codes that its table of languages lacks, and what it has in their place; those
# of ISO 639-3 it lacks, too.
_TRANSLATEGEMMA = {'zh_cn': 'zh_Hans', 'fil': 'fil_PH'}


@dataclasses.dataclass(frozen=True)
class Template:
  """How a pair becomes text."""

  prompt: str  # With {source} in it once.
  target_prefix: str = ''  # Put before the target, taken off translations.
  # The target begins with a BOS of its own, as the tutorial has it; like all of
  # the target it is learned, and made by the model itself.
  target_bos: bool = False
  chat: bool = False  # Prompt and target are turns of a user and the model.


def base_language(code: str) -> str:
  """Of a code such as pt_BR, zh-Hans, fr or fra_Latn: pt, zh, fr, fr."""
  first = code.replace('_', '-').partition('-')[0].lower()
  return _SHORT.get(first, first)


def from_config(config: ml_collections.ConfigDict) -> Template:
  """The template of `config.template`, with the languages' names filled in.

  Raises:
    errors.UserError: the prompt asks for the name of an unknown language.
  """
  t, pair = config.template, config.data.pair
  prompt = PROMPTS.get(t.prompt, t.prompt)
  for side, code in zip(('source', 'target'), pair.split('-'), strict=True):
    name = t[f'{side}_language'] or LANGUAGES.get(base_language(code), '')
    _check_language(config, prompt, side, code, name)
    prompt = prompt.replace(f'{{{side}_language}}', name)
    prompt = prompt.replace(f'{{{side}_code}}', code.replace('_', '-'))
  return Template(prompt, t.target_prefix, t.target_bos, t.chat)


def _check_language(config, prompt, side, code, name):
  """Refuses a language without a name, or that TranslateGemma does not know."""
  field, pair = f'{side}_language', config.data.pair
  if f'{{{field}}}' in prompt and not name:
    raise errors.UserError(
      f'template.prompt has {{{field}}} in it, but the name of {code!r} (of '
      f'data.pair={pair!r}) is not known; set template.{field}.'
    )
  known = _TRANSLATEGEMMA.get(code.lower())
  if not config.template[field]:  # Who names it may have trained with the code.
    known = known or _SHORT.get(code[:3].lower())
  if config.template.prompt == 'translategemma' and known:
    raise errors.UserError(
      f'data.pair is {pair!r}, but TranslateGemma has no {code}; {known} '
      'expected.'
    )


def prompt_text(template: Template, tok: tokenizer.Tokenizer) -> str:
  """All text that precedes the target, with {source} in it.

  Raises:
    errors.UserError: a chat template, but the tokenizer knows no turns.
  """
  return chat.wrap(template.prompt, tok) if template.chat else template.prompt


def prompt_ids(
  source: str, tok: tokenizer.Tokenizer, template: Template
) -> list[int]:
  """What precedes the target, in training and in translation alike."""
  (ids,) = _fill_in(prompt_text(template, tok), '{source}', [source], tok)
  return [tok.bos_id, *ids]


def _fill_in(pattern, field, texts, tok) -> list[list[int]]:
  """Tokens of the pattern with each text in place of the field.

  Turns and other control pieces are those of the pattern alone.
  """
  columns = []
  for part in tok.split(pattern):
    if part in tok.controls:
      columns.append([[tok.controls[part]]] * len(texts))
    elif field in part:
      filled = [part.replace(field, text) for text in texts]
      columns.append(tok.encode_all(filled))
    else:
      columns.append([tok.encode(part)] * len(texts))
  rows = zip(*columns, strict=True)
  return [list(itertools.chain.from_iterable(row)) for row in rows]


def end_id(tok: tokenizer.Tokenizer, template: Template) -> int:
  """The token that ends a target.

  Raises:
    errors.UserError: see prompt_text.
  """
  return tok.controls[chat.turns(tok)[1]] if template.chat else tok.eos_id


@dataclasses.dataclass(frozen=True)
class Examples:
  """Tokenised pairs, one after the other in a flat array."""

  tokens: np.ndarray  # [sum of sizes] int32.
  sizes: np.ndarray  # [n] int32, tokens of each example.
  target_starts: np.ndarray  # [n] int32, where the learned part of each begins.

  def __post_init__(self):
    chex.assert_equal_shape([self.sizes, self.target_starts])
    chex.assert_shape(self.tokens, (self._ends[-1],))

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

  def __len__(self) -> int:
    return len(self.sizes)

  def ids(self, i: int) -> np.ndarray:
    """Tokens of example i."""
    return self.tokens[self._ends[i] : self._ends[i + 1]]


def join(parts: Sequence[Examples]) -> Examples:
  """Examples of several templates, one after the other."""
  names = [field.name for field in dataclasses.fields(Examples)]
  return Examples(
    *(np.concatenate([getattr(p, n) for p in parts]) for n in names)
  )


def encode(
  pairs: Sequence[lines.Pair], tok: tokenizer.Tokenizer, template: Template
) -> Examples:
  """Tokenises pairs, whatever their length.

  Raises:
    errors.UserError: see prompt_text.
  """
  sources, targets = [p.source for p in pairs], [p.target for p in pairs]
  prompts = _fill_in(prompt_text(template, tok), '{source}', sources, tok)
  pattern = template.target_prefix + _TARGET
  targets = _fill_in(pattern, _TARGET, targets, tok)
  start = [tok.bos_id] if template.target_bos else []
  end = [end_id(tok, template)]
  examples = [
    [tok.bos_id, *prompt, *start, *target, *end]
    for prompt, target in zip(prompts, targets, strict=True)
  ]
  sizes = np.array([len(ids) for ids in examples], np.int32)
  starts = np.array([1 + len(prompt) for prompt in prompts], np.int32)
  tokens = itertools.chain.from_iterable(examples)
  return Examples(np.fromiter(tokens, np.int32, sizes.sum()), sizes, starts)
