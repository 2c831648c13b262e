"""COMET's side of mt/evaluate/comet.py; the environment of its own runs it.

  python comet_program.py MODEL

It reads lines of JSON and answers each with one. The first one that it writes
says what it is: {"version": …, "kind": …}. Requests and their answers:

  {"samples": [{"src": …, "mt": …, "ref": …}, …]}      {"scores": [n]}
  {"sources": [n], "candidates": [n] of [m]}           {"scores": [n] of [m]}

The latter are expected scores, see mt/translate/mbr.py: the mean over all of a
source's candidates as the reference. Texts are encoded once. As in
comet-mbr, the model is a regression metric with references.
"""

import importlib.metadata
import itertools
import json
import os
import sys

import comet
import torch

_BATCH = 32  # Texts that are encoded at a time.


def scores(model, samples):
  """COMET's own command computes in float16; this is float32."""
  gpus = min(1, torch.cuda.device_count())
  return model.predict(samples, gpus=gpus, progress_bar=False).scores


def embeddings(model, texts):
  """Text -> [hidden] of all different ones, those of a length together."""
  different, found = sorted(dict.fromkeys(texts), key=len), {}
  for at in range(0, len(different), _BATCH):
    some = different[at : at + _BATCH]
    inputs = model.encoder.prepare_sample(some)
    made = model.get_sentence_embedding(
      *(inputs[x].to(model.device) for x in ('input_ids', 'attention_mask'))
    )
    found.update(zip(some, made, strict=True))
  return found


def matrices(model, sources, candidates):
  """Scores of each candidate against each reference: [m, m] per source."""
  encoded = embeddings(model, itertools.chain(sources, *candidates))
  for source, texts in zip(sources, candidates, strict=True):
    made, m = torch.stack([encoded[t] for t in texts]), len(texts)
    rows = made.repeat_interleave(m, 0), made.repeat(m, 1)
    of_source = encoded[source].expand(m * m, -1)
    yield model.estimate(of_source, *rows)['score'].view(m, m)


@torch.no_grad()
def expected(model, sources, candidates):
  """[n] of [m]; candidates that are the same are scored once, and count."""
  different = [[*dict.fromkeys(texts)] for texts in candidates]
  model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
  found = matrices(model, sources, different)
  out = []
  for texts, unique, matrix in zip(candidates, different, found, strict=True):
    counts = torch.tensor([float(texts.count(t)) for t in unique])
    of_text = matrix @ (counts / len(texts)).to(matrix.device)
    means = dict(zip(unique, of_text.tolist(), strict=True))
    out.append([means[t] for t in texts])
  return out


def main(name):
  out = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)  # What libraries print is no answer.
  path = name if name.endswith('.ckpt') else comet.download_model(name)
  model = comet.load_from_checkpoint(path)
  answer = {
    'version': importlib.metadata.version('unbabel-comet'),
    'kind': model.hparams.class_identifier,
  }
  while True:
    print(json.dumps(answer), file=out, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    asked = json.loads(line)
    if 'samples' in asked:
      answer = {'scores': scores(model, asked['samples'])}
    else:
      answer = {'scores': expected(model, **asked)}


if __name__ == '__main__':
  main(*sys.argv[1:])
