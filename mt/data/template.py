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
"""

from collections.abc import Sequence
import dataclasses

import ml_collections

from mt.base import errors
from mt.data import lines
from mt.data import tokenizer

START_OF_TURN, END_OF_TURN = '<start_of_turn>', '<end_of_turn>'

# Codes of ISO 639-1 and their English names.
LANGUAGES = {
  'ar': 'Arabic',
  'bg': 'Bulgarian',
  'bn': 'Bengali',
  'ca': 'Catalan',
  'cs': 'Czech',
  'da': 'Danish',
  'de': 'German',
  'el': 'Greek',
  'en': 'English',
  'es': 'Spanish',
  'et': 'Estonian',
  'fa': 'Persian',
  'fi': 'Finnish',
  'fr': 'French',
  'gu': 'Gujarati',
  'he': 'Hebrew',
  'hi': 'Hindi',
  'hr': 'Croatian',
  'hu': 'Hungarian',
  'id': 'Indonesian',
  'is': 'Icelandic',
  'it': 'Italian',
  'ja': 'Japanese',
  'ko': 'Korean',
  'lt': 'Lithuanian',
  'lv': 'Latvian',
  'ms': 'Malay',
  'nl': 'Dutch',
  'no': 'Norwegian',
  'pl': 'Polish',
  'pt': 'Portuguese',
  'ro': 'Romanian',
  'ru': 'Russian',
  'sk': 'Slovak',
  'sl': 'Slovenian',
  'sr': 'Serbian',
  'sv': 'Swedish',
  'sw': 'Swahili',
  'ta': 'Tamil',
  'th': 'Thai',
  'tr': 'Turkish',
  'uk': 'Ukrainian',
  'ur': 'Urdu',
  'vi': 'Vietnamese',
  'zh': 'Chinese',
}


@dataclasses.dataclass(frozen=True)
class Template:
  """How a pair becomes text.

  Attributes:
    prompt: with {source} in it once.
    target_prefix: put before the target, and taken off translations.
    target_bos: the target begins with a BOS of its own, as the tutorial has it;
      like all of the target it is learned, and made by the model itself.
    chat: prompt and target are the turns of a user and of the model.
  """

  prompt: str
  target_prefix: str = ''
  target_bos: bool = False
  chat: bool = False


def from_config(config: ml_collections.ConfigDict) -> Template:
  """The template of `config.template`, with the languages' names filled in.

  Raises:
    errors.UserError: the prompt asks for the name of a language not known here.
  """
  t = config.template
  prompt = t.prompt
  codes = config.data.pair.lower().split('-')
  for side, code in zip(('source', 'target'), codes, strict=True):
    field, knob = f'{{{side}_language}}', f'{side}_language'
    name = t[knob] or LANGUAGES.get(code)
    if field in prompt and not name:
      raise errors.UserError(
        f'template.prompt has {field} in it, but the name of {code!r} (of '
        f'data.pair={config.data.pair!r}) is not known; set template.{knob}.'
      )
    prompt = prompt.replace(field, name or '')
  return Template(prompt, t.target_prefix, t.target_bos, t.chat)


def prompt_text(source: str, template: Template) -> str:
  """All text that precedes the target."""
  text = template.prompt.replace('{source}', source)
  if not template.chat:
    return text
  return f'{START_OF_TURN}user\n{text}{END_OF_TURN}\n{START_OF_TURN}model\n'


def prompt_ids(
  source: str, tok: tokenizer.Tokenizer, template: Template
) -> list[int]:
  """What precedes the target, in training and in translation alike."""
  return [tok.bos_id] + tok.encode(prompt_text(source, template))


def end_id(tok: tokenizer.Tokenizer, template: Template) -> int:
  """The token that ends a target.

  Raises:
    errors.UserError: a chat template, but the tokenizer knows no turns.
  """
  if not template.chat:
    return tok.eos_id
  # Encoded: a control piece has an id, too, but is never found in a text.
  turns = [tok.encode(piece) for piece in (START_OF_TURN, END_OF_TURN)]
  if any(len(ids) != 1 for ids in turns):
    raise errors.UserError(
      f'template.chat needs a tokenizer with the pieces {START_OF_TURN} and '
      f'{END_OF_TURN}, this one lacks them; set template.chat=False or take a '
      "Gemma's own tokenizer."
    )
  return turns[1][0]


def encode_pairs(
  pairs: Sequence[lines.Pair], tok: tokenizer.Tokenizer, template: Template
) -> tuple[list[list[int]], list[list[int]]]:
  """Tokens of each prompt, and of each target with what is learned around it.

  Raises:
    errors.UserError: see end_id.
  """
  end = [end_id(tok, template)]
  start = [tok.bos_id] if template.target_bos else []
  prompts = tok.encode_all([prompt_text(p.source, template) for p in pairs])
  targets = tok.encode_all([template.target_prefix + p.target for p in pairs])
  return (
    [[tok.bos_id, *ids] for ids in prompts],
    [start + ids + end for ids in targets],
  )
