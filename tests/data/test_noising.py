"""Noise on purpose, and whether the classes of noise find it."""

import collections

import pytest

from mt.data import noising
from mt.evaluate import noise

PLAIN = {
  'en': "I think that you don't know the people because it's a new place.",
  'fr': "Je suis désolé, c'était très tôt et je n'ai pas été là quand même.",
}


def _classes(texts, language):
  return collections.Counter(
    name for text in texts for name in noise.classes(text, language)
  )


@pytest.mark.parametrize('language', ['en', 'fr'])
def test_the_kinds_are_those_that_are_counted(language):
  clean = [PLAIN[language]] * 200
  noisy = [
    noising.noised(text, 0.5, (0, 0, i), language)
    for i, text in enumerate(clean)
  ]
  before, after = (_classes(texts, language) for texts in (clean, noisy))
  for name in ('emoji', 'capitals', 'slang', 'typos'):
    assert before[name] == 0 and after[name] > 10, name
  for _, word in noising._SLANG[language]:
    assert 'slang' in noise.classes(f'xx {word} zz', language), word
  for sign in noising._EMOJI:
    assert 'emoji' in noise.classes(f'xx {sign}', language), sign


@pytest.mark.parametrize('share', [0.0, 0.2, 1.0])
def test_as_many_words_are_changed_as_asked_for(share):
  word, n = 'because', 1000
  text = noising.noised(' '.join([word] * n), share, (1,), 'xx')
  words = text.split()[:n]
  changed = sum(w != word for w in words)
  assert abs(changed / n - share) < 0.05 and (share > 0) == (changed > 0)


def test_the_same_draws_give_the_same_noise():
  text = 'It was the best of times,\nit was the worst of times.'
  made = [noising.noised(text, 0.5, (0, n, 3), 'en') for n in range(20)]
  assert made[4] == noising.noised(text, 0.5, (0, 4, 3), 'en')
  assert len(set(made)) > 15
  assert all('\n' in x and x.count('\n') == 1 for x in made)


def test_what_is_no_prose_stays():
  text = 'https://Example.com/Because r/AskReddit @Because #Because 12'
  for n in range(50):
    made = noising.noised(text, 1.0, (n,), 'en')
    assert made.startswith(text)
  made = {noising.noised(f'{text} Été', 0.5, (n,), 'xx') for n in range(50)}
  assert {f'{text} ÉTÉ', f'{text} été'} <= made


def test_any_script_and_any_word_keep_something():
  for text in ('I', 'é', '日本語のテキスト', 'ça', 'नमस्ते', '…', '안녕'):
    for n in range(50):
      assert noising.noised(text, 1.0, (n,), 'ja').strip()
