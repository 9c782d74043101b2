"""How does BERT (and MiniLM, a small BERT) read a caption?

Source: Devlin et al. 2018; the tensors' names and the order of operations are those of
transformers' `BertModel`. Its pooler is not used: the pooled vector is the mean of the real
tokens, as MiniLM was trained.
"""

import functools
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.text import fields, layers
from star_jax.text.pooling import RealMean
from star_jax.text.tokens import Tokens
from star_jax.text.tower import Tower
from star_jax.text.weights import Piece, affine, fused, fused_bias, layered

LENGTH = 32  # tokens per caption unless asked otherwise: captions of scenes are short
ACTIVATIONS = {name: layers.ACTIVATIONS[name] for name in ('gelu', 'gelu_new', 'relu')}


class Block(nn.Module):
    """Attention and MLP, each followed by its residual and norm (post-norm)."""

    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array, keep: jax.Array) -> tuple[jax.Array, None]:
        read_BTE = layers.SelfAttention(self.heads, name='attention')(x_BTE, keep)
        x_BTE = layers.LayerNorm(self.eps, name='attention_norm')(x_BTE + read_BTE)
        hidden_BTE = layers.Mlp(self.mlp, self.activation, name='mlp')(x_BTE)
        return layers.LayerNorm(self.eps, name='mlp_norm')(x_BTE + hidden_BTE), None


class Bert(nn.Module):
    """Tokens in; states (B, T, E) out. Fields as in config.json."""

    vocab: int
    positions: int
    types: int
    width: int
    depth: int
    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        at_1T = jnp.arange(tokens.ids_BT.shape[1])[None]
        x_BTE = (
            layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
            + layers.embedding(self.types, self.width, 'types')(jnp.zeros_like(at_1T))
            + layers.embedding(self.positions, self.width, 'positions')(at_1T)
        )
        x_BTE = layers.LayerNorm(self.eps, name='norm')(x_BTE)
        blocks = layers.stack(Block, self.depth, self.heads, self.mlp, self.eps, self.activation)
        return blocks(x_BTE, layers.real(tokens.mask_BT))[0]


def tower(config: Mapping) -> Tower:
    """The parts that a config.json asks for; absent fields as in transformers' BertConfig.

    Raises `UserError` for variants of BERT that compute something else, and for sizes that are
    none.
    """
    fields.choice(config, 'position_embedding_type', 'absolute', {'absolute': True})
    width = fields.size(config, 'hidden_size', 768)
    module = Bert(
        vocab=fields.size(config, 'vocab_size', 30522),
        positions=fields.size(config, 'max_position_embeddings', 512),
        types=fields.size(config, 'type_vocab_size', 2),
        width=width,
        depth=fields.size(config, 'num_hidden_layers', 12),
        heads=fields.heads(config, width, 12),
        mlp=fields.size(config, 'intermediate_size', 3072),
        eps=fields.epsilon(config, 'layer_norm_eps', 1e-12),
        activation=fields.choice(config, 'hidden_act', 'gelu', ACTIVATIONS),
    )
    return Tower(
        module=module,
        pieces=functools.partial(pieces, module.depth),
        pool=RealMean(),
        width=width,
        vocab=module.vocab,
        filler=fields.token(config, 'pad_token_id', 0),
        length=LENGTH,
        longest=module.positions,
    )


def pieces(depth: int, names: Container[str]) -> list[Piece]:
    """The table of a folder whose tensors have these names."""
    # A BERT that was saved inside a larger model has its name in front; a very old one says
    # gamma and beta.
    prefix = '' if 'embeddings.word_embeddings.weight' in names else 'bert.'
    old_norm = f'{prefix}embeddings.LayerNorm.gamma' in names
    scale, shift = ('gamma', 'beta') if old_norm else ('weight', 'bias')

    def norm(theirs: str, ours: str) -> list[Piece]:
        return [
            Piece(f'{theirs}.{scale}', f'{ours}/scale'),
            Piece(f'{theirs}.{shift}', f'{ours}/bias'),
        ]

    def table(theirs: str, ours: str) -> Piece:
        return Piece(
            f'{prefix}embeddings.{theirs}_embeddings.weight', f'{ours}/table', 'V E -> V E'
        )

    heads = [f'attention.self.{name}' for name in ('query', 'key', 'value')]
    layer = [
        *fused(heads, 'attention/qkv'),
        *fused_bias(heads, 'attention/qkv_bias'),
        *affine('attention.output.dense', 'attention/out', 'E (N H) -> N H E'),
        *norm('attention.output.LayerNorm', 'attention_norm'),
        *affine('intermediate.dense', 'mlp/up', 'F E -> E F'),
        *affine('output.dense', 'mlp/down', 'E F -> F E'),
        *norm('output.LayerNorm', 'mlp_norm'),
    ]
    return [
        table('word', 'words'),
        table('token_type', 'types'),
        table('position', 'positions'),
        *norm(f'{prefix}embeddings.LayerNorm', 'norm'),
        *layered(f'{prefix}encoder.layer', layer, depth),
    ]
