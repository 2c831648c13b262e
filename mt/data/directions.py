"""Several directions in one run, such as data.pair='en-fr,fr-en,en-ja'.

Each is a text of its own: with its template, into which the names of its
languages go, its share of the rows, and its scores under a name such as
valid-en-fr. A run with one direction has no such names.
"""

import ml_collections

from mt.base import errors
from mt.data import template


def each(pair: str) -> list[str]:
  """The directions of `data.pair`."""
  return [direction.strip() for direction in pair.split(',')]


def languages(direction: str) -> tuple[str, str]:
  """Source and target without regions: of en-pt_BR, en and pt."""
  source, target = map(template.base_language, direction.split('-'))
  return source, target


def turned(direction: str) -> str:
  """Of en-fr, fr-en."""
  return '-'.join(reversed(direction.split('-')))


def name(pair: str, what: str, direction: str) -> str:
  """What a direction's part is called: valid-en-fr, or `what` if it is all."""
  return what if len(each(pair)) == 1 else f'{what}-{direction}'


def named(pair: str, *whats: str) -> dict[str, str]:
  """Name -> direction, of all of `data.pair` for each of `whats`."""
  return {name(pair, what, d): d for what in whats for d in each(pair)}


def only(
  config: ml_collections.ConfigDict, direction: str = ''
) -> ml_collections.ConfigDict:
  """The config of one of its directions; '' where it has no other.

  Raises:
    errors.UserError: not one of them, or none is named of several.
  """
  found = each(config.data.pair)
  if not direction and len(found) == 1:
    return config
  if direction not in found:
    raise errors.UserError(
      f'--pair is {direction!r}; one of the directions that the run has '
      f'learned expected: {", ".join(found)}.'
    )
  config = config.copy_and_resolve_references()
  config.data.pair = direction
  return config
