"""What are text encoders built from?

Weights hold their logical axes (`parallel/` maps them to a mesh). Arithmetic follows the dtype of
the parameters; norms and softmax are float32. Suffixes: B batch, T tokens, E width, N heads,
H head width, F mlp width, K = 3 for query, key and value.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

# The towers are frozen and their features are cached: a rounding of the accelerator's cheaper
# float32 products would be paid in every later run.
PRECISION = jax.lax.Precision.HIGHEST


class Linear(nn.Module):
    """`einsum(equation, x, kernel) + bias`; the bias has the kernel's last `bias_axes` axes."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias_axes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        kernel = self.param('kernel', _partitioned(init, self.axes), self.shape)
        kept = slice(len(self.shape) - self.bias_axes, None)
        bias = self.param(
            'bias', _partitioned(nn.initializers.zeros, self.axes[kept]), self.shape[kept]
        )
        y = jnp.einsum(self.equation, x, kernel, precision=PRECISION)
        return y + jax.lax.expand_dims(bias, range(y.ndim - bias.ndim))


class Embedding(nn.Module):
    """A table of `rows` vectors; ids of any shape in, vectors out."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        # Rows stay whole: published vocabularies (30522 in BERT) rarely divide by a mesh.
        axes = (None, 'embed')
        init = _partitioned(nn.initializers.normal(0.02), axes)
        return self.param('table', init, (self.rows, self.width))[ids]


class LayerNorm(nn.Module):
    """Normalises the last axis in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param('scale', _partitioned(nn.initializers.ones, ('embed',)), shape)
        bias = self.param('bias', _partitioned(nn.initializers.zeros, ('embed',)), shape)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * _like(scale, wide) + _like(bias, wide)).astype(x.dtype)


def attend(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Every token looks at the real tokens of its own caption. Returns (B, T, N, H).

    The floor of float32 instead of -inf, so that a row without any real token stays finite.
    """
    scores_BNTS = jnp.einsum('BTNH,BSNH->BNTS', q_BTNH, k_BTNH, precision=PRECISION)
    scores_BNTS = scores_BNTS.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5
    keep_B11S = (mask_BT > 0)[:, None, None, :]
    weights_BNTS = jax.nn.softmax(jnp.where(keep_B11S, scores_BNTS, jnp.finfo(jnp.float32).min))
    weights_BNTS = weights_BNTS.astype(v_BTNH.dtype)
    return jnp.einsum('BNTS,BSNH->BTNH', weights_BNTS, v_BTNH, precision=PRECISION)


def masked_mean(states_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of the real tokens' states (B, E), float32, not normalised."""
    weight_BT1 = mask_BT[:, :, None].astype(jnp.float32)
    total_BE = (states_BTE.astype(jnp.float32) * weight_BT1).sum(1)
    return total_BE / jnp.maximum(weight_BT1.sum(1), 1.0)


def _partitioned(init: nn.initializers.Initializer, axes: tuple[str | None, ...]):
    return nn.with_logical_partitioning(init, axes)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector with as many axes as x, so that no ranks are promoted silently."""
    return jax.lax.expand_dims(vector, range(x.ndim - 1)).astype(x.dtype)
