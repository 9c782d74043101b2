"""How is attention computed on an NVIDIA GPU?

cuDNN's fused kernel never writes scores to memory. It is slow with a mask, so it is called in ways
that need none: for a scale and the keys below its bound, for a plain causal order, and with a
number of keys per image.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from star_jax.core.cache import KV, join
from star_jax.core.visibility import ALL, TracedVisibility, Visibility
from star_jax.nn.kernels import ByScale, Chunked, Dense
from star_jax.protocols import Kernel

HALVES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Flash:
    """cuDNN over all keys, over a causal order, or scale by scale; in half precision alone.

    Attributes:
        otherwise: the kernel for float32, a mask, and traced bounds that differ between rows.
        implementation: 'xla' computes the same anywhere, for tests.
    """

    otherwise: Kernel = ByScale(Chunked(), Chunked())
    implementation: Literal['cudnn', 'xla'] = 'cudnn'

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        if not self.fuses(q_BLNH, visibility):
            return self.otherwise(q_BLNH, past, new, visibility)
        kv, visibility = join(past, new, visibility)
        bounds, end_B = visibility.bounds, visibility.end_B
        if isinstance(bounds, TracedVisibility):
            end_B = jnp.broadcast_to(bounds.bound_L, len(q_BLNH)) if end_B is None else end_B
            end_B = jnp.minimum(end_B, bounds.bound_L)
            visibility = visibility.replace(bounds=None, end_B=end_B)
        elif bounds is not None and bounds.is_causal(kv.rows) and end_B is None:
            return self._causal(q_BLNH, kv, visibility.first_B)
        return ByScale(self._fused, Dense())(q_BLNH, (), kv, visibility)

    def fuses(self, q_BLNH: jax.Array, visibility: Visibility) -> bool:
        """Whether the fused kernel computes this, not `otherwise`."""
        bounds = visibility.bounds
        several = isinstance(bounds, TracedVisibility) and len(bounds.bound_L) > 1
        return q_BLNH.dtype in HALVES and visibility.mask is None and not several

    def _fused(
        self, q_BLNH: jax.Array, past: tuple[()], new: KV, visibility: Visibility
    ) -> jax.Array:
        """Every row attends to the same keys of its image."""
        k_BMKH, v_BMKH = new.to_rows()
        end_B = visibility.end_B
        if visibility.first_B is not None:
            end_B = jnp.full(len(q_BLNH), new.rows, jnp.int32) if end_B is None else end_B
            first_B = jnp.minimum(visibility.first_B, end_B - 1)
            k_BMKH, v_BMKH = _roll(k_BMKH, first_B), _roll(v_BMKH, first_B)
            end_B = end_B - first_B
        if new.rows % 2 and end_B is None:
            end_B = jnp.full(len(q_BLNH), new.rows, jnp.int32)
        return self._attend(q_BLNH, k_BMKH, v_BMKH, key_value_seq_lengths=end_B)

    def _causal(self, q_BLNH: jax.Array, kv: KV, first_B: jax.Array | None) -> jax.Array:
        """Row k attends to the first k + 1 keys.

        Where an image hides its first keys, rows and keys are moved to the front by as many, and
        the hidden rows, which attend to themselves alone, get their own values.
        """
        k_BMKH, v_BMKH = kv.to_rows()
        if first_B is None:
            return self._attend(q_BLNH, k_BMKH, v_BMKH, is_causal=True)
        rows, heads = q_BLNH.shape[1:3]
        lengths_B = rows - first_B
        moved = self._attend(
            *(_roll(x, first_B) for x in (q_BLNH, k_BMKH, v_BMKH)),
            is_causal=True,
            query_seq_lengths=lengths_B,
            key_value_seq_lengths=lengths_B,
        )
        hidden_BL11 = (jnp.arange(rows)[None] < first_B[:, None])[:, :, None, None]
        values_BLNH = jnp.repeat(v_BMKH, heads // kv.heads, axis=2)
        return jnp.where(hidden_BL11, values_BLNH, _roll(moved, -first_B))

    def _attend(
        self, q_BLNH: jax.Array, k_BMKH: jax.Array, v_BMKH: jax.Array, **options: Any
    ) -> jax.Array:
        """The kernel, with even numbers of rows and keys: JAX refuses the gradient of others.

        Options must hide an added key.
        """
        padded = map(_even, (q_BLNH, k_BMKH, v_BMKH))
        attended_BLNH = jax.nn.dot_product_attention(
            *padded, scale=1.0, implementation=self.implementation, **options
        )
        return attended_BLNH[:, : q_BLNH.shape[1]]


def _even(x_BLNH: jax.Array) -> jax.Array:
    """The same, with a row of zeros if the number of rows is odd."""
    return jnp.pad(x_BLNH, ((0, 0), (0, x_BLNH.shape[1] % 2), (0, 0), (0, 0)))


def _roll(x_BLNH: jax.Array, first_B: jax.Array) -> jax.Array:
    """The rows of each image from its number `first_B` on, and those before it behind them."""
    rows = x_BLNH.shape[1]
    index_BL = (jnp.arange(rows)[None] + first_B[:, None]) % rows
    return jnp.take_along_axis(x_BLNH, index_BL[:, :, None, None], axis=1)
