"""How does the encoder of T5 encode a caption?

Source: Raffel et al. 2020, Shazeer 2020 (gated units); tensor names and the order of operations
follow transformers' `T5EncoderModel`, for every size of T5, T5 v1.1, Flan-T5 and UL2. The pooled
vector is the mean over all positions, padding included (STAR specification 2); Infinity uses no
pooled vector.
"""

import functools
from collections.abc import Callable, Container, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.errors import UserError
from star_jax.nn.layers import Einsum
from star_jax.text import hf_config, layers
from star_jax.text.tokens import Tokens
from star_jax.text.tower import PaddedMean, Tower
from star_jax.text.weights import WeightMapping, fused, stacked

LENGTH = 120  # default tokens per caption (STAR specification 2)
GATED = 'gated-'
# In transformers 'gated-gelu' is the tanh approximation, while 'gelu' is the exact function.
ACTIVATIONS = {f'{GATED}{name}': act for name, act in layers.ACTIVATIONS.items()}
ACTIVATIONS |= layers.ACTIVATIONS | {f'{GATED}gelu': layers.ACTIVATIONS['gelu_new']}

ATTENTION, DENSE = 'layer.0', 'layer.1'
PLAIN_MLP = (WeightMapping(f'{DENSE}.DenseReluDense.wi.weight', 'mlp/up/kernel', 'F E -> E F'),)
GATED_MLP = (
    WeightMapping(f'{DENSE}.DenseReluDense.wi_0.weight', 'mlp/gate/kernel', 'F E -> E F'),
    WeightMapping(f'{DENSE}.DenseReluDense.wi_1.weight', 'mlp/up/kernel', 'F E -> E F'),
)


class PlainMlp(nn.Module):
    """T5: activation between two products, without biases.

    Attributes:
        hidden: channels between the products.
        activation: the activation.
    """

    hidden: int
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        h_BTF = self.activation(_up(x_BTE.shape[-1], self.hidden, 'up')(x_BTE))
        return _down(x_BTE.shape[-1], self.hidden)(h_BTF)


class GatedMlp(nn.Module):
    """T5 v1.1: the activation of one product gates another.

    Attributes:
        hidden: channels of both products.
        activation: the activation.
    """

    hidden: int
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        E, F = x_BTE.shape[-1], self.hidden
        gate_BTF = self.activation(_up(E, F, 'gate')(x_BTE))
        return _down(E, F)(gate_BTF * _up(E, F, 'up')(x_BTE))


class Block(nn.Module):
    """Attention and MLP, each after its norm (pre-norm).

    Attention scores are not scaled; a bias that depends on the distance is added to them.

    Attributes:
        heads: attention heads.
        head_width: channels of a head.
        eps: added to the mean square of a norm.
        mlp: makes the MLP, `PlainMlp` or `GatedMlp`.
    """

    heads: int
    head_width: int
    eps: float
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x_BTE: jax.Array, visible: jax.Array, bias_1NTS: jax.Array
    ) -> tuple[jax.Array, None]:
        E, shape = x_BTE.shape[-1], (self.heads, self.head_width)
        h_BTE = layers.RMSNorm(self.eps, name='attention_norm')(x_BTE)
        q_k_v = jnp.unstack(layers.qkv(E, shape)(h_BTE), axis=2)
        gather = Einsum(
            'BTNH,NHE->BTE', (*shape, E), ('heads', None, 'embed'), layers.INIT, name='out'
        )
        x_BTE = x_BTE + gather(layers.attend(*q_k_v, visible, bias_1NTS=bias_1NTS))
        h_BTE = layers.RMSNorm(self.eps, name='mlp_norm')(x_BTE)
        return x_BTE + self.mlp(name='mlp')(h_BTE), None


class T5(nn.Module):
    """Tokens to states [B, T, E]; all layers share one table of biases by distance.

    Attributes:
        vocab: number of token ids.
        width: channels E of a state.
        depth: layers.
        heads: attention heads of a layer.
        head_width: channels of a head.
        eps: added to the mean square of a norm.
        buckets: rows of the table of biases.
        max_distance: distance, in tokens, from which on the last row of a half applies.
        mlp: makes the MLP, `PlainMlp` or `GatedMlp`.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    head_width: int
    eps: float
    buckets: int
    max_distance: int
    mlp: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        T = tokens.ids_BT.shape[1]
        x_BTE = layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
        init = nn.with_logical_partitioning(layers.INIT, (None, 'heads'))
        table = self.param('distances', init, (self.buckets, self.heads))
        bucket_TS = distance_buckets(T, self.buckets, self.max_distance)
        bias_1NTS = jnp.moveaxis(table[bucket_TS], -1, 0)[None].astype(jnp.float32)
        blocks = layers.stack(
            Block,
            depth=self.depth,
            heads=self.heads,
            head_width=self.head_width,
            eps=self.eps,
            mlp=self.mlp,
        )
        x_BTE, _ = blocks(x_BTE, layers.visible_tokens(tokens.mask_BT), bias_1NTS)
        return layers.RMSNorm(self.eps, name='norm')(x_BTE)


def distance_buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """[T, T] int32: the row of the bias table for each (query, key).

    The first half of the rows is for keys before the query, the second half for keys after it. In
    each half the first rows hold one distance each; the others grow logarithmically wider.

    Args:
        length: T, in tokens.
        count: rows of the table.
        max_distance: distance from which on the last row of a half applies, in tokens.
    """
    positions_T = np.arange(length)
    ahead_TT = positions_T[None, :] - positions_T[:, None]
    half = count // 2
    exact = half // 2
    distance_TT = np.abs(ahead_TT)
    # In float32 like the original, whose rounding decides at the borders of the rows.
    log_distance_TT = np.log(np.maximum(distance_TT, exact).astype(np.float32) / np.float32(exact))
    log_distance_TT = (
        log_distance_TT / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    )
    log_row_TT = np.minimum(exact + log_distance_TT.astype(np.int32), half - 1)
    row_TT = np.where(distance_TT < exact, distance_TT, log_row_TT)
    return (row_TT + half * (ahead_TT > 0)).astype(np.int32)


def build_tower(config: Mapping) -> Tower:
    """The encoder of a config.json; absent fields have the defaults of transformers' T5Config.

    Raises `UserError` for invalid values.
    """
    activation = hf_config.choice(config, 'feed_forward_proj', 'relu', ACTIVATIONS)
    gated = config.get('feed_forward_proj', 'relu').startswith(GATED)
    hidden = hf_config.size(config, 'd_ff', 2048)
    count = hf_config.size(config, 'relative_attention_num_buckets', 32)
    max_distance = hf_config.size(config, 'relative_attention_max_distance', 128)
    if count < 4 or max_distance <= count // 4:
        raise UserError(
            f'relative_attention_num_buckets is {count} and relative_attention_max_distance '
            f'{max_distance} in the text encoder; expected at least 4 buckets, and a distance '
            f'above a quarter of their number.'
        )
    module = T5(
        vocab=hf_config.size(config, 'vocab_size', 32128),
        width=hf_config.size(config, 'd_model', 512),
        depth=hf_config.depth(config, 'num_layers', 6),
        heads=hf_config.size(config, 'num_heads', 8),
        head_width=hf_config.size(config, 'd_kv', 64),
        eps=hf_config.epsilon(config, 'layer_norm_epsilon', 1e-6),
        buckets=count,
        max_distance=max_distance,
        mlp=functools.partial(GatedMlp if gated else PlainMlp, hidden, activation),
    )
    return Tower(
        module=module,
        weight_mappings=functools.partial(
            weight_mappings, module.depth, GATED_MLP if gated else PLAIN_MLP
        ),
        pool=PaddedMean(),
        width=module.width,
        vocab=module.vocab,
        pad_id=hf_config.token_id(config, 'pad_token_id', 0),
        default_length=LENGTH,
    )


def weight_mappings(
    depth: int, mlp_inputs: tuple[WeightMapping, ...], names: Container[str]
) -> list[WeightMapping]:
    """The mappings of a folder whose tensors have these names, without a decoder.

    Args:
        depth: number of layers.
        mlp_inputs: mappings of the first product of an MLP, which differ between versions of T5.
        names: tensor names of the folder.
    """
    attention = f'{ATTENTION}.SelfAttention'
    layer = [
        WeightMapping(f'{ATTENTION}.layer_norm.weight', 'attention_norm/scale'),
        *fused([f'{attention}.{name}' for name in 'qkv'], 'qkv'),
        WeightMapping(f'{attention}.o.weight', 'out/kernel', 'E (N H) -> N H E'),
        WeightMapping(f'{DENSE}.layer_norm.weight', 'mlp_norm/scale'),
        *mlp_inputs,
        WeightMapping(f'{DENSE}.DenseReluDense.wo.weight', 'mlp/down/kernel', 'E F -> F E'),
    ]
    distances = f'encoder.block.0.{attention}.relative_attention_bias.weight'
    # The weight is shared, so that a file may hold it under either name.
    words = 'shared.weight' if 'shared.weight' in names else 'encoder.embed_tokens.weight'
    return [
        WeightMapping(words, 'words/table', 'V E -> V E'),
        WeightMapping(distances, 'distances', 'R N -> R N'),
        *stacked('encoder.block', layer, depth),
        WeightMapping('encoder.final_layer_norm.weight', 'norm/scale'),
    ]


def _up(width: int, hidden: int, name: str) -> Einsum:
    return Einsum('BTE,EF->BTF', (width, hidden), ('embed', 'mlp'), layers.INIT, name=name)


def _down(width: int, hidden: int) -> Einsum:
    return Einsum('BTF,FE->BTE', (hidden, width), ('mlp', 'embed'), layers.INIT, name='down')
