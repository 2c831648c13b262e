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

With a tokenizer of Gemma 4 the two pieces are <|turn> and <turn|>.
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
from mt.data import lines
from mt.data import tokenizer

START_OF_TURN, END_OF_TURN = '<start_of_turn>', '<end_of_turn>'
# Of Gemma 1 to 3, and of Gemma 4.
TURNS = ((START_OF_TURN, END_OF_TURN), ('<|turn>', '<turn|>'))

# Codes of ISO 639-1 and their English names.
_LANGUAGES = pathlib.Path(__file__).parent / 'languages.tsv'


@dataclasses.dataclass(frozen=True)
class Template:
  """How a pair becomes text."""

  prompt: str  # With {source} in it once.
  target_prefix: str = ''  # Put before the target, taken off translations.
  # The target begins with a BOS of its own, as the tutorial has it; like all of
  # the target it is learned, and made by the model itself.
  target_bos: bool = False
  chat: bool = False  # Prompt and target are turns of a user and the model.


def from_config(config: ml_collections.ConfigDict) -> Template:
  """The template of `config.template`, with the languages' names filled in.

  Raises:
    errors.UserError: the prompt asks for the name of an unknown language.
  """
  t, prompt = config.template, config.template.prompt
  rows = _LANGUAGES.read_text('utf-8').splitlines()
  names = dict(row.split('\t') for row in rows)
  codes = config.data.pair.lower().split('-')
  for side, code in zip(('source', 'target'), codes, strict=True):
    knob = f'{side}_language'
    name = t[knob] or names.get(code)
    if f'{{{knob}}}' in prompt and not name:
      raise errors.UserError(
        f'template.prompt has {{{knob}}} in it, but the name of {code!r} (of '
        f'data.pair={config.data.pair!r}) is not known; set template.{knob}.'
      )
    prompt = prompt.replace(f'{{{knob}}}', name or '')
  return Template(prompt, t.target_prefix, t.target_bos, t.chat)


def prompt_text(
  source: str, template: Template, turns: tuple[str, str] = TURNS[0]
) -> str:
  """All text that precedes the target; `turns` are those of `turns_of`."""
  text = template.prompt.replace('{source}', source)
  if not template.chat:
    return text
  start, end = turns
  return f'{start}user\n{text}{end}\n{start}model\n'


def turns_of(tok: tokenizer.Tokenizer, template: Template) -> tuple[str, str]:
  """The pieces that a turn begins and ends with, in a chat.

  Raises:
    errors.UserError: a chat template, but the tokenizer knows no turns.
  """
  for turns in TURNS:
    # Encoded: a control piece has an id, too, but is never found in a text.
    if not template.chat or all(len(tok.encode(piece)) == 1 for piece in turns):
      return turns
  raise errors.UserError(
    f'template.chat needs a tokenizer with the pieces {START_OF_TURN} and '
    f"{END_OF_TURN}; take Gemma's own, or set template.chat=False."
  )


def prompt_ids(
  source: str, tok: tokenizer.Tokenizer, template: Template
) -> list[int]:
  """What precedes the target, in training and in translation alike."""
  turns = turns_of(tok, template)
  return [tok.bos_id] + tok.encode(prompt_text(source, template, turns))


def end_id(tok: tokenizer.Tokenizer, template: Template) -> int:
  """The token that ends a target.

  Raises:
    errors.UserError: see turns_of.
  """
  if not template.chat:
    return tok.eos_id
  return tok.encode(turns_of(tok, template)[1])[0]


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


def encode(
  pairs: Sequence[lines.Pair], tok: tokenizer.Tokenizer, template: Template
) -> Examples:
  """Tokenises pairs, whatever their length.

  Raises:
    errors.UserError: see turns_of.
  """
  turns = turns_of(tok, template)
  prompts = tok.encode_all(
    [prompt_text(p.source, template, turns) for p in pairs]
  )
  targets = tok.encode_all([template.target_prefix + p.target for p in pairs])
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
