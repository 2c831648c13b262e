"""A run's folder without a run, and pages as tests read them."""

import html.parser
import json

from mt.base import files
from mt.evaluate import scores
from mt.evaluate import sentences

SOURCES = [
  '<script>alert(1)</script> lol',
  'A "quoted" & plain <b>sentence</b>.',
  'the third one 😂',
]
REFERENCES = ['<img src=x onerror=alert(1)> mdr', 'Une phrase simple.', 'Trois']
BEFORE = ['the script', 'A sentence', "</p></td><script src='//x.y'>"]
AFTER = ['mdr', 'Une phrase très simple.', 'Quatre']


class Page(html.parser.HTMLParser):
  """Tags with their attributes, texts by the tag around them."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.texts, self.bad = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'br'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.bad.append(tag)

  def handle_data(self, data):
    self.texts.append((self.open[-1] if self.open else '', data))

  def text(self, *tags):
    return ' '.join(t for tag, t in self.texts if not tags or tag in tags)


def add_metrics(folder, line):
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps(line) + '\n')


def finish(folder):
  columns = SOURCES, REFERENCES, BEFORE, AFTER
  for name, lines in zip(sentences.COLUMNS, columns, strict=True):
    path = folder / 'translations' / f'valid.{name}.txt'
    files.write_lines(path, lines)
  found = {
    when: scores.score(texts, REFERENCES, 'fr')
    | {'noise': scores.by_noise(SOURCES, texts, REFERENCES, 'en')}
    for when, texts in (('before', BEFORE), ('after', AFTER))
  }
  found['after'] |= {'loops': [0], 'cut_off': [0, 1]}
  files.write_json(folder / 'scores.json', {'valid': found})
  return found
