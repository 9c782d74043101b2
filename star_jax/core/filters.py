"""Which codes may a draw choose from?

STAR specification 8: first top-k (ties at the k-th logit all stay), then top-p inside what
is left. Filters mask logits with -inf and never reorder them.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Filter:
    """Temperature, then top-k, then top-p.

    `top_k` is static (0, or as many as there are codes: off); `temperature` and `top_p` are traced
    numbers, and `top_p=None` compiles without a nucleus.
    """

    top_k: int = flax.struct.field(pytree_node=False, default=0)
    top_p: float | jax.Array | None = None
    temperature: float | jax.Array = 1.0

    def __call__(self, logits: jax.Array) -> jax.Array:
        """[..., V] float32 logits with -inf where a code may not be drawn."""
        logits = logits.astype(jnp.float32) / self.temperature
        size = logits.shape[-1]
        k = min(self.top_k, size) or size
        if k == size and self.top_p is None:
            return logits
        highest = jax.lax.top_k(logits, k)[0]  # sorting k values, not the whole vocabulary
        # The smallest by `min`: a slice of a slice makes XLA sort the whole vocabulary on a CPU.
        logits = jnp.where(logits >= highest.min(-1, keepdims=True), logits, -jnp.inf)
        if self.top_p is None:
            return logits
        return jnp.where(logits >= _nucleus(highest, logits, self.top_p), logits, -jnp.inf)


def _nucleus(highest: jax.Array, logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """[..., 1]: the smallest logit of the nucleus.

    A code stays while it and the codes below it hold more than 1 - `top_p`; the largest always
    stays.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probs = jnp.exp(highest - total)
    # Summed from the smallest on: the mass above a rare code rounds to 1, and it would be lost.
    below = jax.lax.cumsum(probs, axis=probs.ndim - 1, reverse=True)
    equals = jnp.isfinite(logits).sum(-1, keepdims=True) - highest.shape[-1]  # beyond the k-th
    stays = (below + equals * probs[..., -1:] > 1 - top_p).at[..., 0].set(True)
    return jnp.where(stays, highest, jnp.inf).min(-1, keepdims=True)
