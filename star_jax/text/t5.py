"""How does the encoder of T5 read a caption?

Source: Raffel et al. 2020, Shazeer 2020 (gated units); the tensors' names and the order of
operations are those of transformers' `T5EncoderModel`, for every size of T5, T5 v1.1, Flan-T5 and
UL2. The pooled vector is the mean over all positions, padding included (STAR specification 2);
Infinity reads none.
"""

import functools
from collections.abc import Callable, Container, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.errors import UserError
from star_jax.nn.layers import Einsum
from star_jax.text import fields, layers
from star_jax.text.pooling import PaddedMean
from star_jax.text.tokens import Tokens
from star_jax.text.tower import Tower
from star_jax.text.weights import Piece, fused, layered

LENGTH = 120  # tokens per caption unless asked otherwise (STAR specification 2)
GATED = 'gated-'
# transformers reads this one name as the approximation, and 'gelu' as the exact function.
ACTIVATIONS = {f'{GATED}{name}': act for name, act in layers.ACTIVATIONS.items()}
ACTIVATIONS |= layers.ACTIVATIONS | {f'{GATED}gelu': layers.ACTIVATIONS['gelu_new']}

ATTENTION, DENSE = 'layer.0', 'layer.1'
PLAIN = (Piece(f'{DENSE}.DenseReluDense.wi.weight', 'mlp/up/kernel', 'F E -> E F'),)
GATES = (
    Piece(f'{DENSE}.DenseReluDense.wi_0.weight', 'mlp/gate/kernel', 'F E -> E F'),
    Piece(f'{DENSE}.DenseReluDense.wi_1.weight', 'mlp/up/kernel', 'F E -> E F'),
)


class Plain(nn.Module):
    """T5: activation between two products, without biases."""

    hidden: int
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        h_BTF = self.activation(_up(x_BTE.shape[-1], self.hidden, 'up')(x_BTE))
        return _down(x_BTE.shape[-1], self.hidden)(h_BTF)


class Gated(nn.Module):
    """T5 v1.1: the activation of one product gates another."""

    hidden: int
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        E, F = x_BTE.shape[-1], self.hidden
        gate_BTF = self.activation(_up(E, F, 'gate')(x_BTE))
        return _down(E, F)(gate_BTF * _up(E, F, 'up')(x_BTE))


class Block(nn.Module):
    """Attention and MLP, each after its norm. Scores are not scaled, but biased by distance."""

    heads: int
    head_width: int
    eps: float
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x_BTE: jax.Array, keep: jax.Array, bias_1NTS: jax.Array
    ) -> tuple[jax.Array, None]:
        E, shape = x_BTE.shape[-1], (self.heads, self.head_width)
        h_BTE = layers.RMSNorm(self.eps, name='attention_norm')(x_BTE)
        q_k_v = jnp.unstack(layers.qkv(E, shape)(h_BTE), axis=2)
        gather = Einsum(
            'BTNH,NHE->BTE', (*shape, E), ('heads', None, 'embed'), layers.INIT, name='out'
        )
        x_BTE = x_BTE + gather(layers.attend(*q_k_v, keep, bias_1NTS=bias_1NTS))
        h_BTE = layers.RMSNorm(self.eps, name='mlp_norm')(x_BTE)
        return x_BTE + self.mlp(name='mlp')(h_BTE), None


class T5(nn.Module):
    """Tokens in; states (B, T, E) out. The first layer's table of distances serves all layers."""

    vocab: int
    width: int
    depth: int
    heads: int
    head_width: int
    eps: float
    buckets: int
    farthest: int
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        T = tokens.ids_BT.shape[1]
        x_BTE = layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
        init = nn.with_logical_partitioning(layers.INIT, (None, 'heads'))
        table = self.param('distances', init, (self.buckets, self.heads))
        bucket_TS = buckets(T, self.buckets, self.farthest)
        bias_1NTS = jnp.moveaxis(table[bucket_TS], -1, 0)[None].astype(jnp.float32)
        blocks = layers.stack(Block, self.depth, self.heads, self.head_width, self.eps, self.mlp)
        x_BTE, _ = blocks(x_BTE, layers.real(tokens.mask_BT), bias_1NTS)
        return layers.RMSNorm(self.eps, name='norm')(x_BTE)


def buckets(length: int, count: int, farthest: int) -> np.ndarray:
    """Which row of the table holds the bias of (query, key), [T, T] int32.

    Half of the rows are for keys behind the query, half for those ahead; in each half one row per
    distance at first, then logarithmically wider up to `farthest`, where the last row begins.
    """
    at_T = np.arange(length)
    ahead_TT = at_T[None, :] - at_T[:, None]
    half = count // 2
    exact = half // 2
    distance_TT = np.abs(ahead_TT)
    # In float32 as the original, whose rounding decides at the borders of the rows.
    ratio_TT = np.log(np.maximum(distance_TT, exact).astype(np.float32) / np.float32(exact))
    ratio_TT = ratio_TT / np.float32(np.log(farthest / exact)) * np.float32(half - exact)
    wide_TT = np.minimum(exact + ratio_TT.astype(np.int32), half - 1)
    row_TT = np.where(distance_TT < exact, distance_TT, wide_TT)
    return (row_TT + half * (ahead_TT > 0)).astype(np.int32)


def tower(config: Mapping) -> Tower:
    """The parts that a config.json asks for; absent fields as in transformers' T5Config.

    Raises `UserError` for values that mean nothing.
    """
    activation = fields.choice(config, 'feed_forward_proj', 'relu', ACTIVATIONS)
    gated = config.get('feed_forward_proj', 'relu').startswith(GATED)
    hidden = fields.size(config, 'd_ff', 2048)
    count = fields.size(config, 'relative_attention_num_buckets', 32)
    farthest = fields.size(config, 'relative_attention_max_distance', 128)
    if count < 4 or farthest <= count // 4:
        raise UserError(
            f'relative_attention_num_buckets is {count} and relative_attention_max_distance '
            f'{farthest} in the text encoder; expected at least 4, and more than a quarter of them.'
        )
    module = T5(
        vocab=fields.size(config, 'vocab_size', 32128),
        width=fields.size(config, 'd_model', 512),
        depth=fields.size(config, 'num_layers', 6),
        heads=fields.size(config, 'num_heads', 8),
        head_width=fields.size(config, 'd_kv', 64),
        eps=fields.epsilon(config, 'layer_norm_epsilon', 1e-6),
        buckets=count,
        farthest=farthest,
        mlp=functools.partial(Gated if gated else Plain, hidden, activation),
    )
    return Tower(
        module=module,
        pieces=functools.partial(pieces, module.depth, GATES if gated else PLAIN),
        pool=PaddedMean(),
        width=module.width,
        vocab=module.vocab,
        filler=fields.token(config, 'pad_token_id', 0),
        length=LENGTH,
    )


def pieces(depth: int, up: tuple[Piece, ...], names: Container[str]) -> list[Piece]:
    """The table of a folder whose tensors have these names; those of a decoder are not."""
    attention = f'{ATTENTION}.SelfAttention'
    layer = [
        Piece(f'{ATTENTION}.layer_norm.weight', 'attention_norm/scale'),
        *fused([f'{attention}.{name}' for name in 'qkv'], 'qkv'),
        Piece(f'{attention}.o.weight', 'out/kernel', 'E (N H) -> N H E'),
        Piece(f'{DENSE}.layer_norm.weight', 'mlp_norm/scale'),
        *up,
        Piece(f'{DENSE}.DenseReluDense.wo.weight', 'mlp/down/kernel', 'E F -> F E'),
    ]
    distances = f'encoder.block.0.{attention}.relative_attention_bias.weight'
    # Tied, so a file may hold it under either name.
    words = 'shared.weight' if 'shared.weight' in names else 'encoder.embed_tokens.weight'
    return [
        Piece(words, 'words/table', 'V E -> V E'),
        Piece(distances, 'distances', 'R N -> R N'),
        *layered('encoder.block', layer, depth),
        Piece('encoder.final_layer_norm.weight', 'norm/scale'),
    ]


def _up(width: int, hidden: int, name: str) -> Einsum:
    return Einsum('BTE,EF->BTF', (width, hidden), ('embed', 'mlp'), layers.INIT, name=name)


def _down(width: int, hidden: int) -> Einsum:
    return Einsum('BTF,FE->BTE', (hidden, width), ('mlp', 'embed'), layers.INIT, name='down')
