"""How does the text tower of CLIP read a caption?

Source: Radford et al. 2021; the tensors' names and the order of operations are those of
transformers' `CLIPTextModel`, the text encoder of Stable Diffusion. States are always the last
ones after the final norm (the folder of Stable Diffusion 2.1 has 23 layers of OpenCLIP's 24), the
pooled vector is the state at the end of the text, without projection (STAR specification 2).
"""

import functools
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.errors import UserError
from star_jax.text import fields, layers
from star_jax.text.pooling import FirstOf, HighestId
from star_jax.text.tokens import Tokens
from star_jax.text.tower import Tower
from star_jax.text.weights import Piece, affine, fused, fused_bias, layered

# Configs from before transformers knew the end of CLIP's texts name this id.
WRONG_END = 2


class Block(nn.Module):
    """Attention and MLP, each after its norm (pre-norm)."""

    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array, keep: jax.Array) -> tuple[jax.Array, None]:
        h_BTE = layers.LayerNorm(self.eps, name='attention_norm')(x_BTE)
        x_BTE = x_BTE + layers.SelfAttention(self.heads, name='attention')(h_BTE, keep)
        h_BTE = layers.LayerNorm(self.eps, name='mlp_norm')(x_BTE)
        return x_BTE + layers.Mlp(self.mlp, self.activation, name='mlp')(h_BTE), None


class Clip(nn.Module):
    """Tokens in; states (B, T, E) out: each token sees itself and the real ones before it."""

    vocab: int
    positions: int
    width: int
    depth: int
    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        at_T = jnp.arange(tokens.ids_BT.shape[1])
        x_BTE = layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
        x_BTE = x_BTE + layers.embedding(self.positions, self.width, 'positions')(at_T[None])
        earlier_11TS = (at_T[:, None] >= at_T[None, :])[None, None]
        blocks = layers.stack(Block, self.depth, self.heads, self.mlp, self.eps, self.activation)
        x_BTE, _ = blocks(x_BTE, layers.real(tokens.mask_BT) & earlier_11TS)
        return layers.LayerNorm(self.eps, name='norm')(x_BTE)


def tower(config: Mapping) -> Tower:
    """The parts that a config.json asks for; absent fields as in transformers' CLIPTextConfig.

    The config of a whole CLIP holds its tower's. Raises `UserError` for values that mean nothing.
    """
    config = _of_text(config)
    width = fields.size(config, 'hidden_size', 512)
    module = Clip(
        vocab=fields.size(config, 'vocab_size', 49408),
        positions=fields.size(config, 'max_position_embeddings', 77),
        width=width,
        depth=fields.size(config, 'num_hidden_layers', 12),
        heads=fields.heads(config, width, 8),
        mlp=fields.size(config, 'intermediate_size', 2048),
        eps=fields.epsilon(config, 'layer_norm_eps', 1e-5),
        activation=fields.choice(config, 'hidden_act', 'quick_gelu', layers.ACTIVATIONS),
    )
    end = fields.token(config, 'eos_token_id', 49407)
    return Tower(
        module=module,
        pieces=functools.partial(pieces, module.depth),
        pool=HighestId() if end == WRONG_END else FirstOf(end),
        width=width,
        vocab=module.vocab,
        filler=fields.token(config, 'pad_token_id', 1),
        length=module.positions,
        longest=module.positions,
    )


def pieces(depth: int, names: Container[str]) -> list[Piece]:
    """The table of a folder whose tensors have these names; those of a vision tower are not."""
    prefix = 'text_model.' if 'text_model.final_layer_norm.weight' in names else ''
    heads = [f'self_attn.{name}_proj' for name in 'qkv']
    layer = [
        *affine('layer_norm1', 'attention_norm', 'E -> E', kernel='scale'),
        *fused(heads, 'attention/qkv'),
        *fused_bias(heads, 'attention/qkv_bias'),
        *affine('self_attn.out_proj', 'attention/out', 'E (N H) -> N H E'),
        *affine('layer_norm2', 'mlp_norm', 'E -> E', kernel='scale'),
        *affine('mlp.fc1', 'mlp/up', 'F E -> E F'),
        *affine('mlp.fc2', 'mlp/down', 'E F -> F E'),
    ]
    embeddings = f'{prefix}embeddings'
    return [
        Piece(f'{embeddings}.token_embedding.weight', 'words/table', 'V E -> V E'),
        Piece(f'{embeddings}.position_embedding.weight', 'positions/table', 'T E -> T E'),
        *layered(f'{prefix}encoder.layers', layer, depth),
        *affine(f'{prefix}final_layer_norm', 'norm', 'E -> E', kernel='scale'),
    ]


def _of_text(config: Mapping) -> Mapping:
    """The tower's own fields; of the two places in old files, transformers reads the second."""
    if config.get('model_type') != 'clip':
        return config
    text = config.get('text_config_dict') or config.get('text_config') or {}
    if not isinstance(text, Mapping):
        raise UserError(f'text_config is {text!r} in the text encoder; expected its fields.')
    return text
