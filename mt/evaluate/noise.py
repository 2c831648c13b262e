"""What is noisy about a sentence: classes found by rules, to score them apart.

The classes follow the kinds of noise that MTNT was collected for (Michel and
Neubig 2018, arXiv 1809.00388, section 2), as far as rules can see them. They
overlap. A rule finds what is plain and lets the rest go: a sentence without a
class is not thereby clean.

  emoji       an emoji or an emoticon, kaomoji included; any language
  capitals    shouted: half of the words, two words in a row, or one that nobody
              writes in capitals otherwise. Words for en and fr; no rule for ja
  slang       internet slang, abbreviations, stretched words; en, fr, ja
  typos       known misspellings, lost apostrophes, accents and spaces, a word
              twice; en and fr. Others need a dictionary, and are not found
  markup      Markdown, HTML entities, URLs, /r/…, /u/…; any language
  very short  at most 3 words (ja: 8 characters)
  very long   40 words or more (ja: 100 characters)
"""

from collections.abc import Callable
import itertools

import regex

CLASSES = (
  'emoji',
  'capitals',
  'slang',
  'typos',
  'markup',
  'very short',
  'very long',
)

# At most and at least so many words, or characters in languages without spaces.
_SHORT, _LONG = 3, 40
_SHORT_CHARACTERS, _LONG_CHARACTERS = 8, 100
_WITHOUT_SPACES = ('ja', 'zh', 'th')


def _words(text: str, flags: int = regex.I) -> regex.Pattern:
  """One of the words or phrases, which ` ` keeps apart and _ holds together."""
  phrases = [
    regex.escape(w).replace('_', r'\s+').replace("'", "['’]")
    for w in text.split()
  ]
  inside = '|'.join(sorted(phrases, key=len, reverse=True))
  return regex.compile(rf"(?<![\w'’\-])(?:{inside})(?!['’\-]?\w|\.\w)", flags)


_EMOJI = regex.compile(
  # © ® ™ and the arrows are text; 1 and # only with a keycap.
  r'(?![©®™‼⁉↔-↪♀♂])\p{Extended_Pictographic}|\p{Regional_Indicator}|\u20e3'
  r"|(?<![\w(:])(?:[:;=]['’]?[-o^]?[)(DPp\]\[3/|*]+|<3+|</3|[xX]D+)(?!\w)"
  r'|(?<![\w^])[(（]?(?:\^[_.o]?\^|[TtoO0>=-][_.][TtoO0<=-])[)）]?(?![\w^])'
  r'|¯\\+_\(ツ\)_/¯|ಠ_ಠ'
  r'|[(（][^()（）\n]{0,9}[´｀ωдДз∀▽≧≦￣＾^ﾟ；][^()（）\n]{0,9}[)）]'
)
_MARKUP = regex.compile(
  r'https?://|www\.\w|\b\w+\.(?:com|org|net|fr|jp)\b|\]\(|'
  r'(?<!\w)/?[ru]/\w{2,}|&(?:[a-z]{2,6}|\#\d+);|\\?~~|`|\^\(|\w\^[\w/]|'
  r'(?<!\w)\*\*[^*\n]+\*\*|(?<!\w)_\w[^_\n]*\w_(?!\w)|'
  r'(?<![\w*])\*{1,3}(?=[^\s*])[^*\n]*[^\s*]\*{1,3}(?![\w*])|'
  r'(?:^|\s{2,})\\?(?:>(?!\d)|[*+-]\s|\#{1,6}\s|\d+[.)]\s\w)|'
  r'(?<!\w)[\#@][^\W\d_]\w{2,}'
)
# What is in there is nobody's spelling.
_NOT_PROSE = regex.compile(r'https?://\S+|www\.\S+|(?<!\w)/?[ru]/\w+|`[^`]*`')
_STRETCHED = regex.compile(
  # III, www and RRR are not; a kana stands three times in some words.
  r'\b(?!(\p{L})\1*\b)\w*(\p{Latin})(?<![IiVvXxWw])\2{2,}|'
  r'(?:ha|ah|he|eh|lo){3,}|([\p{Hiragana}\p{Katakana}])\3{3,}|ー{2,}',
  regex.I,
)

_SLANG = {
  'en': (
    _words(
      'lol lolz lmao lmfao rofl omg omfg wtf wth idk idc idgaf tbh imo imho '
      'ngl smh btw asap fyi afaik iirc tldr tl;dr eli5 ftw ftfy irl icymi '
      'nsfw fml gtfo stfu tfw mfw mrw bff bf gf ofc jk nvm dms hmu ikr tysm '
      "thx thnx pls plz plox ppl b4 gr8 m8 l8r 2nite 2day tmrw cuz coz 'cause "
      'b/c w/ w/o gonna wanna gotta kinda sorta lemme gimme dunno outta lotta '
      "hafta shoulda coulda woulda whatcha gotcha betcha cmon c'mon y'all "
      "yall ain't aint 'em yea yeah yep yup nah naw nope bruh bro dude fam "
      'homie yeet noob n00b pwned meh ugh tho thru nite luv fkn fckin fuckin '
      'goin doin nothin somethin talkin gettin lookin tryin legit totes def '
      'obvs probs prolly defo srsly rly vid vids pic pics convo inspo cringe '
      'simp upvote upvotes upvoted downvote downvotes downvoted repost wassup '
      'sksksk bae lowkey highkey yolo fomo goddam goddamn haha hahaha hehe '
      'heh'
    ),
    # In capitals, or with one, they are something else.
    _words('u ur r rn af bc ty ya dat dis da wat sus cos', 0),
    regex.compile(r"(?<!\S)\\?\^?/s(?!\w)|\b\w{2,}in['’](?!\w)"),
  ),
  'fr': (
    _words(
      'mdr mdrr mdrrr ptdr lol xptdr osef tg ntm fdp jpp jsp jdcjdr tkt svp '
      'stp slt bjr bsr bcp pk pkoi pourkoi pcq psk pck parsk qd qq qqn qqch '
      'qqs koi kand tt tjrs tjs tjr mtn ajd dsl rdv dac oklm cad càd nrv wesh '
      'ouais ouep ouaip ouè nan nope yep bah beh bof hein ptain putain chuis '
      "j'suis chui chai shui ché j'sais_pas t'as t'es t'étais t'avais t'façon "
      "y'a ya y_a_pas c'te m'enfin kiffer kiffe kiffé meuf meufs mecs keuf "
      'keufs teuf chelou relou zarbi ouf cimer vénère reuf reum reup rebeu '
      'beurette frérot gars boloss bolosse thune thunes fric flic flics '
      'bagnole boulot bouquin bouffe bouffer flemme swag seum bordel dégueu '
      'dégueulasse pote potes nana nanas gosse gosses clope clopes taf taff '
      'saoule soûle galère galérer déso apéro ciné ordi appart perso actu '
      'rando dispo mytho intello accro aprèm chiant chiante gueuler marrant '
      'foutre fout foutu foutage connerie conneries merde haha hihi héhé mwé '
      'moué'
    ),
    _words('pq ben mec', 0),
    regex.compile(r'(?<!\S)\\?\^?/s(?!\w)'),
  ),
  'ja': (
    regex.compile(
      r'(?<=[^\x00-\x7f]|\s)[wｗ]+(?![a-zａ-ｚ])|(?<!\p{Han})(?:草|乙|笑)(?!\w)|'
      r'[(（]笑[)）]|ワロ(?:タ|ス)|わろた|マジ(?!ッ|シ|ョ)|まじ(?:で|か|やば)|ヤバ|'
      r'やば[いくすっ]|ググ[るれっり]|リア充|厨(?!\w)|キモ[いくっ]|ウザ|うざ[いくっ]|'
      r'おｋ|おk|(?<![a-z])(?:kwsk|wktk|ktkr|gkbr)|ディス[るっり]|コスパ|'
      r'ガチ(?![ョャ])|ぼっち|オワタ|オワコン|情弱|エモ[いくっ]|めっちゃ|すげ[ぇえー]|'
      r'うぜ[ぇえー]|じゃね[ぇえー？?]|ちげ[ぇえー]|っす(?=[。ねよ]|$)|あざ[ーっ]*す'
    ),
  ),
}
_TYPOS = {
  'en': (
    _words(
      'teh hte adn nad taht thsi alot allot aswell infact incase noone '
      'atleast eachother definately definatly definetly definitly seperate '
      'seperately recieve recieved beleive belive wierd thier freind freinds '
      'untill tommorow tommorrow tomorow becuase becasue beacuse becuse wich '
      'whcih goverment enviroment occured occuring occurence recomend '
      'reccomend neccessary necesary unneccessary basicly publically '
      'accidently truely arguement independant existance persistant grammer '
      'embarass embarassing embarassed harrass harrassment accomodate '
      'begining calender collegue concious buisness bussiness diffrent '
      'dissapoint dissapointed dissapointing dissapear finaly foriegn fourty '
      'gaurd guarentee happend immediatly intresting knowlege liason libary '
      'maintainance millenium mispell noticable ocasion paralel particulary '
      'posession prefered priviledge probaly probly pronounciation realy '
      'refered relevent religous remeber resturant rythm sence sentance '
      'similiar sincerly speach succesful successfull suprise suprised '
      'suprisingly temperture threshhold togehter tounge writting useing '
      'usefull wonderfull could_of should_of would_of must_of might_of '
      'couldnt shouldnt wouldnt dont doesnt didnt cant wont isnt arent wasnt '
      'werent hasnt havent hadnt im ive thats whats theres heres youre youve '
      'theyre theyve weve hes shes its_a its_not its_the its_just its_so '
      'your_welcome your_right your_wrong your_not your_a your_an your_the '
      'your_doing your_going your_looking your_saying your_just there_own '
      'more_then less_then better_then rather_then other_then bigger_then '
      'worse_then to_much to_many suppose_to use_to_be an_horrible an_good '
      'a_awesome a_amazing a_old a_interesting the_the a_a to_to of_of '
      'and_and is_is it_it you_you for_for as_as was_was if_if we_we '
      'they_they with_with are_are be_be my_my this_this at_at'
    ),
    regex.compile(
      r"(?<![\w.'’/:\-])i(?=['’](?:m|ve|ll|d)\b|\s+[a-z])(?!\s+e\b)"
    ),
    regex.compile(
      r"\b\p{L}+(?:n;t|;s|;m|;re|;ve|;ll)\b|\p{L}\s['’](?:s|t|re|m)\b"
    ),
  ),
  'fr': (
    _words(
      'ca etre quand_meme tres deja apres voila peut-etre francais francaise '
      'probleme problemes systeme premiere derniere annee annees pere mere '
      'frere tete fete arreter arrete_de a_cause c_est j_ai n_est jai cest '
      'quil quelle_est_ce nest jetais cetait lhomme daccord aujourdhui sa_va '
      'sa_fait sa_me sa_te sa_sert malgrés malgrer malgré_que parmis '
      'comme_même comme_meme biensur biensûr bien_sur enfaite enfaîte '
      'en_faite parcontre entrain_de tout_les toute_les language dilemne '
      "pécunier aréoport infractus si_j'aurais si_j'aurai ils_croivent "
      "il_a_était à_était c'était_il ces_pas c'est_moi_qui_a c_pas ont_est "
      "ont_a je_c j'ai_manger a_manger a_coté à_coté je_doit tu_est tu_a "
      'tu_peut tu_veut je_veut je_peut je_fait tu_fait on_as il_as '
      'le_le de_de et_et des_des que_que je_je pour_pour dans_dans les_les '
      'est_est avec_avec sur_sur une_une à_à'
    ),
  ),
}
_TYPOS_ANY = regex.compile(
  # "word,word" and "end.Next", of Latin letters.
  r'\b\p{Ll}{2,},\p{L}{2,}\b|\b\p{Ll}{3,}[.!?]\p{Lu}\p{Ll}+\b'
)
_SHOUTED = {
  'en': _words(
    'ABSOLUTELY AGAIN ALL ALWAYS AND ANY ANYONE ANYTHING ARE AWESOME BAD '
    "BEST BETTER BIG BOTH BUT CAN'T DEFINITELY DIFFERENT DID DIDN'T DO DOES "
    "DOESN'T DON'T EVEN EVER EVERY EVERYONE EVERYTHING EXACTLY FOR FREE "
    'FUCK FUCKING GET GO GOOD GREAT HAD HATE HAVE HEAR HER HIM HIS HOLY HOW '
    "HUGE IF ISN'T I'M JUST KNOW LAST LITERALLY LOOK LOVE LOVED MORE MOST "
    'MUCH MUST MY NEED NEVER NO NOBODY NOT NOTHING NOW OFF OH ONE ONLY '
    'OTHER OUR OUT PLEASE REALLY RIGHT SAME SEE SHE SHIT SHOULD SO SOME '
    'STILL STOP SUPER THAN THANK THANKS THAT THE THEIR THEM THERE THESE '
    'THEY THING THIS THOSE TOO TOTALLY TRUE UNTIL VERY WANT WAS WAY WERE '
    "WHAT WHEN WHERE WHY WILL WITHOUT WON'T WORST WOW WRONG YES YOU YOUR",
    0,
  ),
  'fr': _words(
    'AUCUN AUSSI AVANT AVEC BEAUCOUP BIEN BORDEL ÇA CELA CES CETTE CEUX '
    "COMMENT C'EST DANS DE DES DU ELLE ENCORE ENFIN ÊTRE FAIRE FAUT GRAND "
    "GROS ICI IL ILS JAMAIS JE J'AI JUSTE LES LEUR MAIS MAINTENANT MÊME "
    "MERCI MERDE MOI MOINS N'EST NON NOUS OUI PARTOUT PAS PERSONNE PLUS "
    'POUR POURQUOI PUTAIN QUAND QUE QUI QUOI RIEN SANS SEUL SEULEMENT SI '
    'SONT SUR SURTOUT TOUJOURS TOUS TOUT TOUTE TOUTES TRÈS TROP UN UNE VOUS '
    'VRAI VRAIMENT',
    0,
  ),
}
_ALPHABET = regex.compile(r"\p{L}[\p{L}'’]*\p{L}")


def has_rule(name: str, language: str) -> bool:
  """Whether a class of CLASSES can be found in a language at all."""
  return {
    'capitals': language not in _WITHOUT_SPACES,
    'slang': language in _SLANG,
    'typos': language in _TYPOS,
  }.get(name, True)


def classes(text: str, language: str) -> tuple[str, ...]:
  """The classes of a sentence, in the order of CLASSES.

  Args:
    text: one sentence, or what stands on one line.
    language: its code, such as en. Classes without a rule for it are never
      found, see has_rule.

  For example, `classes('idk why u dont LOVE it 😂', 'en')` is
  `('emoji', 'capitals', 'slang', 'typos')`.
  """
  prose = _NOT_PROSE.sub(' ', text)
  found: dict[str, Callable[[], object]] = {
    'emoji': lambda: _EMOJI.search(_NOT_PROSE.sub('', text)),
    'capitals': lambda: _shouts(prose, language),
    'slang': lambda: _any((*_SLANG[language], _STRETCHED), prose),
    'typos': lambda: _any((*_TYPOS[language], _TYPOS_ANY), prose),
    'markup': lambda: _MARKUP.search(text),
    'very short': lambda: _size(text, language, _SHORT_CHARACTERS, _SHORT) <= 0,
    'very long': lambda: _size(text, language, _LONG_CHARACTERS, _LONG) >= 0,
  }
  return tuple(
    name for name in CLASSES if has_rule(name, language) and found[name]()
  )


def _any(patterns, text):
  return any(p.search(text) for p in patterns)


def _size(text, language, characters, words) -> int:
  """How much longer than the limit of its language a text is."""
  if language in _WITHOUT_SPACES:
    return len(regex.sub(r'\s', '', text)) - characters
  return len(text.split()) - words


def _shouts(text, language) -> bool:
  words = _ALPHABET.findall(text)
  loud = [w == w.upper() != w.lower() for w in words]
  if sum(loud) >= 2 and 2 * sum(loud) >= len(words) and len(words) > 2:
    return True
  long = [l and len(w) >= 5 for l, w in zip(loud, words, strict=True)]
  if any(a and b for a, b in itertools.pairwise(long)):
    return True
  return language in _SHOUTED and bool(_SHOUTED[language].search(text))
