"""GGUF files that cannot be read: one clear refusal each."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from mt.weights import gguf_file
from tests.fixtures import gguf_fixture
from tests.fixtures.hf_fixture import assert_same
from tests.fixtures.hf_fixture import load
from tests.fixtures.refusal import refusal
from tests.fixtures.tiny_gguf import small
from tests.fixtures.tiny_gguf import write

_Q = gguf.GGMLQuantizationType
# A tiny file and all that is made of it take 4 MB; a length out of a damaged
# header takes gigabytes.
_MEMORY = 64 * 2**20


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', (repr(b''), 'weights.source')),
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
  'a key again': (
    _header(0, 2, *[_text(b'k') + struct.pack('<II', 4, n) for n in (1, 2)]),
    ('k is there twice',),
  ),
  'a tensor again': (
    _header(2, 0, *[_tensor(b't', (1,), 0, 0)] * 2, bytes(99)),
    ("'t' is there twice",),
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
