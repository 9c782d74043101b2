"""Who looks at whom, and how strongly?

The modules here own the projections; a part passed in, `attend`, is the door to every way of
computing what lies between them. Keys and values leave a layer as they enter the cache:
after rotation and normalisation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import positions
from star_jax.nn import layers
from star_jax.nn.attention_dispatch import Automatic
from star_jax.nn.kernels import KV, Kernel, Visibility
from star_jax.nn.sharded_attention import ShardedAttention
from star_jax.parallel.rules import ActivationSharding

MAX_LOG_SCALE = float(np.log(100))  # learned score scales stop here (STAR specification 3.3)


class Cosine(nn.Module):
    """Queries and keys of unit length, and a learned scale per head that starts at 4."""

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
    """Plain dot products times a constant."""

    factor: float

    def queries(self, q_BLNH: jax.Array) -> jax.Array:
        return q_BLNH * self.factor

    def keys(self, k_BMNH: jax.Array) -> jax.Array:
        return k_BMNH


class SelfAttention(nn.Module):
    """Attention to the rows so far. No bias on keys, as published."""

    width: int
    heads: int
    scores: Callable[..., nn.Module]
    kernel_init: layers.Initializer
    out_init: layers.Initializer
    attend: Kernel = Automatic()
    sharding: ActivationSharding = ActivationSharding()

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, rotation: jax.Array | None, past: KV | None, visibility: Visibility
    ) -> tuple[jax.Array, KV]:
        """Rows [B, L, D] -> what they gathered, and their own keys and values for the cache.

        `seen` says what they see of the past, if there is any, and behind it of themselves.
        """
        dtype, shape = x_BLD.dtype, (self.heads, self.width // self.heads)
        axes = ('embed', None, 'heads', None)
        project = layers.Einsum(
            'BLD,DSNH->BLSNH', (self.width, 3, *shape), axes, self.kernel_init, name='qkv'
        )
        # Split after the product: with S first, XLA transposes the whole kernel at every call.
        q_BLNH, k_BLNH, v_BLNH = jnp.unstack(project(x_BLD), axis=2)
        q_BLNH = layers.Bias(shape, ('heads', None), name='q_bias')(q_BLNH)
        v_BLNH = layers.Bias(shape, ('heads', None), name='v_bias')(v_BLNH)
        if rotation is not None:
            q_BLNH, k_BLNH = (positions.rotate(x, rotation) for x in (q_BLNH, k_BLNH))
        compare = self.scores(name='compare')
        new = KV(compare.keys(k_BLNH).astype(dtype), v_BLNH)
        kv = new if past is None else jax.tree.map(lambda *kv: jnp.concatenate(kv, 1), past, new)
        attend = ShardedAttention(self.attend, self.sharding)
        y_BLNH = attend(compare.queries(q_BLNH).astype(dtype), kv, visibility)
        return GatherHeads(self.width, shape, self.out_init, name='proj')(y_BLNH), new


class CrossAttention(nn.Module):
    """Attention to the text. Keys and values do not change from step to step: `text_kv`, once.

    `released` reproduces the published code, which adds the output of the first row of the batch
    to every row (STAR specification 3.4); a batch in `groups` parts has a first row in each.
    """

    width: int
    heads: int
    text_width: int
    scores: Callable[..., nn.Module]
    kernel_init: layers.Initializer
    released: bool = False
    attend: Kernel = Automatic()
    groups: int = 1
    sharding: ActivationSharding = ActivationSharding()

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
        self.proj = GatherHeads(self.width, shape, self.kernel_init)

    def text_kv(self, states_BTE: jax.Array) -> KV:
        k_BTNH, v_BTNH = jnp.unstack(self.text(states_BTE), axis=2)
        return KV(self.compare.keys(k_BTNH).astype(states_BTE.dtype), self.v_bias(v_BTNH))

    def __call__(self, x_BLD: jax.Array, text_kv: KV, mask_BT: jax.Array) -> jax.Array:
        dtype, batch = x_BLD.dtype, len(x_BLD)
        if self.released:
            x_BLD, mask_BT, text_kv = jax.tree.map(self._leaders, (x_BLD, mask_BT, text_kv))
        q_BLNH = self.compare.queries(self.q_bias(self.query(x_BLD))).astype(dtype)
        attend = ShardedAttention(self.attend, self.sharding)
        y_BLNH = attend(q_BLNH, text_kv, mask_BT[:, None, None, :] > 0)
        y_BLD = self.proj(y_BLNH)
        return jnp.repeat(y_BLD, batch // len(y_BLD), axis=0)

    def _leaders(self, x: jax.Array) -> jax.Array:
        """The first row of each group."""
        return x.reshape(self.groups, -1, *x.shape[1:])[:, 0]


class GatherHeads(nn.Module):
    """The output projection, with bias."""

    width: int
    shape: tuple[int, int]
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, y_BLNH: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(self.kernel_init, ('heads', None, 'embed'))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
        kernel = self.param('kernel', kernel_init, (*self.shape, self.width))
        bias = self.param('bias', bias_init, (self.width,))
        y_BLD = jnp.einsum('BLNH,NHD->BLD', y_BLNH, kernel.astype(y_BLNH.dtype))
        return y_BLD + bias.astype(y_BLD.dtype)
