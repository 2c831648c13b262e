"""Text to text."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

from jax.sharding import Mesh
import ml_collections

from mt.base import journal
from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import parameters
from mt.translate import batching
from mt.translate import decode
from mt.translate import loops
from mt.translate import mbr
from mt.translate import search as search_lib
from mt.weights import pretrained

Progress = Callable[[int], None]  # Is told how many texts are done.


@dataclasses.dataclass(frozen=True)
class Translation:
  """A text and how sure the model is of it."""

  text: str  # Of as many lines as its source, or fewer.
  # What ranks it: see Search.length_penalty; with samples Translator.expected.
  score: float
  log_probability: float  # Natural, of all tokens and the one that ends it.
  cut_off: bool = False  # It reached its limit before its end.


def limit_note(number: int, of: int) -> str:
  """What is said of translations that are cut off."""
  return (
    f'{number} of {of} translations reached their limit and are cut off '
    '(decode.max_ratio, decode.max_extra)'
  )


def end_ids(
  tok: tokenizer.Tokenizer, template: template_lib.Template
) -> tuple[int, ...]:
  """All ends of a text that the tokenizer has, and the template's own."""
  return tuple(sorted(tok.end_ids | {template_lib.end_id(tok, template)}))


def stop_ids(
  tok: tokenizer.Tokenizer, template: template_lib.Template
) -> tuple[int, ...]:
  """The same and, where a text is a line, every newline."""
  pieces = (tok.spm.id_to_piece(i) for i in range(tok.vocab_size))
  newlines = [
    i for i, p in enumerate(pieces) if p == '<0x0A>' or not p.strip('\n')
  ]
  return (*end_ids(tok, template), *newlines)


def never_ids(tok: tokenizer.Tokenizer) -> tuple[int, ...]:
  """What a published Gemma 4 12B writes into texts unless told not to.

  Its generation_config.json has them as suppress_tokens.
  """
  ids = (tok.controls.get(piece) for piece in ('<image|>', '<audio|>'))
  return tuple(i for i in ids if i is not None)


@dataclasses.dataclass(frozen=True)
class Translator:
  """A function from texts to texts, of any parameters of a model.

  A translation has at most as many lines as its source. So a newline ends that
  of a single line, after which a model that is not trained yet goes on with an
  example of its own; of a text with line breaks, what goes on is cut off.
  """

  settings: batching.Settings  # With the stop_ids of tokenizer and template.
  tok: tokenizer.Tokenizer
  template: template_lib.Template  # The one that the model was trained with.
  max_ratio: float  # A translation ends at max_ratio * source tokens +
  max_extra: int  # max_extra tokens.
  # Draws candidates that are ranked with those of the search, see mbr.py.
  sampling: search_lib.Search | None = None
  # Has what goes round (see loops.py) made again without n-grams so long that
  # occur twice; 0 for not.
  retry_ngram: int = 0
  say: Callable[[str], None] = journal.say
  expected: mbr.Expected = mbr.expected_chrf  # What ranks candidates.

  def __call__(
    self, params: parameters.Params, texts: Sequence[str]
  ) -> list[str]:
    """The best translation of each text, in order; see `n_best`."""
    return self.translate(params, texts)[0]

  def translate(
    self,
    params: parameters.Params,
    texts: Sequence[str],
    on_progress: Progress = lambda done: None,
  ) -> tuple[list[str], list[int]]:
    """The same, and which of them are cut off, from 0."""
    found = [best for best, *_ in self.n_best(params, texts, on_progress)]
    cut_off = [i for i, best in enumerate(found) if best.cut_off]
    if cut_off:
      self.say(limit_note(len(cut_off), len(found)))
    return [best.text for best in found], cut_off

  def n_best(
    self,
    params: parameters.Params,
    texts: Sequence[str],
    on_progress: Progress = lambda done: None,
    first: int = 0,
  ) -> list[list[Translation]]:
    """The search's n best translations of each text, best first.

    That of an empty text is an empty text with probability 1.

    Args:
      params: of the model, as a run has them or as decode.unstack returns them.
      texts: of one line or several.
      on_progress: see Progress.
      first: the number of the first text, on which its samples depend.
    """
    if any(isinstance(x, dict) for x in params.values()):
      params = decode.unstack(params, self.settings.dtype)
    full = [i for i, text in enumerate(texts) if text.strip()]
    several = [i for i in full if _num_lines(texts[i]) > 1]
    single = sorted({*full} - {*several})
    ends = end_ids(self.tok, self.template)
    whole = dataclasses.replace(self.settings, stop_ids=ends)
    out = [[Translation('', 0.0, 0.0)] for _ in texts]
    done = len(texts) - len(full)
    for settings, chosen in ((self.settings, single), (whole, several)):
      found = self._ranked(
        settings,
        params,
        [(texts[i], self._prompt(texts[i], first + i)) for i in chosen],
        lambda more, before=done: on_progress(before + more),
      )
      done += len(chosen)
      for i, best in zip(chosen, found, strict=True):
        out[i] = best
    return out

  def _ranked(self, settings, params, work, on_progress):
    """The n best translations of (text, prompt) each, of all candidates."""
    if not work:
      return []
    search, n_best = settings.search, settings.search.n_best
    searches, found = [search], [[] for _ in work]
    if self.sampling:  # All of the beam are candidates.
      search = dataclasses.replace(search, n_best=search.width)
      searches = [search, self.sampling]
    for i, chosen in enumerate(searches):

      def progress(done, i=i):
        on_progress((i * len(work) + done) // len(searches))

      made = self._decode(settings, chosen, params, work, progress)
      for best, more in zip(found, made, strict=True):
        best += more
    ranked = self._by_risk(work, found) if self.sampling else found
    self._retry(settings, search, params, work, found, ranked)
    return [best[:n_best] for best in ranked]

  def _by_risk(self, work, found):
    """Different translations of each text, ranked by minimum Bayes risk."""
    candidates = [[c.text for c in best] for best in found]
    expected = self.expected([text for text, _ in work], candidates)
    return [
      [
        dataclasses.replace(best[i], score=float(scores[i]))
        for i in mbr.rank(texts, scores)
      ]
      for best, texts, scores in zip(found, candidates, expected, strict=True)
    ]

  def _decode(self, settings, search, params, work, on_progress):
    """The search's n best translations of (text, prompt) each."""
    settings = dataclasses.replace(settings, search=search)
    prompts = [prompt for _, prompt in work]
    found = batching.decode_all(settings, params, prompts, on_progress)
    return [
      [self._translation(h, text) for h in best]
      for (text, _), best in zip(work, found, strict=True)
    ]

  def _retry(self, settings, search, params, work, found, ranked):
    """Makes those again whose best translation goes round, and says it."""

    def goes_round(i, translation):
      return loops.goes_round(work[i][0], translation.text)

    if not self.retry_ngram:
      return
    again = [i for i, best in enumerate(ranked) if goes_round(i, best[0])]
    if not again:
      return
    ngram = min(search.no_repeat_ngram or self.retry_ngram, self.retry_ngram)
    search = dataclasses.replace(search, no_repeat_ngram=ngram)
    chosen = [work[i] for i in again]
    made = self._decode(settings, search, params, chosen, lambda done: None)
    if self.sampling:  # Ranked as the others are, with what goes straight on.
      pools = [
        [c for c in best + found[i] if not goes_round(i, c)] or best
        for i, best in zip(again, made, strict=True)
      ]
      made = self._by_risk(chosen, pools)
    left = 0
    for i, best in zip(again, made, strict=True):
      left += goes_round(i, best[0])
      ranked[i] = best
    self.say(
      f'{len(again)} of {len(ranked)} translations went round and round; made '
      f'again with no_repeat_ngram={ngram}, {left} still do'
    )

  def _prompt(self, text, number):
    limit = int(self.max_ratio * len(self.tok.encode(text)))
    tokens = template_lib.prompt_ids(text, self.tok, self.template)
    return batching.Prompt(tokens, limit + self.max_extra, number)

  def _translation(self, hypothesis, source):
    text = self.tok.decode(hypothesis.tokens)
    text = text.removeprefix(self.template.target_prefix).lstrip()
    lines, most = text.split('\n'), _num_lines(source)
    text = '\n'.join(' '.join(line.splitlines()) for line in lines[:most])
    return Translation(
      text.strip(),
      hypothesis.score,
      hypothesis.logp,
      # What has all its lines and goes on with more is whole.
      cut_off=hypothesis.end is None and len(lines) <= most,
    )


def _num_lines(text):
  return text.strip().count('\n') + 1


def search_of(d: ml_collections.ConfigDict) -> search_lib.Search:
  """The search of `config.decode`."""
  return search_lib.Search(
    d.beam,
    d.length_penalty,
    no_repeat_ngram=d.no_repeat_ngram,
    repetition_penalty=d.repetition_penalty,
  )


def samples(
  d: ml_collections.ConfigDict, search: search_lib.Search, n: int
) -> search_lib.Search:
  """What draws n candidates beside a search, as averse to repetitions."""
  return search_lib.Search(
    temperature=d.mbr_temperature,
    n_best=n,
    no_repeat_ngram=search.no_repeat_ngram,
    repetition_penalty=search.repetition_penalty,
  )


def from_config(
  config: ml_collections.ConfigDict,
  source: pretrained.Source,
  mesh: Mesh | None = None,
) -> Translator:
  """The translator of a run, whose model started from `source`.

  `mesh` is where the parameters are, if not on one device.
  """
  d, template = config.decode, template_lib.from_config(config)
  search = search_of(d)
  settings = batching.Settings(
    source.config,
    search,
    stop_ids(source.tokenizer, template),
    d.batch_size,
    config.train.dtype,
    mesh,
    source.tokenizer.vocab_size,
    never_ids(source.tokenizer),
  )
  return Translator(
    settings,
    source.tokenizer,
    template,
    d.max_ratio,
    d.max_extra,
    sampling=samples(d, search, d.mbr) if d.mbr else None,
    retry_ngram=d.retry_ngram,
  )
