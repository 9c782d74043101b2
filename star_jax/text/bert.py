"""How does BERT (and MiniLM, a small BERT) encode a caption?

Source: Devlin et al. 2018; tensor names and the order of operations follow transformers'
`BertModel`. Its pooler is not used: the pooled vector is the mean of the real tokens, as MiniLM was
trained.
"""

import functools
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.text import hf_config, layers
from star_jax.text.tokens import Tokens
from star_jax.text.tower import MaskedMean, Tower
from star_jax.text.weights import WeightMapping, affine, fused, fused_bias, stacked

LENGTH = 32  # default tokens per caption: captions of scenes are short
ACTIVATIONS = {name: layers.ACTIVATIONS[name] for name in ('gelu', 'gelu_new', 'relu')}


class Block(nn.Module):
    """Attention and MLP, each followed by its residual and norm (post-norm).

    Attributes:
        heads: attention heads.
        mlp: channels inside the MLP.
        eps: added to the variance of a norm.
        activation: activation of the MLP.
    """

    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array, visible: jax.Array) -> tuple[jax.Array, None]:
        attended_BTE = layers.SelfAttention(self.heads, name='attention')(x_BTE, visible)
        x_BTE = layers.LayerNorm(self.eps, name='attention_norm')(x_BTE + attended_BTE)
        hidden_BTE = layers.Mlp(self.mlp, self.activation, name='mlp')(x_BTE)
        return layers.LayerNorm(self.eps, name='mlp_norm')(x_BTE + hidden_BTE), None


class Bert(nn.Module):
    """Tokens to states [B, T, E]; the fields follow config.json.

    Attributes:
        vocab: number of token ids.
        positions: rows of the position table, the most tokens of a caption.
        types: rows of the table of token types.
        width: channels E of a state.
        depth: layers.
        heads: attention heads of a layer.
        mlp: channels inside the MLP.
        eps: added to the variance of a norm.
        activation: activation of the MLP.
    """

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
        positions_1T = jnp.arange(tokens.ids_BT.shape[1])[None]
        x_BTE = (
            layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
            + layers.embedding(self.types, self.width, 'types')(jnp.zeros_like(positions_1T))
            + layers.embedding(self.positions, self.width, 'positions')(positions_1T)
        )
        x_BTE = layers.LayerNorm(self.eps, name='norm')(x_BTE)
        blocks = layers.stack(
            Block,
            depth=self.depth,
            heads=self.heads,
            mlp=self.mlp,
            eps=self.eps,
            activation=self.activation,
        )
        return blocks(x_BTE, layers.visible_tokens(tokens.mask_BT))[0]


def build_tower(config: Mapping) -> Tower:
    """The encoder of a config.json; absent fields have the defaults of transformers' BertConfig.

    Raises `UserError` for unsupported variants of BERT and for invalid sizes.
    """
    hf_config.choice(config, 'position_embedding_type', 'absolute', {'absolute': True})
    width = hf_config.size(config, 'hidden_size', 768)
    module = Bert(
        vocab=hf_config.size(config, 'vocab_size', 30522),
        positions=hf_config.size(config, 'max_position_embeddings', 512),
        types=hf_config.size(config, 'type_vocab_size', 2),
        width=width,
        depth=hf_config.depth(config, 'num_hidden_layers', 12),
        heads=hf_config.num_heads(config, width, 12),
        mlp=hf_config.size(config, 'intermediate_size', 3072),
        eps=hf_config.epsilon(config, 'layer_norm_eps', 1e-12),
        activation=hf_config.choice(config, 'hidden_act', 'gelu', ACTIVATIONS),
    )
    return Tower(
        module=module,
        weight_mappings=functools.partial(weight_mappings, module.depth),
        pool=MaskedMean(),
        width=width,
        vocab=module.vocab,
        pad_id=hf_config.token_id(config, 'pad_token_id', 0),
        default_length=LENGTH,
        max_length=module.positions,
    )


def weight_mappings(depth: int, names: Container[str]) -> list[WeightMapping]:
    """The mappings of a folder whose tensors have these names."""
    # Names of a BERT that was saved inside a larger model start with `bert.`; very old files have
    # gamma and beta.
    prefix = '' if 'embeddings.word_embeddings.weight' in names else 'bert.'
    old_norm = f'{prefix}embeddings.LayerNorm.gamma' in names
    scale, shift = ('gamma', 'beta') if old_norm else ('weight', 'bias')

    def norm(tensor: str, param: str) -> list[WeightMapping]:
        return [
            WeightMapping(f'{tensor}.{scale}', f'{param}/scale'),
            WeightMapping(f'{tensor}.{shift}', f'{param}/bias'),
        ]

    def table(name: str, param: str) -> WeightMapping:
        tensor = f'{prefix}embeddings.{name}_embeddings.weight'
        return WeightMapping(tensor, f'{param}/table', 'V E -> V E')

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
        *stacked(f'{prefix}encoder.layer', layer, depth),
    ]
