"""BLEU and chrF, of all, by noise, of two systems."""

import unicodedata

import pytest
import sacrebleu

from mt.evaluate import noise
from mt.evaluate import scores

# Typographic quotes and spaces before ! and ?, on which tokenisers differ.
HYPOTHESES = [
  'Il a dit « bonjour » , non ?',
  "C'est pas grave ! On y va demain…",
  'le chat est sur la table avec le chien',
]
REFERENCES = [
  'Il a dit « bonjour », non ?',
  "C'est pas grave! On ira demain…",
  'le chat dort sur la table avec un chien',
]


def test_scores_are_those_of_sacrebleu():
  """Golden: the functions of sacreBLEU, called as its README does."""
  got = scores.score(HYPOTHESES, REFERENCES, 'fr')
  refs = [REFERENCES]
  bleu = sacrebleu.corpus_bleu(HYPOTHESES, refs).score
  intl = sacrebleu.corpus_bleu(HYPOTHESES, refs, tokenize='intl').score
  chrf = sacrebleu.corpus_chrf(HYPOTHESES, refs).score
  assert got['bleu'] == round(bleu, 2)
  assert got['bleu_intl'] == round(intl, 2)
  assert got['chrf'] == round(chrf, 2) == scores.chrf(HYPOTHESES, REFERENCES)
  plus = sacrebleu.corpus_chrf(HYPOTHESES, refs, word_order=2).score
  assert got['chrf++'] == round(plus, 2) != got['chrf']
  assert got['sentences'] == 3
  # Swapped or scored the other way round, each would be another number.
  assert len({got['bleu'], got['bleu_intl'], got['chrf']}) == 3
  swapped = scores.score(REFERENCES, HYPOTHESES, 'fr')
  assert all(swapped[k] != got[k] for k in ('bleu', 'bleu_intl', 'chrf'))


def test_scores_have_not_moved():
  """Golden: printed by the command `sacrebleu` 2.6.0, to two places.

  Other numbers mean another metric: those of older runs no longer compare.
  """
  got = scores.score(HYPOTHESES, REFERENCES, 'fr')
  assert (got['bleu'], got['bleu_intl'], got['chrf']) == (65.76, 67.77, 78.70)


def test_signatures_say_how_it_was_scored():
  got = scores.score(HYPOTHESES, REFERENCES, 'fr')
  version = f'version:{sacrebleu.__version__}'
  assert got['bleu_signature'] == (
    f'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}'
  )
  assert got['bleu_intl_signature'] == (
    f'nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp|{version}'
  )
  for name, words in (('chrf', 0), ('chrf++', 2)):
    assert got[f'{name}_signature'] == (
      f'nrefs:1|case:mixed|eff:yes|nc:6|nw:{words}|space:no|{version}'
    )


def test_perfect_and_worthless():
  got = scores.score(REFERENCES, REFERENCES, 'fr')
  assert got['bleu'] == got['bleu_intl'] == got['chrf'] == 100
  got = scores.score([''] * 3, REFERENCES, 'fr')
  assert got['bleu'] == got['bleu_intl'] == got['chrf'] == 0


def test_a_hypothesis_for_each_reference():
  with pytest.raises(AssertionError):
    scores.score(HYPOTHESES[:2], REFERENCES, 'fr')


# By noise.

SOURCES = [
  'he said lol 😂 and that was all',
  'This is an ordinary sentence.',
  'lol that cat is on the table with a dog',
]


def test_scores_by_noise():
  got = scores.by_noise(SOURCES, HYPOTHESES, REFERENCES, 'en')
  assert {k: v['sentences'] for k, v in got.items()} == {
    'emoji': 1,
    'capitals': 0,
    'slang': 2,
    'typos': 0,
    'markup': 0,
    'very short': 0,
    'very long': 0,
    scores.NO_CLASS: 1,
  }
  both = [HYPOTHESES[0], HYPOTHESES[2]], [[REFERENCES[0], REFERENCES[2]]]
  assert got['slang']['chrf'] == round(sacrebleu.corpus_chrf(*both).score, 2)
  one = sacrebleu.corpus_chrf([HYPOTHESES[1]], [[REFERENCES[1]]]).score
  assert got[scores.NO_CLASS]['chrf'] == round(one, 2)
  assert got['capitals']['chrf'] is None


def test_classes_without_a_rule_are_left_out():
  got = scores.by_noise(['lol 😂 ok so'], ['a'], ['b'], 'de')
  assert got.keys() == {*noise.CLASSES, scores.NO_CLASS} - {'slang', 'typos'}
  assert got['emoji'] == {'sentences': 1, 'chrf': 0.0}


def test_by_noise_wants_a_translation_of_each():
  with pytest.raises(AssertionError):
    scores.by_noise(SOURCES, HYPOTHESES[:2], REFERENCES, 'en')


# By target language.

JAPANESE = ['今日はとても寒いですね。', 'その映画はまだ見ていません。']


@pytest.mark.parametrize(
  'language, text, fallback',
  [
    ('ja', '今日はとても寒いですね。', 'char'),
    ('zh', '今天天气非常冷，我不想出门。', 'zh'),
    ('yue', '今日好凍，我唔想出街。', 'zh'),
    ('ko', '오늘은 정말 춥네요.', 'char'),
    ('th', 'วันนี้อากาศหนาวมาก', 'char'),
    ('khm', 'ថ្ងៃនេះត្រជាក់ណាស់', 'char'),
  ],
)
def test_writing_without_spaces_has_words(
  monkeypatch, language, text, fallback
):
  """13a takes a sentence for one word: 0 for a perfect translation."""
  got = scores.score([text], [text], language)
  assert got['bleu'] == got['chrf'] == got['chrf++'] == 100
  assert 'bleu_intl' not in got
  assert scores.score([text[:-3]], [text], language)['bleu'] > 30
  monkeypatch.setattr(scores.importlib.util, 'find_spec', lambda _: None)
  got = scores.score([text], [text], language)
  assert f'tok:{fallback}|' in got['bleu_signature']


def test_mecab_splits_japanese_where_it_is():
  pytest.importorskip('ipadic')
  got = scores.score(JAPANESE, JAPANESE[::-1], 'ja')
  expected = sacrebleu.corpus_bleu(
    JAPANESE, [JAPANESE[::-1]], tokenize='ja-mecab'
  )
  assert got['bleu'] == round(expected.score, 2)
  assert '|tok:ja-mecab-' in got['bleu_signature']


def test_a_model_of_flores_is_used_where_it_is(tmp_path, monkeypatch):
  """And nothing is fetched for it."""
  monkeypatch.setattr(scores.sacrebleu_utils, 'SACREBLEU_DIR', str(tmp_path))
  assert scores.tokenizer('th') == 'char' and not list(tmp_path.iterdir())
  (tmp_path / 'models').mkdir()
  (tmp_path / 'models' / 'flores200sacrebleuspm').write_bytes(b'')
  assert scores.tokenizer('TH') == 'flores200'
  assert scores.tokenizer('fr') == '13a'


_COMPOSED = [text.replace('chat', 'être à ça') for text in REFERENCES]
_BROKEN = ['une chose bien-\nconnue', 'a\nb', 'lol\n']


@pytest.mark.parametrize(
  'one, other',
  [
    # é as one character or two: without NFC a perfect text has 12.7 BLEU.
    ([unicodedata.normalize('NFD', text) for text in _COMPOSED], _COMPOSED),
    # A line break is a space.
    (_BROKEN, [text.replace('\n', ' ') for text in _BROKEN]),
  ],
)
def test_what_looks_the_same_is_the_same(one, other):
  assert one != other
  for a, b in ((one, other), (other, one)):
    got = scores.score(a, b, 'fr')
    assert [got[name] for name in scores.names(got)] == [100] * 4
    assert scores.chrf(a, b) == scores.sentence_chrf(a[2], b[2]) == 100
    assert scores.by_noise(SOURCES, a, b, 'en')['slang']['chrf'] == 100
    found = scores.compare(a, b, b, 'fr')
    assert all(row['baseline'] == row['score'] == 100 for row in found.values())


# Two systems.

WORSE = [
  'Il a dit bonjour',
  "C'est grave ! On y va",
  'le chien est sur une table',
]


def test_a_comparison_is_that_of_sacrebleu():
  """Golden: printed by sacreBLEU 2.6.0, `sacrebleu ref -i a b --paired-bs -w 4`

  with `-m bleu chrf`, and with `-m bleu --tokenize intl`.
  """
  a = [REFERENCES[0], *WORSE[1:]] * 10
  b = [WORSE[0], REFERENCES[1], HYPOTHESES[2]] * 10
  got = scores.compare(a, b, REFERENCES * 10, 'fr')
  expected = {
    'bleu': (48.6417, 16.3735, 49.6369, 12.0479, 0.3786),
    'bleu_intl': (46.5947, 15.0939, 57.0759, 13.1918, 0.1399),
    'chrf': (51.0551, 10.5395, 72.9120, 7.0712, 0.0010),
  }
  keys = 'baseline', 'baseline_interval', 'score', 'interval', 'p'
  for name, numbers in expected.items():
    for key, number in zip(keys, numbers, strict=True):
      places = 4 if key == 'p' else 2
      assert got[name][key] == round(number, places), (name, key)
  assert got['bleu_intl']['signature'] == (
    'nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:intl|smooth:exp'
    f'|version:{sacrebleu.__version__}'
  )


def test_the_same_translations_do_not_differ():
  got = scores.compare(HYPOTHESES, HYPOTHESES, REFERENCES, 'fr')
  assert {*got} == {*scores.NAMES} - {'comet'}
  for name in got:
    assert got[name]['p'] == 1.0
    assert got[name]['baseline'] == got[name]['score']
