"""GGUF files of Gemma 4."""

import json

import gguf
import jax
import numpy as np

from mt.data import tokenizer
from mt.weights import hf_tokenizer_out
from tests.fixtures import gguf_fixture
from tests.fixtures import hf_fixture
from tests.fixtures import tiny_gemma4
from tests.fixtures.refusal import refusal

SHAPES = tiny_gemma4.WITH_TOKENIZER


def _write_gguf(path, name, **fields):
  """As conversion/gemma.py of llama.cpp writes it, in the library's names."""
  cfg, params = SHAPES[name], tiny_gemma4.params(SHAPES[name])
  k, arch = gguf.Keys, 'gemma4'
  own, kinds = cfg.num_layers - cfg.sharing_layers, 'LLG' * 3
  kinds = kinds[: cfg.num_layers]
  header = {
    'general.architecture': arch,
    k.LLM.BLOCK_COUNT: cfg.num_layers,
    k.LLM.EMBEDDING_LENGTH: cfg.embed_dim,
    k.LLM.FEED_FORWARD_LENGTH: cfg.hidden_dim,
    k.LLM.EMBD_LENGTH_PER_LAYER_INP: cfg.layer_input_dim,
    k.LLM.FINAL_LOGIT_SOFTCAPPING: cfg.final_softcap,
    k.Attention.HEAD_COUNT: cfg.num_heads,
    k.Attention.HEAD_COUNT_KV: cfg.num_kv_heads,
    k.Attention.KEY_LENGTH: cfg.global_head_dim,
    k.Attention.KEY_LENGTH_SWA: cfg.head_dim,
    k.Attention.SHARED_KV_LAYERS: cfg.sharing_layers,
    k.Attention.SLIDING_WINDOW: cfg.window,
    k.Attention.SLIDING_WINDOW_PATTERN: [x == 'L' for x in kinds],
    k.Rope.FREQ_BASE: cfg.rope_base_global,
    k.Rope.FREQ_BASE_SWA: cfg.rope_base_local,
  }
  if cfg.sharing_hidden_dim:
    header[k.LLM.FEED_FORWARD_LENGTH] = [
      cfg.hidden_dim if n < own else cfg.sharing_hidden_dim
      for n in range(cfg.num_layers)
    ]
  if cfg.global_kv_heads:
    heads = {'L': cfg.num_kv_heads, 'G': cfg.global_kv_heads}
    header[k.Attention.HEAD_COUNT_KV] = [heads[x] for x in kinds]
  proto = gguf_fixture.train_proto()
  vocabulary = gguf_fixture.vocabulary(proto)
  del vocabulary['tokenizer.ggml.pre']
  folder = path.parent / f'{path.name}-folder'
  folder.mkdir()
  hf_tokenizer_out.write(folder, tokenizer.from_proto(proto, 'x'))
  fast = json.loads((folder / 'tokenizer.json').read_text())
  vocabulary |= {
    'tokenizer.ggml.model': 'gemma4',
    'tokenizer.ggml.scores': [-1000.0] * 400,
    'tokenizer.ggml.merges': [' '.join(m) for m in fast['model']['merges']],
  }
  header = {x.format(arch=arch): v for x, v in header.items()} | vocabulary
  writer = gguf.GGUFWriter(str(path), arch)
  writer.kv_data[0].clear()
  for key, value in (header | fields).items():
    gguf_fixture.add_field(writer, key, value)
  t = gguf.MODEL_TENSOR
  turned = np.repeat(np.float32([1.0, 1e30]), (2, 6))
  tensors = {
    gguf.TENSOR_NAMES[t.TOKEN_EMBD]: params['embedding'],
    gguf.TENSOR_NAMES[t.OUTPUT_NORM]: params['final_norm'],
    gguf.TENSOR_NAMES[t.ROPE_FREQS]: turned,
  }
  if cfg.layer_input_dim:
    for ours, theirs in (
      ('layer_input_embedding', t.PER_LAYER_TOKEN_EMBD),
      ('layer_input_proj', t.PER_LAYER_MODEL_PROJ),
      ('layer_input_norm', t.PER_LAYER_PROJ_NORM),
    ):
      x = params[ours]
      tensors[gguf.TENSOR_NAMES[theirs]] = x.T if 'proj' in ours else x
  for stack in cfg.stacks():
    for ours, stacked in params[stack.name].items():
      theirs = gguf.TENSOR_NAMES[gguf_fixture.LAYER_TENSORS[ours]]
      for n, x in zip(stack.layers, stacked, strict=True):
        tensors[theirs.format(bid=n)] = x.T
  if cfg.sharing_layers:  # Written, but of no use.
    tensors[f'blk.{own}.attn_k'] = np.ones((8, 24), np.float32)
  for tensor, x in tensors.items():
    x = np.ascontiguousarray(x, np.float32)
    writer.add_tensor(f'{tensor}.weight', x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return cfg, params


@tiny_gemma4.each_shape
def test_a_gguf_file_is_read(tmp_path, name):
  cfg, params = _write_gguf(tmp_path / 'a.gguf', name)
  source = hf_fixture.open_folder(tmp_path / 'a.gguf')
  assert source.config == cfg
  jax.tree.map(np.testing.assert_array_equal, source.read(), params)
  tok = tokenizer.from_proto(gguf_fixture.train_proto(), 'x')
  # As Ollama writes it: ids in place of scores.
  ollama = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'gemma4',
    'tokenizer.ggml.scores': [float(i) for i in range(400)],
  }
  _write_gguf(tmp_path / 'b.gguf', name, **ollama)
  other = hf_fixture.open_folder(tmp_path / 'b.gguf')
  for text in ('Hi   there\n\na letter', ' lettre de', 'déjà 12', '\U0001f642'):
    assert source.tokenizer.encode(text) == tok.encode(text)
    assert other.tokenizer.encode(text) == tok.encode(text)


def test_gguf_files_of_other_gemmas_are_refused(tmp_path):
  for fields, words in (
    ({'gemma4.expert_count': 128}, ('mixture of experts', '31B')),
    ({'general.architecture': 'gemma3n'}, ('Gemma 3n', 'E2B')),
    ({'gemma4.attention.shared_kv_layers': 4}, ('whole periods',)),
    ({'gemma4.feed_forward_length': [40] * 8 + [80]}, ('feed_forward',)),
    # Of another kind than the key has.
    ({'gemma4.block_count': 9.5}, ('block_count is 9.5', 'whole number')),
    ({'gemma4.rope.freq_base': 'x'}, ('freq_base is x', 'a number')),
    ({'gemma4.embedding_length_per_layer_input': 'x'}, ('per_layer_input is',)),
    ({'gemma4.attention.shared_kv_layers': [3]}, ('kv_layers is [3]',)),
    (
      {'gemma4.feed_forward_length': [40.0] * 9},
      ('forward_length is 40.0', 'whole'),
    ),
  ):
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}.gguf'
    _write_gguf(path, 'e4b', **fields)
    refusal(lambda path=path: hf_fixture.load(path), path, *words)
