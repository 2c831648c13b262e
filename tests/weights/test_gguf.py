"""GGUF files: the same model back, and its header as it was written."""

import dataclasses
import pathlib

import gguf
import jax
import numpy as np
import pytest

from mt.gemma import sizes
from mt.weights import gguf as weights_gguf
from mt.weights import gguf_file
from mt.weights import load as load_lib
from tests.fixtures import gguf_fixture
from tests.fixtures.hf_fixture import assert_same
from tests.fixtures.hf_fixture import load
from tests.fixtures.refusal import refusal
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
  monkeypatch.setattr(load_lib, '_AT_ONCE', 90 * 256)
  # Every row is a whole number of the longest blocks, 256.
  cfg = dataclasses.replace(
    gguf_fixture.tiny_config('gemma3', 400),
    embed_dim=256,
    hidden_dim=512,
    head_dim=64,
  )
  path = tmp_path / 'a.gguf'
  _, params = write(path, quant=quant, cfg=cfg)

  def through_the_library(path, x):
    if 'norm' in path[-1].key:  # Float32 in every file.
      return x
    # Blocks run along the last axis of [out, in]; ours is [in, out].
    turn = (lambda m: m) if path[-1].key == 'embedding' else np.transpose
    stack = x if x.ndim == 3 else x[None]
    rows = (gguf.quantize(np.ascontiguousarray(turn(m)), quant) for m in stack)
    out = [turn(gguf.dequantize(x, quant)) for x in rows]
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
  write(tmp_path / 'a.gguf', arch, cfg=cfg)
  file = gguf_file.open_gguf(tmp_path / 'a.gguf')
  assert weights_gguf.read_config(file) == cfg


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
