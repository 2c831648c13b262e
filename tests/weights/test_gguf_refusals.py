"""GGUF files that are damaged, cut or of something else: one clear refusal."""

import collections
import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from mt.base import errors
from mt.weights import gguf_file
from tests.fixtures.refusal import refusal
from tests.fixtures.tiny_gguf import load
from tests.fixtures.tiny_gguf import small
from tests.fixtures.tiny_gguf import write

# A tiny file and all that is made of it take 4 MB; a length out of a damaged
# header takes gigabytes.
_MEMORY = 64 * 2**20


def test_a_missing_file_is_refused(tmp_path):
  path = tmp_path / 'none.gguf'
  refusal(lambda: load(path), path, 'No such file', 'weights.source')


def test_a_directory_is_refused(tmp_path):
  def call():
    return gguf_file.open_gguf(tmp_path)

  refusal(call, tmp_path, 'directory', 'weights.source')


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', ('empty', 'weights.source')),
    (b'PK\x03\x04' + bytes(99), (repr(b'PK\x03\x04'), 'GGUF')),
    (b'GGU', (repr(b'GGU'), 'GGUF')),
    (b'GGUF' + struct.pack('<I', 1) + bytes(99), ('version 1 ', '2 or 3')),
    (b'GGUF' + struct.pack('<I', 4) + bytes(99), ('version 4 ', '2 or 3')),
    # Big-endian files exist for the machines of IBM.
    (b'GGUF' + struct.pack('>I', 3) + bytes(99), ('version', '2 or 3')),
  ],
  ids=('empty', 'zip', 'short', 'version 1', 'version 4', 'big-endian'),
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
  for size in range(len(data)):
    # A file of its own: one that is mapped must not shrink.
    cut = tmp_path / f'{size}.gguf'
    cut.write_bytes(data[:size])
    if size >= end:
      gguf_file.open_gguf(cut)
    elif size >= 4:
      # Before a tensor is read, so that it takes no minutes to find out.
      refusal(lambda p=cut: gguf_file.open_gguf(p), cut, f'{size:,} bytes')
    else:
      refusal(lambda p=cut: gguf_file.open_gguf(p), cut)
    cut.unlink()


def test_another_architecture_is_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  write(path, fields={'general.architecture': 'llama'})
  refusal(lambda: load(path), path, "'llama'", 'gemma3', 'Gemma only')


def test_no_architecture_is_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  write(path, fields={'general.architecture': None})
  refusal(lambda: load(path), path, 'architecture None')


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
    ('general.architecture', 3),
    ('general.architecture', [1, 2]),
    ('general.architecture', ['gemma3', 'gemma3']),
    ('general.alignment', 0),
    ('general.alignment', 'wide'),
    ('general.alignment', [32, 32]),
    ('gemma3.block_count', '2'),
    ('gemma3.block_count', [2, 2]),
    ('gemma3.block_count', -1),
    ('gemma3.block_count', 2**31 - 1),
    ('gemma3.block_count', float('nan')),
    ('gemma3.block_count', float('inf')),
    ('gemma3.embedding_length', 0),
    ('gemma3.embedding_length', 2**31 - 1),
    ('gemma3.feed_forward_length', 2**31 - 1),
    ('gemma3.attention.key_length', 0),
    ('gemma3.attention.key_length', 0.5),
    ('gemma3.attention.key_length', -16),
    ('gemma3.attention.head_count', [4, 4]),
    ('gemma3.attention.sliding_window', float('nan')),
    ('gemma3.rope.freq_base', 'far'),
    ('tokenizer.ggml.model', [1, 2]),
    ('tokenizer.ggml.model', 'gpt2'),
    ('tokenizer.ggml.tokens', None),
    ('tokenizer.ggml.tokens', 7),
    ('tokenizer.ggml.tokens', [7] * 400),
    ('tokenizer.ggml.tokens', ['a', 'b']),
    ('tokenizer.ggml.tokens', [b'\xff'] * 400),
    ('tokenizer.ggml.scores', None),
    ('tokenizer.ggml.scores', 0.5),
    ('tokenizer.ggml.scores', ['a'] * 400),
    ('tokenizer.ggml.token_type', None),
    ('tokenizer.ggml.token_type', [1.5] * 400),
    ('tokenizer.ggml.token_type', [77] * 400),
    ('tokenizer.ggml.token_type', [-1] * 400),
    ('tokenizer.ggml.bos_token_id', 400),
    ('tokenizer.ggml.bos_token_id', -2),
    ('tokenizer.ggml.bos_token_id', 'two'),
    ('tokenizer.ggml.bos_token_id', [2, 2]),
    ('tokenizer.ggml.bos_token_id', 2.5),
    ('tokenizer.ggml.unknown_token_id', 2**32 - 1),
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


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    ('embedding', 'token_embd.weight'),
    ('final_norm', 'output_norm.weight'),
    ('attn_norm', 'blk.0.attn_norm.weight'),
    ('o', 'blk.0.attn_output.weight'),
    ('k_norm', 'blk.0.attn_k_norm.weight'),
  ],
)
def test_a_missing_tensor_is_refused(tmp_path, ours, theirs):
  path = tmp_path / 'a.gguf'

  def drop(params):
    layers = {k: v for k, v in params['layers'].items() if k != ours}
    rest = {k: v for k, v in params.items() if k != ours}
    return rest | {'layers': layers}

  write(path, change=drop)
  refusal(lambda: load(path), path, theirs, 'complete')


@pytest.mark.parametrize(
  'name', ('blk.0.attn_q.bias', 'blk.1.attn_q.scale', 'blk.2.attn_q.weight')
)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path, name, monkeypatch):
  path = tmp_path / 'a.gguf'
  real = gguf.GGUFWriter.write_header_to_file

  def one_more(writer):
    writer.add_tensor(name, np.zeros(32, np.float32))
    real(writer)

  monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', one_more)
  write(path)
  refusal(lambda: load(path), path, name, 'not known')


def test_fewer_layers_than_promised_are_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  write(path, fields={'gemma3.block_count': 3})
  refusal(lambda: load(path), path, 'blk.2.attn_norm.weight', 'complete')


@pytest.mark.parametrize(
  ('ours', 'theirs', 'change'),
  [
    ('q', 'blk.0.attn_q.weight', lambda x: x.swapaxes(1, 2)),
    ('down', 'blk.0.ffn_down.weight', lambda x: x[:, :64]),
    # NumPy would stretch this one over the 32 without a word.
    ('attn_norm', 'blk.0.attn_norm.weight', lambda x: x[:, :1]),
    ('gate', 'blk.0.ffn_gate.weight', lambda x: x[:, :, 0]),
    ('final_norm', 'output_norm.weight', lambda x: x[:16]),
    ('embedding', 'token_embd.weight', lambda x: x[:, :16]),
  ],
  ids=('turned', 'short', 'one', 'flat', 'norm', 'embedding'),
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, ours, theirs, change):
  path = tmp_path / 'a.gguf'

  def reshape(params):
    layers = params['layers']
    if ours in layers:
      return params | {'layers': layers | {ours: change(layers[ours])}}
    return params | {ours: change(params[ours])}

  _, params = write(path, change=reshape)
  inner = ours in params['layers']
  promised = params['layers'][ours][0] if inner else params[ours]
  refusal(lambda: load(path), path, theirs, promised.shape)


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
  'tensors': (_header(2**63, 0), ('absurd',)),
  'fields': (_header(0, 2**40), ('absurd',)),
  'more fields than bytes': (_header(0, 2**20), ('header',)),
  'key': (_header(0, 1, struct.pack('<Q', 2**63)), ('header',)),
  'key is not text': (_header(0, 1, _text(b'\xff')), ('UTF-8',)),
  'text': (
    _header(0, 1, _text(b'k'), struct.pack('<IQ', 8, 2**62)),
    ('header',),
  ),
  'value type': (
    _header(0, 1, _text(b'k'), struct.pack('<I', 13)),
    ('type 13',),
  ),
  'array type': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 13, 1)),
    ('type 13',),
  ),
  'array in an array': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQIQ', 9, 9, 1, 4, 0)),
    ('type 9',),
  ),
  'array': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 4, 2**40)),
    ('absurd',),
  ),
  'array over the end': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 12, 2**24)),
    ('134,217,728 bytes',),
  ),
  'texts over the end': (
    _header(0, 1, _text(b'k'), struct.pack('<IIQ', 9, 8, 2**24)),
    ('header',),
  ),
  'no axis': (_header(1, 0, _tensor(b't', (), 0, 0)), ("'t'", '0 axes')),
  'five axes': (
    _header(1, 0, _tensor(b't', (1,) * 5, 0, 0)),
    ("'t'", '5 axes'),
  ),
  'axes': (
    _header(1, 0, _tensor(b't', (1,), 0, 0, rank=2**32 - 1)),
    ("'t'", 'axes'),
  ),
  'axis': (_header(1, 0, _tensor(b't', (2**40,), 0, 0)), ('absurd',)),
  'size': (
    _header(1, 0, _tensor(b't', (2**24,) * 4, 0, 0)),
    ("'t'", 'ends at byte'),
  ),
  'offset': (
    _header(1, 0, _tensor(b't', (1,), 0, 2**64 - 1)),
    ("'t'", 'ends at byte'),
  ),
  'quantisation': (
    _header(1, 0, _tensor(b't', (32,), 200, 0), bytes(999)),
    ("'t'", 'type 200'),
  ),
  'half a block': (
    _header(
      1,
      0,
      _tensor(b't', (48,), int(gguf.GGMLQuantizationType.Q8_0), 0),
      bytes(999),
    ),
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


# A damaged header.


def _damage(data, end, rng):
  """A copy with one to three things wrong before byte `end`."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 3))):
    at = rng.randrange(4, end)
    what = rng.randrange(6)
    if what == 0:
      data[at] = rng.randrange(256)
    elif what == 1:
      data[at] ^= 1 << rng.randrange(8)
    elif what == 2:
      del data[at : at + rng.choice((1, 4, 8))]
    elif what == 3:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    else:
      form = rng.choice('IQ')
      top = 2 ** (32 if form == 'I' else 64)
      value = rng.choice((0, 1, 2**16, 2**24, top // 2, top - 2, top - 1))
      size = struct.calcsize('<' + form)
      data[at : at + size] = struct.pack('<' + form, value)
  return bytes(data)


def test_a_damaged_header_loads_or_is_refused(tmp_path):
  (tmp_path / 'whole.gguf').write_bytes(small())
  tensors = gguf.GGUFReader(tmp_path / 'whole.gguf').tensors
  end = min(t.data_offset for t in tensors)
  counts, wrong = collections.Counter(), []
  for seed in range(600):
    path = tmp_path / f'{seed}.gguf'
    path.write_bytes(_damage(small(), end, random.Random(seed)))
    tracemalloc.start()
    try:
      load(path)
      counts['loaded'] += 1
    except errors.UserError as e:
      counts['refused'] += 1
      if str(path) not in str(e) or '\n' in str(e):
        wrong.append((seed, str(e)))
    except Exception as e:  # noqa: BLE001  To list all of them.
      wrong.append((seed, repr(e)))
    if tracemalloc.get_traced_memory()[1] > _MEMORY:
      wrong.append((seed, 'memory'))
    tracemalloc.stop()
    path.unlink()
  assert not wrong, f'{len(wrong)} of 600 seeds: {wrong}'
  assert min(counts['loaded'], counts['refused']) > 20  # It tests something.
