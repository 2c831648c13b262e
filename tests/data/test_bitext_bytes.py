"""Any bytes at all, against a slow reading of whole files."""

import json
import random
import re

import pytest

from mt.base import errors
from mt.data import lines
from tests.fixtures.bitext_files import BOM
from tests.fixtures.bitext_files import open_text

CHUNKS = [
  *(b'\t', b'\t', b'\n', b'\n', b'\r\n', b'\r', b'\0', b' ', b'"', b"'", b'\\'),
  *(BOM, b'\xff', b'\xff\xfe', b'\xc3', b'\xa9', b'\xe2\x80', b'\xed\xa0\x80'),
  *(c.encode() for c in 'é\x0b\x0c\x1c\x85\u00a0\u2028\u2029\u3000😀'),
  *(b'a', b'b c', b'1\ta\tb', b'x' * 90),
  *(b'{', b'}', b'[', b']', b':', b',', b'"en"', b'"fr"', b'null', b'1e999'),
  *(b'{"en": "a", "fr": "', b'"}', b'\\ud83d', b'\\u0000', b'\\n', b'\\"'),
]

LINES = {
  'tsv': [b'1\ta\tb', b'2\tc "d\te', b'3\t \xc3\xa9\t\xe2\x80\xa8f', b'a\tb'],
  'jsonl': [
    b'{"en": "a", "fr": "b"}',
    b'{"fr": "\\u00e9\\ud83d\\ude00", "x": {}, "en": "c"}',
    b'{"en": "a\\nb", "fr": "b"}',
    b'{"en": "", "fr": "b"}',
    b'{"en": "a", "fr": " "}',
    b'{"en": "a", "fr": 3}',
    b'{"en": "a", "fr": "b\\ud83d"}',
  ],
  'txt': [b'a', b'b\tc', b'"', b'\xc3\xa9', b''],
}


REASONS = {
  'tsv': [f'{x} than {n} columns' for x in ('fewer', 'more') for n in (2, 3)],
  'jsonl': [
    'not JSON',
    "no text under 'en'",
    "no text under 'fr'",
    'a line break in a text',
    'half a surrogate pair',
  ],
  'txt': [],
}


def _file(rng, kind):
  """Lines that are mostly good, or mostly not, or no lines at all."""
  parts = [rng.choice([b'', b'', b'', BOM, b'\xff\xfe', b'\n'])]
  share = rng.choice([0.0, 0.1, 0.5, 1.0])
  good = LINES[kind][: rng.randint(1, len(LINES[kind]))]
  for _ in range(rng.randrange(9)):
    if rng.random() < share:
      parts += rng.choices(CHUNKS, k=rng.randrange(9))
    else:
      parts.append(rng.choice(good))
    parts.append(rng.choice([b'\n', b'\n', b'\n', b'\r\n', b'']))
  return b''.join(parts)


def _slow(contents, kind, longest):
  """What is to be found, from whole files: pairs, reason -> [line numbers].

  None for files that are no parallel text at all.
  """
  if any(c[:2] in (b'\xff\xfe', b'\xfe\xff') for c in contents):
    return None
  contents = [c[3:] if c[:3] == BOM else c for c in contents]
  files = [re.findall(rb'[^\n]*\n|[^\n]+', c) for c in contents]
  if len({*map(len, files)}) > 1:
    return None
  rows = [line for line in files[0] if line.decode(errors='replace').strip()]
  width = rows[0][:longest].count(b'\t') + 1 if rows else 0
  if kind == 'tsv' and width not in (2, 3):
    return None
  pairs, bad = [], {}
  for number, raws in enumerate(zip(*files, strict=True), 1):
    found = _slow_line(number, raws, kind, longest, width)
    if isinstance(found, str):
      bad.setdefault(found, []).append(number)
    else:
      pairs.append(found)
  return (pairs, bad) if pairs else None


def _slow_line(number, raws, kind, longest, width):
  if any(len(raw) > longest for raw in raws):
    return f'longer than {longest:,} bytes'
  texts = [
    re.sub(rb'\r?\n?\Z', b'', raw).decode('utf-8', 'surrogateescape')
    for raw in raws
  ]
  for text in texts:  # A byte that is no UTF-8 has become half a surrogate.
    if '\0' in text:
      return 'a NUL character'
    if re.search('[\udc80-\udcff]', text):
      return 'not UTF-8'
  if ''.join(texts).strip() == '':
    return 'an empty line'
  name = str(number)
  if kind == 'tsv':
    count = texts[0].count('\t') + 1
    if count != width:
      return f'{"more" if count > width else "fewer"} than {width} columns'
    *rest, source, target = texts[0].split('\t')
    name = rest[0] if rest else name
  elif kind == 'jsonl':
    try:
      value = json.JSONDecoder().decode(texts[0])
    except ValueError:
      return 'not JSON'
    texts = []
    for key in ('en', 'fr'):
      text = value.get(key) if type(value) is dict else None
      if type(text) is not str:
        texts.append(f"no text under '{key}'")
      elif '\0' in text:
        texts.append('a NUL character')
      elif '\n' in text:
        texts.append('a line break in a text')
      elif re.search('[\ud800-\udfff]', text):
        texts.append('half a surrogate pair')
      else:
        texts.append((text,))
    for text in texts:
      if isinstance(text, str):
        return text
    (source,), (target,) = texts
  else:
    source, target = texts
  if not source.strip():
    return 'an empty source'
  if not target.strip():
    return 'an empty target'
  return (name, source, target)


@pytest.mark.parametrize(
  ('kind', 'number'), [('tsv', 4000), ('jsonl', 3000), ('txt', 3000)]
)
def test_any_bytes(tmp_path, monkeypatch, kind, number):
  """No crash, no line uncounted, and the very pairs of a plain parser."""
  longest = 120
  monkeypatch.setattr(lines, 'LONGEST', longest)
  rng = random.Random(7)
  done = {'refused': 0, 'read': 0}
  reasons = set()
  for _ in range(number):
    contents = [_file(rng, kind) for _ in range(2 if kind == 'txt' else 1)]
    if kind == 'txt' and rng.random() < 0.9:  # As many lines in each.
      ends = [c.count(b'\n') + (c[-1:] not in (b'\n', b'')) for c in contents]
      less = ends.index(min(ends))
      if contents[less][-1:] not in (b'\n', b''):
        contents[less] += b'\n'
      contents[less] += b'z\n' * (max(ends) - min(ends))
    expected = _slow(contents, kind, longest)
    try:
      text = open_text(tmp_path, *contents, suffix=f'.{kind}')
    except errors.UserError as e:
      assert expected is None, (contents, str(e))
      assert str(e).endswith('.') and len(str(e).splitlines()) == 1
      done['refused'] += 1
      continue
    assert expected is not None, contents
    pairs, bad = expected
    assert text.read() == pairs, contents
    counts = {reason: (len(at), at[0]) for reason, at in bad.items()}
    assert text.unusable == counts, contents
    assert len(pairs) + sum(map(len, bad.values())) == text.num_lines, contents
    which = rng.choices(range(len(pairs)), k=3)
    assert text.read(which) == [pairs[i] for i in which], contents
    done['read'] += 1
    reasons.update(bad)
  # The files are of every kind, or nothing would be shown.
  assert min(done.values()) > number // 10, done
  assert reasons == {
    'an empty line',
    'an empty source',
    'an empty target',
    'not UTF-8',
    'a NUL character',
    f'longer than {longest:,} bytes',
    *REASONS[kind],
  }
