"""Which layers do text encoders share, beside `nn/`?

Arithmetic follows the dtype of the parameters; norms and softmax are float32. Suffixes: B batch,
T tokens (S as keys), E width, N heads, H head width, F mlp width, K = 3 for query,
key and value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.nn.attention import OutputProjection
from star_jax.nn.layers import Bias, Einsum, Linear, Table, layer_norm

# Parameters are loaded from a folder; initial values are never used.
INIT = nn.initializers.normal(0.02)

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Activation] = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def embedding(rows: int, width: int, name: str) -> Table:
    """A table of vectors. Rows are not sharded: a mesh rarely divides a published vocabulary."""
    return Table(rows, width, (None, 'embed'), INIT, name=name)


class LayerNorm(nn.Module):
    """Normalises the last axis in float32, then scales and shifts.

    Attributes:
        eps: added to the variance.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = layer_norm(x.astype(jnp.float32), self.eps)
        scale = vector(self, 'scale', nn.initializers.ones, normed)
        return (normed * scale + vector(self, 'bias', nn.initializers.zeros, normed)).astype(
            x.dtype
        )


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis in float32, then scales.

    Attributes:
        eps: added to the mean square.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x_float32 = x.astype(jnp.float32)
        mean_square = jnp.square(x_float32).mean(-1, keepdims=True)
        normed = x_float32 * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * vector(self, 'scale', nn.initializers.ones, normed)).astype(x.dtype)


def vector(module: nn.Module, name: str, init: nn.initializers.Initializer, x: jax.Array):
    """A parameter of the width of x, with as many axes as x: no rank is promoted silently."""
    boxed = nn.with_logical_partitioning(init, ('embed',))
    param = module.param(name, boxed, x.shape[-1:])
    return jax.lax.expand_dims(param, range(x.ndim - 1)).astype(x.dtype)


class SelfAttention(nn.Module):
    """Attention of BERT and CLIP: the heads divide the width, every projection has a bias.

    Attributes:
        heads: attention heads, N.
    """

    heads: int

    @nn.compact
    def __call__(self, x_BTE: jax.Array, visible: jax.Array) -> jax.Array:
        E = x_BTE.shape[-1]
        shape = (self.heads, E // self.heads)
        fused_BTKNH = qkv(E, shape)(x_BTE)
        fused_BTKNH = Bias((3, *shape), (None, 'heads', None), name='qkv_bias')(fused_BTKNH)
        attended_BTNH = attend(*jnp.unstack(fused_BTKNH, axis=2), visible, scale=shape[1] ** -0.5)
        return OutputProjection(E, shape, INIT, name='out')(attended_BTNH)


def qkv(width: int, shape: tuple[int, int]) -> Einsum:
    """Queries, keys and values as one product, [B, T, 3, N, H]."""
    axes = ('embed', None, 'heads', None)
    return Einsum('BTE,EKNH->BTKNH', (width, 3, *shape), axes, INIT, name='qkv')


class Mlp(nn.Module):
    """Linear, activation, Linear.

    Attributes:
        hidden: channels between the two layers.
        activation: the activation.
    """

    hidden: int
    activation: Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        E, F = x_BTE.shape[-1], self.hidden
        h_BTF = self.activation(Linear(E, F, ('embed', 'mlp'), INIT, name='up')(x_BTE))
        return Linear(F, E, ('mlp', 'embed'), INIT, name='down')(h_BTF)


def visible_tokens(mask_BT: jax.Array) -> jax.Array:
    """[B, 1, 1, S] bool: every query attends to the real tokens of its caption."""
    return (mask_BT > 0)[:, None, None, :]


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    visible: jax.Array,
    scale: float = 1.0,
    bias_1NTS: jax.Array | float = 0.0,
) -> jax.Array:
    """[B, T, N, H]: softmax(scale q k + bias) v over the keys where `visible` is True.

    Hidden scores are the least float32 instead of -inf, so that a row without any real token stays
    finite.

    Args:
        q_BTNH: queries.
        k_BSNH: keys.
        v_BSNH: values.
        visible: bool, broadcasts to [B, N, T, S].
        scale: factor of the scores.
        bias_1NTS: float32, added to the scores.
    """
    scores_BNTS = jnp.einsum('BTNH,BSNH->BNTS', q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BNTS * scale + bias_1NTS
    weights_BNTS = jax.nn.softmax(jnp.where(visible, scores_BNTS, jnp.finfo(jnp.float32).min))
    return jnp.einsum('BNTS,BSNH->BTNH', weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


def stack(block: type[nn.Module], *, depth: int, **fields: object) -> nn.Module:
    """`depth` blocks with these fields under one scan; arguments beside the states are shared."""
    scanned = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=depth,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(**fields, name='layers')
