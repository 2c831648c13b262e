"""Tiny GGUF files for the tests, of what gguf_fixture writes."""

import dataclasses
import functools
import pathlib
import tempfile

import gguf
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt import weights
from tests import gguf_fixture

_F32 = gguf.GGMLQuantizationType.F32


def write(path, arch='gemma3', quant=_F32, fields=None, change=None):
  """A tiny file, written from (cfg, params), which are returned.

  Args:
    change: params -> params, before the file is written.
  """
  proto = gguf_fixture.train_proto()
  vocab_size = len(sp_pb2.ModelProto.FromString(proto).pieces)
  cfg = gguf_fixture.tiny_config(arch, vocab_size)
  params = gguf_fixture.tiny_params(cfg)
  written = change(params) if change else params
  gguf_fixture.write_gguf(path, cfg, written, proto, arch, quant, fields)
  return cfg, params


@functools.cache
def small():
  """The bytes of a file that has everything and is cheap to damage often."""
  m = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  del m.pieces[9:]  # 4 of pad, EOS, BOS, unknown, and 5 added tokens.
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config('gemma3', len(m.pieces)),
    num_layers=1,
    embed_dim=4,
    hidden_dim=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
  )
  params = gguf_fixture.tiny_params(cfg)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'small.gguf'
    gguf_fixture.write_gguf(path, cfg, params, m.SerializeToString())
    return path.read_bytes()


def load(path):
  """Everything that a run reads from the file."""
  source = weights.open_source(str(path), '', '', seed=0, texts=())
  return source.config, source.read()
