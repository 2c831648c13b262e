"""Tiny checkpoints in the layouts that Google publishes, and a stand-in Kaggle.

Layers are laid out by gemma_oracle.layer, which the parity tests hold
against gemma.modules, and saved by gemma.params.
"""

import base64
import dataclasses
import hashlib
import http.server
import io
import json
import pathlib
import tarfile
import threading

from gemma import params as gemma_params
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mt import model
from mt import sizes
from mt import weights
from tests import gemma_oracle
from tests import gguf_fixture

FAMILIES = {
  'gemma1_multi_query': dataclasses.replace(
    gguf_fixture.tiny_config('gemma', 400), num_kv_heads=1
  ),
  'gemma1_multi_head': dataclasses.replace(
    gguf_fixture.tiny_config('gemma', 400), num_kv_heads=4
  ),
  'gemma2': gguf_fixture.tiny_config('gemma2', 400),
  'gemma3': gguf_fixture.tiny_config('gemma3', 400),
}


def nested_tree(
  cfg: sizes.ModelConfig,
  params: model.Params,
  *,
  transposed: bool = False,
  vision: bool = False,
) -> model.Params:
  """The tree that gemma's Transformer takes as its parameters."""
  tree = {
    'embedder': {'input_embedding': params['embedding']},
    'final_norm': {'scale': params['final_norm']},
  }
  for n in range(cfg.num_layers):
    layer = gemma_oracle.layer(cfg, params['layers'], n)
    if transposed:
      gating = jnp.swapaxes(layer['mlp']['gating_einsum'], 1, 2)
      layer['mlp']['gating_einsum'] = gating
    tree[f'layer_{n}'] = layer
  if vision:
    tree['embedder'] |= {
      'mm_input_projection': {'w': jnp.ones((8, cfg.embed_dim))},
      'mm_soft_embedding_norm': {'scale': jnp.ones(8)},
    }
    tree['vision_encoder'] = {'siglip_encoder': {'pos_embedding': jnp.ones(8)}}
  return jax.tree.map(jnp.asarray, tree)


def save(
  path: pathlib.Path,
  cfg: sizes.ModelConfig,
  params: model.Params,
  *,
  layout: str = 'flat',
  ocdbt: bool = True,
  zarr3: bool = False,
  dtype: str = 'float32',
  **kwargs,
) -> pathlib.Path:
  """Writes a checkpoint as Orbax does; kwargs as in nested_tree.

  Args:
    layout: 'flat', 'nested', or 'kauldron' (a training state).
    ocdbt: one database, or plain folders as before 2024.
    zarr3: arrays of zarr's version 3.
    dtype: of the arrays.
  """
  tree = nested_tree(cfg, params, **kwargs)
  tree = jax.tree.map(lambda x: x.astype(dtype), tree)
  if layout == 'flat':
    vision = tree.pop('vision_encoder', None)
    tree = gemma_params.flatten_and_remap_params({'transformer': tree})
    if vision:
      tree['SigLiPFromPatches_0/siglip_encoder'] = vision['siglip_encoder']
  elif layout == 'kauldron':
    moments = jax.tree.map(jnp.zeros_like, tree)
    tree = {'params': tree, 'opt_state': {'mu': moments}, 'step': jnp.ones(1)}
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
  return path


def open_weights(path, tokenizer_path=''):
  return weights.open_source(
    str(path), 'debug', tokenizer_path, seed=0, texts=()
  )


def assert_same(found, want):
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for path, x in jax.tree_util.tree_leaves_with_path(found):
    assert x.dtype == jnp.float32
    y = want
    for key in path:
      y = y[key.key]
    np.testing.assert_array_equal(x, y, err_msg=str(path))


def tiny_params(cfg: sizes.ModelConfig) -> model.Params:
  """Random parameters that bfloat16 holds exactly."""
  return jax.tree.map(
    lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32),
    gguf_fixture.tiny_params(cfg),
  )


class Kaggle(http.server.ThreadingHTTPServer):
  """Answers kagglehub's client as Kaggle does, out of a folder.

  It is reached as a proxy for http://localhost, which is where the client looks
  when KAGGLE_API_ENVIRONMENT is LOCALHOST; see `environment`.

  Attributes:
    files: path in the model -> content.
    handle: of the one model that there is, without version.
    version: its newest version.
    status: answered to every request instead of what it asks for, unless 0.
    cut: a file of this size is cut in its middle, once.
    damage: the last bit of each file is wrong.
    text: answered to every request as JSON, unless None.
    requests: name of each request, with the path it asks for.
    ranges: the Range of each request for a file.
  """

  def __init__(self, folder, handle='google/gemma/flax/2b-it', version=2):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.files = {
      str(p.relative_to(folder)): p.read_bytes()
      for p in sorted(folder.rglob('*'))
      if p.is_file()
    }
    self.handle, self.version = handle, version
    self.status, self.cut, self.damage, self.text = 0, 0, False, None
    self.requests, self.ranges = [], []
    threading.Thread(target=self.serve_forever, args=[0.01]).start()

  def environment(self, cache: pathlib.Path) -> dict[str, str]:
    """What the environment variables must be for a client of this server."""
    return {
      'KAGGLE_API_ENVIRONMENT': 'LOCALHOST',
      'HTTP_PROXY': f'http://127.0.0.1:{self.server_address[1]}',
      'http_proxy': f'http://127.0.0.1:{self.server_address[1]}',
      'NO_PROXY': '',
      'no_proxy': '',
      'KAGGLE_USERNAME': 'morgane',
      'KAGGLE_KEY': 'secret',
      'KAGGLEHUB_CACHE': str(cache),
    }

  def archive(self) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
      for name, content in self.files.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return out.getvalue()

  def close(self):
    self.shutdown()
    self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    name = self.path.rsplit('/', 1)[1]
    assert self.path == f'http://localhost/api/v1/models.ModelApiService/{name}'
    server.requests.append((name, body.get('path')))
    user = base64.b64encode(b'morgane:secret').decode()
    if server.text is not None:
      self._send(200, 'application/json', server.text)
    elif server.status:
      self._send(server.status)
    elif self.headers['Authorization'] is None:
      self._send(403)  # Gemma is for those alone who accepted its licence.
    elif self.headers['Authorization'] != f'Basic {user}':
      self._send(401)
    elif server.handle != '/'.join(
      body[k] if k != 'framework' else body[k].rsplit('_', 1)[1].lower()
      for k in ('ownerSlug', 'modelSlug', 'framework', 'instanceSlug')
    ):
      self._send(404)
    elif name == 'GetModelInstance':
      self._json({'versionNumber': server.version})
    elif name == 'ListModelInstanceVersionFiles':
      names, size = list(server.files), body['pageSize']
      self._json(
        {
          'files': [{'name': n} for n in names[:size]],
          'nextPageToken': 'more' if len(names) > size else '',
        }
      )
    else:  # The real one sends the client on to a storage server.
      self.send_response(302)
      self.send_header('Location', f'http://localhost/{body.get("path") or ""}')
      self.send_header('Content-Length', '0')
      self.end_headers()

  def do_GET(self):
    server = self.server
    name = self.path.removeprefix('http://localhost/')
    body = server.files[name] if name else server.archive()
    digest = base64.b64encode(hashlib.md5(body).digest()).decode()
    first = 0
    server.ranges.append(self.headers['Range'])
    if self.headers['Range']:
      first = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
    self.send_response(206 if first else 200)
    self.send_header('Content-Type', 'application/octet-stream')
    self.send_header('Content-Length', str(len(body) - first))
    self.send_header('Accept-Ranges', 'bytes')
    self.send_header('x-goog-hash', f'crc32c=AAAAAA==,md5={digest}')
    self.end_headers()
    body = body[first:]
    if server.damage:
      body = body[:-1] + bytes([body[-1] ^ 1])
    if server.cut == len(body):
      server.cut = 0
      body = body[: len(body) // 2]
    self.wfile.write(body)

  def _json(self, value):
    self._send(200, 'application/json', json.dumps(value))

  def _send(self, status, kind='text/plain', text=''):
    self.send_response(status)
    self.send_header('Content-Type', kind)
    self.send_header('Content-Length', str(len(text.encode())))
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *args):
    pass
