"""What is one token?"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Sampled(NamedTuple):
    """What one step drew: the codes, and the vectors that stand for them on the canvas.

    `passes` is what each of several passes left, where a draw takes them and a trace is asked for.
    """

    codes_BL: jax.Array
    vectors_BLC: jax.Array
    passes: Any = None


@dataclasses.dataclass(frozen=True)
class Index:
    """One of `size` codes; codes_BL are int32."""

    size: int

    @property
    def num_logits(self) -> int:
        return self.size

    def nll(self, logits_BLV: jax.Array, codes_BL: jax.Array) -> jax.Array:
        """[B, L] float32 negative log-likelihood (natural logarithm) of the codes."""
        logits_BLV = logits_BLV.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, codes_BL)

    def hits(self, logits_BLV: jax.Array, codes_BL: jax.Array) -> jax.Array:
        """[B, L] float32: 1 where the most probable code is the right one."""
        return (logits_BLV.argmax(-1) == codes_BL).astype(jnp.float32)

    # Static: as a field of a draw, a method bound to a new `Index` would compile anew each call.
    @staticmethod
    def draw(keys_B: jax.Array, logits_BLV: jax.Array) -> jax.Array:
        """[B, L] int32, one key per image.

        Gumbel noise belongs to the code, so the filters' -inf never moves another code's noise.
        """
        return jax.vmap(jax.random.categorical)(keys_B, logits_BLV).astype(jnp.int32)
