"""Text to text."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

from jax.sharding import Mesh
import ml_collections

from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import parameters
from mt.translate import batching
from mt.translate import decode
from mt.translate import search as search_lib
from mt.weights import pretrained

Progress = Callable[[int], None]  # Is told how many texts are done.


@dataclasses.dataclass(frozen=True)
class Translation:
  """A text and how sure the model is of it."""

  text: str  # One line.
  score: float  # What the search ranks by, see Search.length_penalty.
  log_probability: float  # Natural, of all tokens and the one that ends it.


def stop_ids(
  tok: tokenizer.Tokenizer, template: template_lib.Template
) -> tuple[int, ...]:
  """EOS, the template's own end and, as a text is a line, every newline."""
  pieces = (tok.spm.id_to_piece(i) for i in range(tok.vocab_size))
  newlines = [
    i for i, p in enumerate(pieces) if p == '<0x0A>' or not p.strip('\n')
  ]
  ends = {tok.eos_id, template_lib.end_id(tok, template)}
  return (*sorted(ends), *newlines)


@dataclasses.dataclass(frozen=True)
class Translator:
  """A function from texts to texts, of any parameters of a model."""

  settings: batching.Settings  # With the stop_ids of tokenizer and template.
  tok: tokenizer.Tokenizer
  template: template_lib.Template  # The one that the model was trained with.
  max_ratio: float  # A translation ends at max_ratio * source tokens +
  max_extra: int  # max_extra tokens.

  def __call__(
    self,
    params: parameters.Params,
    texts: Sequence[str],
    on_progress: Progress = lambda done: None,
  ) -> list[str]:
    """The best translation of each text, in order; see `n_best`."""
    return [best.text for best, *_ in self.n_best(params, texts, on_progress)]

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
      texts: one line each.
      on_progress: see Progress.
      first: the number of the first text, on which its samples depend.
    """
    if any(isinstance(x, dict) for x in params.values()):
      params = decode.unstack(params, self.settings.dtype)
    full = [i for i, text in enumerate(texts) if text.strip()]
    found = batching.decode_all(
      self.settings,
      params,
      [self._prompt(texts[i], first + i) for i in full],
      lambda done: on_progress(len(texts) - len(full) + done),
    )
    out = [[Translation('', 0.0, 0.0)] for _ in texts]
    for i, best in zip(full, found, strict=True):
      out[i] = [
        Translation(self._text(h.tokens), h.score, h.logp) for h in best
      ]
    return out

  def _prompt(self, text, number):
    limit = int(self.max_ratio * len(self.tok.encode(text)))
    tokens = template_lib.prompt_ids(text, self.tok, self.template)
    return batching.Prompt(tokens, limit + self.max_extra, number)

  def _text(self, tokens):
    text = self.tok.decode(tokens)
    text = text.removeprefix(self.template.target_prefix)
    return ' '.join(text.splitlines()).strip()


def from_config(
  config: ml_collections.ConfigDict,
  source: pretrained.Source,
  mesh: Mesh | None = None,
  search: search_lib.Search | None = None,
) -> Translator:
  """The translator of a run, whose model started from `source`.

  `mesh` is where the parameters are, if not on one device; the search is that
  of `config.decode` where none is given.
  """
  d, template = config.decode, template_lib.from_config(config)
  settings = batching.Settings(
    source.config,
    search or search_lib.Search(d.beam, d.length_penalty),
    stop_ids(source.tokenizer, template),
    d.batch_size,
    config.train.dtype,
    mesh,
  )
  return Translator(
    settings, source.tokenizer, template, d.max_ratio, d.max_extra
  )
