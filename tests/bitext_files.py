"""Files of parallel text for the tests."""

from mt import bitext

BOM = b'\xef\xbb\xbf'


def write(path, content):
  path.unlink(missing_ok=True)  # To cut a file is slow on ext4.
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def open_text(
  tmp_path, *contents, suffix='.tsv', columns=(), bad=1.0, **options
):
  """The bitext of one file, or of two aligned ones; bad lines are put up with.

  None as a content leaves the file as it is.
  """
  paths = [tmp_path / f'x{n}{suffix}' for n in range(len(contents))]
  for path, content in zip(paths, contents, strict=True):
    if content is not None:
      write(path, content)
  return bitext.open_bitext(
    paths, 'en-fr', columns, max_bad_fraction=bad, **options
  )


def tuples(text):
  return [tuple(p) for p in text.read()]
