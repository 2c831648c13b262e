"""The table of parameters: one row says all there is to know of a weight.

Everything under `layers/` is stacked on a leading axis N, so that one
`lax.scan` goes through the layers; Gemma 4 has a stack for each shape of its
layers, see ModelConfig.groups. Norm weights are stored as the published
checkpoints do: the factor is 1 + w, in Gemma 4 w. A matrix `m` may have
low-rank partners `m_lora_a` [N, in, R] and `m_lora_b` [N, R, out], see
mt/gemma/lora.py.

A new matrix is a row here and the line in mt/gemma/model.py that uses it. Its
shape, initial values, place on a mesh, LoRA factors, and its way in and out of
GGUF and Hugging Face files follow.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mt.gemma import sizes

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A row of the table."""

  path: str  # In the tree, such as layers/q.
  shape: str  # Its dimension letters, see mt/gemma/sizes.py; (HA) is one axis.
  axes: tuple[str, ...]  # A name for each dimension, see gemma/sharding.py.
  # Its name in a GGUF file; of a layer's, what follows `blk.N.`. Norms have
  # ModelConfig.norm_offset added there.
  gguf: str
  # Its name in a Hugging Face folder, without `model.` and `.weight`; of a
  # layer's, what follows `layers.N.`.
  hf: str
  lora: bool = False  # Whether it may have low-rank factors.
  init: str = 'normal'  # With variance 1 / fan-in; or `zeros`, `ones`.
  # Whether checkpoints have it. What a fork has added begins with its initial
  # values where the checkpoint lacks it.
  published: bool = True

  @property
  def name(self) -> str:
    """The last part of its path."""
    return self.path.rpartition('/')[2]

  @property
  def stack(self) -> str:
    """The name of its stack; '' where it is no layer's."""
    return self.path.rpartition('/')[0]

  @property
  def stacked(self) -> bool:
    """Whether there is one in each layer."""
    return bool(self.stack)

  @property
  def norm(self) -> bool:
    """Whether it is the scale of an RMSNorm, or of a layer."""
    return self.axes[-1] == 'norm'

  @property
  def transposed(self) -> bool:
    """Whether GGUF and Hugging Face have it as [out, in]."""
    return not self.norm and self.axes[0] != 'vocab'


def table(cfg: sizes.ModelConfig) -> tuple[Parameter, ...]:
  """All parameters of a model."""
  p, norm = Parameter, functools.partial(_norm, cfg)
  rows = [
    p('embedding', 'VD', ('vocab', 'width'), 'token_embd', 'embed_tokens'),
    norm('final_norm', 'D', 'output_norm', 'norm'),
  ]
  if cfg.layer_input_dim:
    # fmt: off
    rows += [
      p('layer_input_embedding', 'V(NE)', ('vocab', 'width'),
        'per_layer_token_embd', 'embed_tokens_per_layer'),
      p('layer_input_proj', 'D(NE)', ('embed', 'width'),
        'per_layer_model_proj', 'per_layer_model_projection'),
      norm('layer_input_norm', 'E',
           'per_layer_proj_norm', 'per_layer_projection_norm'),
    ]
    # fmt: on
  for stack in cfg.stacks():
    for row in _layer_rows(stack.cfg):
      rows.append(dataclasses.replace(row, path=f'{stack.name}/{row.path}'))
  return tuple(rows)


def _norm(cfg, path, shape, gguf, hf):
  axes = ('layers', 'norm') if shape[0] == 'N' else ('norm',)
  init = 'zeros' if cfg.norm_offset else 'ones'
  return Parameter(path, shape, axes, gguf, hf, init=init)


def _layer_rows(cfg):
  """Of the layers of a stack."""
  norm = functools.partial(_norm, cfg)
  matrix = functools.partial(Parameter, lora=True)
  to_heads = ('layers', 'embed', 'heads')
  to_kv_heads = ('layers', 'embed', 'kv_heads')
  from_heads = ('layers', 'heads', 'embed')
  to_ffw, from_ffw = ('layers', 'embed', 'ffw'), ('layers', 'ffw', 'embed')
  # Gemma 1 has no norm after attention; Hugging Face gives its name to another.
  ffw_norm = 'pre_feedforward_layernorm'
  if not cfg.post_norms:
    ffw_norm = 'post_attention_layernorm'
  # fmt: off
  rows = [
    norm('attn_norm', 'ND', 'attn_norm', 'input_layernorm'),
    matrix('q', 'ND(HA)', to_heads, 'attn_q', 'self_attn.q_proj'),
    matrix('k', 'ND(KA)', to_kv_heads, 'attn_k', 'self_attn.k_proj'),
    matrix('v', 'ND(KA)', to_kv_heads, 'attn_v', 'self_attn.v_proj'),
    matrix('o', 'N(HA)D', from_heads, 'attn_output', 'self_attn.o_proj'),
    norm('ffw_norm', 'ND', 'ffn_norm', ffw_norm),
    matrix('gate', 'NDF', to_ffw, 'ffn_gate', 'mlp.gate_proj'),
    matrix('up', 'NDF', to_ffw, 'ffn_up', 'mlp.up_proj'),
    matrix('down', 'NFD', from_ffw, 'ffn_down', 'mlp.down_proj'),
  ]
  if cfg.post_norms:
    rows += [
      norm('post_attn_norm', 'ND',
           'post_attention_norm', 'post_attention_layernorm'),
      norm('post_ffw_norm', 'ND',
           'post_ffw_norm', 'post_feedforward_layernorm'),
    ]
  if cfg.qk_norm:
    rows += [
      norm('q_norm', 'NA', 'attn_q_norm', 'self_attn.q_norm'),
      norm('k_norm', 'NA', 'attn_k_norm', 'self_attn.k_norm'),
    ]
  if cfg.layer_input_dim:
    rows += [
      matrix('input_gate', 'NDE', ('layers', 'embed', 'width'),
             'inp_gate', 'per_layer_input_gate'),
      matrix('input_proj', 'NED', ('layers', 'width', 'embed'),
             'proj', 'per_layer_projection'),
      norm('post_input_norm', 'ND', 'post_norm', 'post_per_layer_input_norm'),
    ]
  if cfg.layer_scale:
    rows += [
      Parameter('scale', 'N1', ('layers', 'norm'),
                'layer_output_scale', 'layer_scalar', init='ones'),
    ]
  # fmt: on
  absent = ('k', 'v', 'k_norm') if cfg.sharing_layers else ()
  if cfg.keys_are_values:
    absent += ('v',)
  return [row for row in rows if row.path not in absent]


def unflatten(flat: dict[str, Any]) -> Params:
  """{'layers/q': x, …} -> {'layers': {'q': x}, …}."""
  tree = {}
  for path, leaf in flat.items():
    stack, _, name = path.rpartition('/')
    place = tree.setdefault(stack, {}) if stack else tree
    place[name] = leaf
  return tree


def flatten(tree: Params) -> dict[str, Any]:
  """The inverse of `unflatten`."""
  flat = {}
  for name, x in tree.items():
    if isinstance(x, dict):
      flat |= {f'{name}/{k}': v for k, v in x.items()}
    else:
      flat[name] = x
  return flat


def shapes(cfg: sizes.ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter."""
  dims = {s.name: s.cfg.dims() for s in cfg.stacks()} | {'': cfg.dims()}
  return {p.path: dims[p.stack][p.shape] for p in table(cfg)}


def init(cfg: sizes.ModelConfig, key: chex.PRNGKey) -> Params:
  """Random float32 parameters, as the rows of the table say."""
  rows = sorted(table(cfg), key=lambda p: p.path)
  keys = jax.random.split(key, len(rows))
  return unflatten(
    {p.path: initial(cfg, p, k) for p, k in zip(rows, keys, strict=True)}
  )


def initial(
  cfg: sizes.ModelConfig, row: Parameter, key: chex.PRNGKey
) -> chex.Array:
  """The initial values of one parameter."""
  shape = shapes(cfg)[row.path]
  if row.init != 'normal':
    return jnp.full(shape, row.init == 'ones', jnp.float32)
  if row.path == 'layer_input_embedding':
    fan_in = cfg.layer_input_dim
  else:
    fan_in = shape[-2] if row.transposed else shape[-1]
  return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
