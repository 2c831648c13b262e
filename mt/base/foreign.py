"""Files that are not what their name or their place says, by first bytes."""

import os

from mt.base import errors

JSON = b'{'
SAFETENSORS = b'{"'  # From the ninth byte on, after the length of a header.
_SIZE = 512  # First bytes that tell.
_HTML = (
  'a web page, such as a site shows instead of a file; fetch the file again, '
  'with the token that its site asks for'
)
_UTF16 = (
  'UTF-16 found, UTF-8 expected; convert it, for example with '
  '`iconv -f utf-16 -t utf-8`'
)
_PICKLE = (
  'a pickle, as PyTorch saves, which can run code when it is read; take the '
  'safetensors of the model, or let transformers write them where you trust it '
  '(save_pretrained)'
)
# First bytes of what is no text -> what it is, and what to do.
_NO_TEXT = {
  b'version https://git-lfs': 'a Git LFS pointer in the place of the file '
  'itself; run `git lfs pull` in its folder, or fetch the file by itself',
  b'PK\x03\x04': 'a zip archive; unpack it and give what is in it',
  # All of it: a text may begin with BZh.
  **{b'BZh%d1AY&SY' % n: 'packed by bzip2; unpack it' for n in range(1, 10)},
  b'\x28\xb5\x2f\xfd': 'packed by zstd; unpack it',
  b'\xff\xfe': _UTF16,
  b'\xfe\xff': _UTF16,
}
_KINDS = _NO_TEXT | {
  b'<!doctype html': _HTML,
  b'<html': _HTML,
  b'\x1f\x8b': 'a gzip archive; unpack it and give what is in it',
  b'\x89HDF': 'an HDF5 file of Keras; take the flax or the transformers '
  'variation of the model',
  b'GGUF': 'a GGUF file; give it as weights.source',
  JSON: 'a JSON file; give the folder that it is in',
}
_KINDS |= {bytes([0x80, version]): _PICKLE for version in range(2, 6)}


def refuse_no_text(head: bytes, name: str) -> None:
  """Refuses what cannot be lines of UTF-8, by the first bytes of a file."""
  for magic, what in _NO_TEXT.items():
    if head.startswith(magic):
      raise errors.UserError(f'{name}: {what}.')


def refuse(path: str | os.PathLike[str], wanted: bytes = b'') -> None:
  """Says what a file is that was taken for another; nothing if unknown.

  To be called where the file has already turned out not to be what was
  expected.

  Args:
    path: of the file.
    wanted: the first bytes of what it was to be: one of these is damaged.

  Raises:
    errors.UserError: its first bytes are those of another kind that is known.
  """
  with open(path, 'rb') as f:
    head = f.read(_SIZE)
  text = head.lstrip().lower()
  kind = next((k for k in _KINDS if text.startswith(k.lower())), wanted)
  what = _KINDS.get(kind)
  if head[8:10] == SAFETENSORS:
    kind = SAFETENSORS
    what = (
      'a safetensors file; give the folder that it is in, with config.json and '
      'a tokenizer'
    )
  elif b'/data.pkl' in head:  # In a zip.
    what = _PICKLE
  if kind != wanted:
    raise errors.UserError(f'{os.fspath(path)}: {what}.')
