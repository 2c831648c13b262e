"""Texts that tokenizers stumble over."""

from hypothesis import strategies as st

TEXTS = (
  '',
  ' ',
  '  ',
  ' a  b   c    d     e      f ',
  '\u2581',
  'a\u2581b \u2581 c\u2581\u2581d',
  '\t\t\ttabs\tand \t spaces',
  '\n',
  '\n\n\n\n\n\n\n\n\n\n\n',
  'a\n b\n\n  c\r\nd\re\x0bf\x0cg\x85h\u2028i\u2029j',
  '\x00',
  'a\x00b\x01\x02\x1b[31m\x7f\x80\x9f',
  '😀😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇬🇧 ❤️ 1️⃣',
  'e\u0301 é a\u0300\u0327\u0301 Z̷̢͎͛a̷l̴g̵o̷',
  'ﬁ Ⅷ ² ½ ％ ＡＢ ｶﾞ',
  '\u200b\u200c\u200d\u2060\ufeff\u202e\u00ad',
  '\u00a0?\u202f!\u2009;\u3000',
  '« Où ça\u202f? » — l’été, cœur, ÇA',
  '中文 日本語 한국어 ไทย עברית العربية हिन्दी',
  '<pad><eos><bos><unk><mask>',
  '<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n',
  ' <start_of_turn> < start_of_turn > <START_OF_TURN> <start_of_turn',
  '<unused0><unused1><unused99>[multimodal][@BOS@]',
  '<b>bold</b> <i>x</i> <table><tr><td>1</td></tr></table>',
  '<0x00><0x41><0xFF> <0x0A>',
  '</s><s>[INST]<|endoftext|><|im_start|>',
  '\U0010ffff\ue000\ufffd\ufffe\uffff',
  '1234567890 3.14 1,000,000 ٣٤ ௧',
  'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 9,
  '     ' * 99,
  ' \n' * 50 + '\t' * 50,
  'http://www.reddit.com/r/x_y?z=%C3%A9&w=~q#!',
  'This is\\n not a newline, “nor’ a "quote\'.',
)

# Pieces of every kind, glued together at random.
_PIECES = st.sampled_from(
  [
    *' \t\n\r\x00\u2581e\u0301\u200d1',
    '  ',
    '\u2581\u2581',
    '\n\n',
    '👩',
    '👍🏽',
    'My',
    ' name',
    'règles',
    '2016',
    '<start_of_turn>',
    '<unused0>',
    '<bos>',
    '<unk>',
    '<b>',
    '<0x41>',
    '<mask>',
  ]
)
ANY = st.one_of(st.text(), st.lists(_PIECES).map(''.join))
