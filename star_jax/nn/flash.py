"""How is attention computed on an NVIDIA GPU?

By cuDNN's fused kernel, which never writes scores to memory. It is slow with a mask, so it gets
what needs none: a scale and the keys that it sees, or a plain causal order.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from star_jax.core.visibility import StaticVisibility
from star_jax.nn.kernels import KV, ByScale, Chunked, Dense, Kernel, Visibility

HALVES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Flash:
    """cuDNN over everything, over a causal order, or scale by scale; in half precision alone.

    What it is not made for, float32, a traced reach or a mask, goes to `otherwise`. The
    implementation 'xla' computes the same anywhere, for tests.
    """

    otherwise: Kernel = ByScale(Chunked(), Chunked())
    implementation: Literal['cudnn', 'xla'] = 'cudnn'

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        if q_BLNH.dtype not in HALVES or not isinstance(visibility, StaticVisibility | None):
            return self.otherwise(q_BLNH, kv, visibility)
        if visibility is not None and visibility.is_causal(kv.keys.shape[1]):
            return self._fused(q_BLNH, kv, causal=True)
        return ByScale(self._fused, Dense())(q_BLNH, kv, visibility)

    def _fused(
        self, q_BLNH: jax.Array, kv: KV, visibility: None = None, causal: bool = False
    ) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BLNH, *kv, scale=1.0, is_causal=causal, implementation=self.implementation
        )
