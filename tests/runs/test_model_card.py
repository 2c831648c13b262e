"""The model card of an export."""

import pytest

from mt.base import files
from mt.base import run_folder
from mt.evaluate import card
from mt.evaluate import scores
from mt.train import checkpoint


def _card(run, folder, to='hf', **knobs):
  """That of an export, of a run with scores, and other knobs."""
  folder.mkdir(parents=True)
  for name in 'tokenizer.model', 'config.json':
    (folder / name).write_bytes((run / name).read_bytes())
  both = {
    'before': scores.score(['Salut !'], ['Bonjour !'], 'fr') | {'step': 0},
    'after': scores.score(['Bonjour'], ['Bonjour !'], 'fr') | {'step': 70},
  }
  old = {
    when: {k: v for k, v in found.items() if k != 'step'}
    for when, found in both.items()
  }
  files.write_json(folder / 'scores.json', {'valid': both, 'test': old})
  files.write_json(folder / 'data.json', {'pairs': 12_345})
  config = run_folder.read_config(run)
  config.update_from_flattened_dict(knobs)
  _, source = checkpoint.open_source(run)
  model = card.Model(
    to,
    'me/mine',
    config.weights.source,
    'step 70',
    source.config,
    source.tokenizer,
    'q8_0',
    config,
    folder,
  )
  return card.text(model), both


def test_the_model_card_says_what_a_stranger_needs(tmp_path, run):
  text, both = _card(
    run,
    tmp_path / 'a',
    **{
      'weights.source': 'hf:google/gemma-2-2b@main',
      'data.source': f'{tmp_path}/web.tsv,mtnt',
      'data.pair': 'en-pt_BR',
      'decode.mbr': 4,
      'decode.retry_ngram': 5,
    },
  )
  _, front, body = text.split('---\n')
  assert front.splitlines() == [
    'license: "gemma"',
    'base_model: "google/gemma-2-2b"',
    'language: ["en", "pt"]',
    'pipeline_tag: "translation"',
    'library_name: "transformers"',
  ]
  assert 'huggingface.co/google/gemma-2-2b' in body
  assert 'ai.google.dev/gemma/terms' in body
  assert '`web.tsv, mtnt`, en-pt_BR, 12,345 pairs' in body
  assert '```\n<bos>English: {source}\nPortuguese:\n```' in body
  assert '`<eos>`, `<end_of_turn>`' in body
  assert 'mbr=4, retry_ngram=5' in body
  for key, name in scores.NAMES.items():
    if key in both['after']:
      shown = f'- {name}: {both["after"][key]:.2f}, {both["before"][key]:.2f}'
      assert shown in body
      assert both['after'][f'{key}_signature'] in body
  assert 'valid, 1 sentences, step 70:' in body
  assert 'test, 1 sentences:' in body  # As a run of old has it.
  assert str(tmp_path) not in text


@pytest.mark.parametrize(
  ('to', 'words'),
  [
    ('hf', ("'text-generation', 'me/mine'", "[-1]['content']")),
    ('gguf', ("from_pretrained('me/mine', 'model-Q8_0.gguf'", 'chat')),
    ('gemma', ('gemma.params', "'me/mine/checkpoint'")),
    ('peft', ("GenerationConfig.from_pretrained('me/mine')", 'peft must')),
  ],
)
def test_each_format_is_loaded_in_three_lines(tmp_path, run, to, words):
  knobs = {'template.chat': True, 'template.target_prefix': ''}
  knobs['weights.source'] = f'{tmp_path}/gemma.gguf'
  text, _ = _card(run, tmp_path / 'a', to, **knobs)
  code = text.split('```')[-2].removeprefix('python\n')
  compile(code, 'README.md', 'exec')
  assert len(code.splitlines()) == 3
  for word in words:
    assert word in code
  assert 'base_model' not in text
  assert str(tmp_path) not in text
