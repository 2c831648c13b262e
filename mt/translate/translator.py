"""Text to text."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mt.data import template as template_lib
from mt.data import tokenizer
from mt.gemma import model
from mt.gemma import sizes
from mt.translate import batching
from mt.translate import decode
from mt.translate import search as search_lib
from mt.weights import pretrained

# (params, texts, on_progress) -> translations; see make_translator.
Translator = Callable[..., list[str]]
# (params, texts, on_progress, first) -> n translations of each; see make_nbest.
NBest = Callable[..., list[list['Translation']]]


@dataclasses.dataclass(frozen=True)
class Translation:
  """A text and how sure the model is of it.

  Attributes:
    text: one line.
    score: what the search ranks by, see Search.length_penalty.
    log_probability: natural, of all its tokens and of the one that ends it.
  """

  text: str
  score: float
  log_probability: float


def stop_ids(
  tok: tokenizer.Tokenizer, template: template_lib.Template
) -> np.ndarray:
  """What ends a translation: [n] int32.

  EOS, the template's own end and, as one line is one text, every piece of
  newlines.
  """
  pieces = (tok.spm.id_to_piece(i) for i in range(tok.vocab_size))
  newlines = [
    i for i, p in enumerate(pieces) if p == '<0x0A>' or not p.strip('\n')
  ]
  ends = {tok.eos_id, template_lib.end_id(tok, template)}
  return np.array([*sorted(ends), *newlines], np.int32)


def make_nbest(
  cfg: sizes.ModelConfig,
  tok: tokenizer.Tokenizer,
  template: template_lib.Template,
  *,
  batch_size: int,
  max_ratio: float,
  max_extra: int,
  search: search_lib.Search | None = None,
  dtype: jnp.dtype = jnp.float32,
  mesh: Mesh | None = None,
) -> NBest:
  """A function (params, texts, on_progress=…, first=0) -> translations.

  The result has a list for each text, best first, in the order of `texts`; that
  of an empty text is an empty text with probability 1. `on_progress` is called
  with the number of texts that are done. `first` is the number of the first
  text, on which its samples depend.

  Args:
    cfg: the model's shape.
    tok: its tokenizer.
    template: the one that the model was trained with.
    batch_size: most texts at once, see pool.make_decoder.
    max_ratio: a translation ends at max_ratio * source tokens + max_extra.
    max_extra: see max_ratio.
    search: greedy where none is given.
    dtype: of the activations.
    mesh: where the parameters are, if not on one device.
  """
  chex.assert_scalar_positive(batch_size)
  chex.assert_scalar_positive(max_ratio)
  chex.assert_scalar_positive(max_extra)
  search = search or search_lib.Search()
  decoder = batching.make_decoder(
    cfg,
    search,
    stop_ids(tok, template),
    batch_size=batch_size,
    dtype=dtype,
    mesh=mesh,
  )
  unstack = jax.jit(decode.unstack)

  def translate(
    params: model.Params,
    texts: Sequence[str],
    on_progress: Callable[[int], None] = lambda done: None,
    first: int = 0,
  ) -> list[list[Translation]]:
    if not isinstance(params['layers'], tuple):
      params = unstack(params)
    out = [[Translation('', 0.0, 0.0)] for _ in texts]
    prompts = {
      i: batching.Prompt(
        template_lib.prompt_ids(text, tok, template),
        limit=int(max_ratio * len(tok.encode(text))) + max_extra,
        number=first + i,
      )
      for i, text in enumerate(texts)
      if text.strip()
    }
    empty = len(texts) - len(prompts)
    found = decoder(
      params, list(prompts.values()), lambda done: on_progress(empty + done)
    )
    for i, hypotheses in zip(prompts, found, strict=True):
      out[i] = [
        Translation(_clean(tok.decode(h.tokens), template), h.score, h.logp)
        for h in hypotheses
      ]
    return out

  return translate


def best_of(nbest: NBest) -> Translator:
  """The best text of each."""

  def translate(params, texts, on_progress=lambda done: None) -> list[str]:
    return [best.text for best, *_ in nbest(params, texts, on_progress)]

  return translate


def make_translator(*args, **kwargs) -> Translator:
  """make_nbest, and of its translations the best texts."""
  return best_of(make_nbest(*args, **kwargs))


def _clean(text: str, template: template_lib.Template) -> str:
  text = text.removeprefix(template.target_prefix)
  return ' '.join(text.splitlines()).strip()


def nbest_from_config(
  config: ml_collections.ConfigDict,
  source: pretrained.Source,
  search: search_lib.Search,
  mesh: Mesh | None = None,
) -> NBest:
  """make_nbest with the limits of `config.decode`."""
  return make_nbest(
    source.config,
    source.tokenizer,
    template_lib.from_config(config),
    batch_size=config.decode.batch_size,
    max_ratio=config.decode.max_ratio,
    max_extra=config.decode.max_extra,
    search=search,
    dtype=jnp.dtype(config.train.dtype),
    mesh=mesh,
  )


def from_config(
  config: ml_collections.ConfigDict,
  source: pretrained.Source,
  mesh: Mesh | None = None,
) -> Translator:
  """The translator of `config.decode`, its search included."""
  d = config.decode
  search = search_lib.Search(beam=d.beam, length_penalty=d.length_penalty)
  return best_of(nbest_from_config(config, source, search, mesh))
