"""Turns of a chat, and the chat template that other programs read."""

import json
import re

from mt.base import errors
from mt.data import tokenizer

_EMPTY_THOUGHT = '<|channel>thought\n<channel|>'

_JINJA = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message['role'] == 'user' %}"
  "{{ BEFORE + message['content'] + AFTER }}"
  "{% elif message['role'] == 'assistant' %}"
  "{{ MODEL + message['content'] + END }}"
  "{% else %}{{ raise_exception('user or assistant expected') }}{% endif %}"
  '{% endfor %}{% if add_generation_prompt %}{{ MODEL }}{% endif %}'
)


def turns(tok: tokenizer.Tokenizer) -> tuple[str, str, str]:
  """What a turn begins with, what ends it, and what precedes an answer.

  Raises:
    errors.UserError: the tokenizer knows no turns.
  """
  # Of Gemma 1 to 3, and of Gemma 4.
  for found in (tokenizer.TURNS[:2], tokenizer.TURNS[2:]):
    if set(found) <= tok.controls.keys():
      return *found, _EMPTY_THOUGHT if tok.empty_thought else ''
  raise errors.UserError(
    'template.chat needs a tokenizer with the pieces <start_of_turn> and '
    "<end_of_turn>; take Gemma's own, or set template.chat=False."
  )


def wrap(prompt: str, tok: tokenizer.Tokenizer) -> str:
  """The prompt as a user's turn, up to where the model answers.

  Raises:
    errors.UserError: see `turns`.
  """
  start, end, thought = turns(tok)
  return f'{start}user\n{prompt}{end}\n{start}model\n{thought}'


def jinja(prompt: str, tok: tokenizer.Tokenizer) -> str:
  """A chat template that renders what template.prompt_ids encodes.

  A user's message is the text to be translated alone: it takes the place of
  {source} in `prompt`.
  """
  start, end, thought = turns(tok)
  before, after = prompt.split('{source}')
  texts = {
    'BEFORE': f'{start}user\n{before}',
    'AFTER': f'{after}{end}\n',
    'MODEL': f'{start}model\n{thought}',
    'END': f'{end}\n',
  }
  # Jinja reads a JSON string as it was meant.
  return re.sub(
    '|'.join(texts),
    lambda match: json.dumps(texts[match[0]], ensure_ascii=False),
    _JINJA,
  )
