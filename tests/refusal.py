"""How every test of bad input looks at the sentence it gets."""

import pathlib

import pytest

from mt import errors


def refusal(call, *words):
  """`call` raises a UserError whose one line has the words; paths first."""
  with pytest.raises(errors.UserError) as caught:
    call()
  text = str(caught.value)
  assert '\n' not in text
  assert text.endswith('.')
  for word in words:
    assert str(word) in text, text
    if isinstance(word, pathlib.Path):  # It has the name of the test in it.
      text = text.replace(str(word), '')
