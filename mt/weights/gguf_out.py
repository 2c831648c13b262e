"""Parameters -> a GGUF file of Gemma 1 to 3, see mt/weights/gguf.py.

Keys, types and tensors are those of llama.cpp's converter, conversion/gemma.py.
"""

import dataclasses
import math
import pathlib

import chex
import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import errors
from mt.data import tokenizer
from mt.gemma import parameters
from mt.gemma import sizes
from mt.weights import gguf as gguf_in
from mt.weights import gguf_file
from mt.weights import hf_config_out
from mt.weights import load

_F32 = gguf.GGMLQuantizationType.F32
# Of the matrices; norms are float32.
KINDS = {
  'float32': _F32,
  'bfloat16': gguf.GGMLQuantizationType.BF16,
  'q8_0': gguf.GGMLQuantizationType.Q8_0,
}
_SPECIAL_SCORE = -1000.0  # Of pieces that no merge makes.


def file_name(dtype: str) -> str:
  """Of a file that programs choose by the type of its weights."""
  return f'model-{KINDS[dtype].name}.gguf'


def write(
  path: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: parameters.Params,
  tok: tokenizer.Tokenizer,
  dtype: str = 'float32',
  chat_template: str = '',
) -> None:
  """Writes what llama.cpp and `gguf_file.open_gguf` read, tensor by tensor.

  Rows of the embedding without a piece are left out, as llama.cpp's converter
  does: no search may choose one.

  Args:
    path: of the new file.
    cfg: the model's shape.
    params: without low-rank factors, see lora.fold.
    tok: its tokenizer.
    dtype: a key of KINDS.
    chat_template: in Jinja; '' for none.

  Raises:
    errors.UserError: a Gemma 4, or a shape that a GGUF header cannot say.
    OSError: the disk is full or not writable.
  """
  chex.assert_shape(params['embedding'], cfg.dims()['VD'])
  cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size)
  writer = _header(path, cfg, dtype)
  _add_vocabulary(writer, tok, chat_template)
  flat, tensors = parameters.flatten(params), []
  for place in load.places(gguf_in.tensor_name, cfg):
    kind = KINDS[dtype]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if place.row.norm or place.shape[-1] % block:
      kind = _F32
    tensors.append((place, kind))
    shape = gguf.quant_shape_to_byte_shape(place.shape, kind)
    nbytes, raw = math.prod(shape), np.dtype(np.uint8)
    writer.add_tensor_info(place.name, shape, raw, nbytes, kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for place, kind in tensors:
    x = load.put(flat, place)[: place.shape[0]].astype(np.float32)
    x = x + np.float32(cfg.norm_offset) if place.row.norm else x
    x = np.ascontiguousarray(x)
    writer.write_tensor_data(gguf.quantize(x, kind))
  writer.close()


def check(cfg: sizes.ModelConfig) -> None:
  """Refuses what `write` would, before any weights are read.

  Raises:
    errors.UserError: a Gemma 4, or a shape that a GGUF header cannot say.
  """
  _header(pathlib.Path(), cfg, 'float32')


def _header(path, cfg, dtype):
  """A writer that has the model's keys, which are read back to be compared."""
  arch = hf_config_out.kind_of(cfg).removesuffix('_text')
  if arch == 'gemma4':
    raise errors.UserError(
      '--to=gguf: Gemma 4 is not written as GGUF; use --to=hf, and '
      "llama.cpp's convert_hf_to_gguf.py on that folder."
    )
  w = gguf.GGUFWriter(path, arch)
  fields = hf_config_out.fields_of(cfg)
  scaling = fields.get('rope_scaling') or {}
  for ours, name in gguf_in.NAMES.items():
    value = (fields | scaling).get(ours)
    if value is not None:
      add = w.add_float32 if isinstance(value, float) else w.add_uint32
      add(f'{arch}.{name}', value)
  if scaling:
    w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
  w.add_context_length(fields['max_position_embeddings'])
  w.add_value_length(cfg.head_dim)
  most = 'ALL' if dtype == 'float32' else 'MOSTLY'
  w.add_file_type(gguf.LlamaFileType[f'{most}_{KINDS[dtype].name}'])
  w.add_quantization_version(gguf.GGML_QUANT_VERSION)
  _check(path, cfg, w)
  return w


def _check(path, cfg, writer):
  """Refuses a shape of which its header would say another."""
  fields = {key: x.value for key, x in writer.kv_data[0].items()}
  shape = cfg.vocab_size, cfg.embed_dim
  tensors = {'token_embd.weight': gguf_file.Tensor(shape, _F32, 0, 0)}
  said = gguf_in.read_config(gguf_file.GGUFFile(path, fields, tensors))
  for name, value in dataclasses.asdict(said).items():
    if value != getattr(cfg, name):
      raise errors.UserError(
        f'--to=gguf: a GGUF header cannot say that {name} is '
        f'{getattr(cfg, name)!r}, llama.cpp would take {value!r}; use --to=hf.'
      )


def _add_vocabulary(w, tok, chat_template):
  """The tokenizer's keys.

  llama.cpp finds user-defined pieces in a text before it merges, as they are
  spelt there, and control pieces in none: so the latter are all that
  Tokenizer.controls has.
  """
  pieces, scores, types = [], [], []
  for p in sp_pb2.ModelProto.FromString(tok.proto).pieces:
    text, score, kind = p.piece, p.score, p.type
    if p.piece in tok.controls:
      kind = tokenizer.CONTROL
    elif kind == tokenizer.USER_DEFINED:
      text = text.replace('\u2581', ' ')
    if kind in (tokenizer.CONTROL, tokenizer.UNKNOWN, tokenizer.USER_DEFINED):
      score = _SPECIAL_SCORE
    pieces.append(text.encode())
    scores.append(score)
    types.append(kind)
  w.add_tokenizer_model('llama')
  w.add_tokenizer_pre('default')
  w.add_token_list(pieces)
  w.add_token_scores(scores)
  w.add_token_types(types)
  w.add_bos_token_id(tok.bos_id)
  w.add_eos_token_id(tok.eos_id)
  w.add_unk_token_id(tok.spm.unk_id())
  w.add_pad_token_id(tok.pad_id)
  for i in sorted(tok.end_ids - {tok.eos_id})[:1]:
    w.add_eot_token_id(i)
  w.add_add_bos_token(True)
  w.add_add_eos_token(False)
  w.add_add_space_prefix(False)
  if chat_template:
    w.add_chat_template(chat_template)
