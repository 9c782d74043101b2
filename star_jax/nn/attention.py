"""How are queries, keys and values projected, normalised and rotated for attention?

The modules here hold the projections; a part passed in, `attend`, is the kernel that computes
attention from them. Keys and values leave a layer as the cache holds them: after rotation and
normalisation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import positions
from star_jax.core.cache import KV
from star_jax.core.visibility import Visibility
from star_jax.nn import layers
from star_jax.nn.kernels import Dense
from star_jax.nn.sharded_attention import ShardedAttention
from star_jax.parallel.rules import ActivationSharding
from star_jax.protocols import Kernel

MAX_LOG_SCALE = float(np.log(100))  # learned score scales stop here (STAR specification 3.3)


class Cosine(nn.Module):
    """Queries and keys of unit length, and a learned scale per head that starts at 4.

    Attributes:
        heads: number of heads.
    """

    heads: int

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.constant(np.log(4)), ('heads',))
        self.log_scale = self.param('log_scale', init, (self.heads,))

    def queries(self, q_BLNH: jax.Array) -> jax.Array:
        scale_N1 = jnp.exp(jnp.minimum(self.log_scale, MAX_LOG_SCALE))[:, None]
        return layers.unit(q_BLNH) * scale_N1

    def keys(self, k_BMNH: jax.Array) -> jax.Array:
        return layers.unit(k_BMNH)


class Scaled(nn.Module):
    """Plain dot products times a constant.

    Attributes:
        factor: the constant.
    """

    factor: float

    def queries(self, q_BLNH: jax.Array) -> jax.Array:
        return q_BLNH * self.factor

    def keys(self, k_BMNH: jax.Array) -> jax.Array:
        return k_BMNH


Function = Callable[[jax.Array], jax.Array]


def rotate_first(rotate: Function, scale: Function, x_BLNH: jax.Array) -> jax.Array:
    """Queries or keys rotated, then normalised and scaled, as in STAR."""
    return scale(rotate(x_BLNH))


def rotate_last(rotate: Function, scale: Function, x_BLNH: jax.Array) -> jax.Array:
    """Queries or keys normalised and scaled, then rotated.

    It differs from the other order where a rotation changes lengths.
    """
    return rotate(scale(x_BLNH))


class SelfAttention(nn.Module):
    """Attention to earlier rows and to those of the same step.

    Attributes:
        width: channels of a row.
        heads: query heads.
        scores: makes the part that normalises and scales queries and keys.
        kernel_init: initializer of the projections to queries, keys and values.
        out_init: initializer of the output projection.
        attend: the kernel.
        sharding: how the arrays are split over devices.
        kv_heads: key/value heads, a divisor of `heads`, neighbours among which share one; 0: as
            many as `heads`.
        biases: which of q, k, v and proj have a bias.
        order: `rotate_first` or `rotate_last`.
    """

    width: int
    heads: int
    scores: Callable[..., nn.Module]
    kernel_init: layers.Initializer
    out_init: layers.Initializer
    attend: Kernel = Dense()
    sharding: ActivationSharding = ActivationSharding()
    kv_heads: int = 0
    biases: tuple[str, ...] = ('q', 'v', 'proj')
    order: Callable[[Function, Function, jax.Array], jax.Array] = rotate_first

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        rotation: jax.Array | None,
        past: tuple[KV, ...],
        visibility: Visibility,
    ) -> tuple[jax.Array, KV]:
        """Attends from rows [B, L, D] to the past and to the rows themselves.

        Returns:
            The output of attention, [B, L, D], and the keys and values of the rows for the cache.
        """
        dtype, shape = x_BLD.dtype, (self.heads, self.width // self.heads)
        q_BLNH, k_BLKH, v_BLKH = (
            layers.Bias(x.shape[2:], ('heads', None), name=f'{name}_bias')(x)
            if name in self.biases
            else x
            for name, x in zip('qkv', self._project(x_BLD), strict=True)
        )

        def rotate(x_BLNH: jax.Array) -> jax.Array:
            return x_BLNH if rotation is None else positions.rotate(x_BLNH, rotation)

        compare = self.scores(name='compare')
        k_BLKH = self.order(rotate, compare.keys, k_BLKH).astype(dtype)
        q_BLNH = self.order(rotate, compare.queries, q_BLNH).astype(dtype)
        new = KV.from_rows(k_BLKH, v_BLKH)
        y_BLNH = ShardedAttention(self.attend, self.sharding)(q_BLNH, past, new, visibility)
        gather = OutputProjection(
            self.width, shape, self.out_init, 'proj' in self.biases, name='proj'
        )
        return gather(y_BLNH), new

    def _project(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, H], keys and values [B, L, K, H]."""
        width, inner = self.width, self.width // self.heads
        axes, init = ('embed', None, 'heads', None), self.kernel_init
        # Split after the product: with S first, XLA transposes the whole kernel at every call.
        if self.kv_heads in (0, self.heads):
            shape = (width, 3, self.heads, inner)
            qkv = layers.Einsum('BLD,DSNH->BLSNH', shape, axes, init, name='qkv')
            return tuple(jnp.unstack(qkv(x_BLD), axis=2))
        queries, shape = (width, self.heads, inner), (width, 2, self.kv_heads, inner)
        q = layers.Einsum('BLD,DNH->BLNH', queries, (axes[0], *axes[2:]), init, name='q')
        kv = layers.Einsum('BLD,DSKH->BLSKH', shape, axes, init, name='kv')
        return q(x_BLD), *jnp.unstack(kv(x_BLD), axis=2)


class CrossAttention(nn.Module):
    """Attention to the text. Keys and values do not change from step to step: `text_kv`, once.

    Attributes:
        width: channels of a row.
        heads: heads of queries, keys and values.
        text_width: channels of a text token.
        scores: makes the part that normalises and scales queries and keys.
        kernel_init: initializer of the projections.
        out_init: initializer of the output projection (None: `kernel_init`).
        released: reproduces the published code, which adds the output of the first row of the
            batch to every row (STAR specification 3.4).
        attend: the kernel.
        groups: equal parts of a batch, each of which has a first row in that sense.
        sharding: how the arrays are split over devices.
    """

    width: int
    heads: int
    text_width: int
    scores: Callable[..., nn.Module]
    kernel_init: layers.Initializer
    released: bool = False
    attend: Kernel = Dense()
    groups: int = 1
    sharding: ActivationSharding = ActivationSharding()
    out_init: layers.Initializer | None = None

    def setup(self) -> None:
        shape = (self.heads, self.width // self.heads)
        axes = ('embed', 'heads', None)
        self.query = layers.Einsum('BLD,DNH->BLNH', (self.width, *shape), axes, self.kernel_init)
        self.text = layers.Einsum(
            'BTE,ESNH->BTSNH',
            (self.text_width, 2, *shape),
            ('embed', None, 'heads', None),
            self.kernel_init,
        )
        self.q_bias = layers.Bias(shape, ('heads', None))
        self.v_bias = layers.Bias(shape, ('heads', None))
        self.compare = self.scores()
        self.proj = OutputProjection(self.width, shape, self.out_init or self.kernel_init)

    def text_kv(self, states_BTE: jax.Array) -> KV:
        """The keys and values of text states [B, T, E]."""
        k_BTNH, v_BTNH = jnp.unstack(self.text(states_BTE), axis=2)
        k_BTNH = self.compare.keys(k_BTNH).astype(states_BTE.dtype)
        return KV.from_rows(k_BTNH, self.v_bias(v_BTNH))

    def __call__(self, x_BLD: jax.Array, text_kv: KV, length_B: jax.Array) -> jax.Array:
        """Attends from rows [B, L, D] to the first `length_B` text tokens of each image."""
        dtype, batch = x_BLD.dtype, len(x_BLD)
        if self.released:
            x_BLD, length_B, text_kv = jax.tree.map(self._leaders, (x_BLD, length_B, text_kv))
        q_BLNH = self.compare.queries(self.q_bias(self.query(x_BLD))).astype(dtype)
        attend = ShardedAttention(self.attend, self.sharding)
        y_BLNH = attend(q_BLNH, (), text_kv, Visibility(end_B=length_B))
        y_BLD = self.proj(y_BLNH)
        return jnp.repeat(y_BLD, batch // len(y_BLD), axis=0)

    def _leaders(self, x: jax.Array) -> jax.Array:
        """The first row of each group."""
        return x.reshape(self.groups, -1, *x.shape[1:])[:, 0]


class OutputProjection(nn.Module):
    """The output projection, [B, L, N, H] -> [B, L, D].

    Attributes:
        width: channels D of the output.
        heads_shape: heads N and their width H.
        kernel_init: initializer of the kernel.
        bias: whether it has a bias.
    """

    width: int
    heads_shape: tuple[int, int]
    kernel_init: layers.Initializer
    bias: bool = True
    axes = ('heads', None, 'embed')
    out = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the kernel."""
        return *self.heads_shape, self.width

    @nn.compact
    def __call__(self, y_BLNH: jax.Array) -> jax.Array:
        def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
            return rows @ kernel.reshape(-1, self.width).astype(rows.dtype)

        # One axis is summed: of two, XLA may choose an order in which it transposes the kernel.
        y_BLD = layers.multiply(self, product, y_BLNH.reshape(*y_BLNH.shape[:2], -1), summed=2)
        if not self.bias:
            return y_BLD
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
        return y_BLD + self.param('bias', bias_init, (self.width,)).astype(y_BLD.dtype)
