"""Which codes may be sampled, given their logits?

First top-k (all ties at the k-th logit stay), then top-p inside what is left. A filter sets logits
to -inf and never reorders them. Families differ at ties: a `NucleusFilter` keeps all codes that are
as probable as the rarest of the nucleus (STAR specification 8), a `BitFilter` ranks equal codes by
their number (Infinity specification 7), a `SortedFilter` leaves out codes after those whose mass
is large enough (LlamaGen specification 3.2).
"""

import flax.struct
import jax
import jax.numpy as jnp

LOWEST_TEMPERATURE = 1e-5  # the least temperature that a `SortedFilter` divides by


@flax.struct.dataclass
class NucleusFilter:
    """Temperature, then top-k, then top-p.

    Attributes:
        top_k: how many codes stay, static (0, or at least as many as there are codes: off).
        top_p: the mass that stays, a traced number in [0, 1]; None compiles without this filter.
    """

    top_k: int = flax.struct.field(pytree_node=False, default=0)
    top_p: float | jax.Array | None = None

    def __call__(self, logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
        """Logits [..., V] -> float32 logits over `temperature`, -inf where a code is removed."""
        logits = logits.astype(jnp.float32) / temperature
        size = logits.shape[-1]
        k = min(self.top_k, size) or size
        if k == size and self.top_p is None:
            return logits
        if self.top_p is None:
            return jnp.where(logits >= kth_largest(logits, k), logits, -jnp.inf)
        highest = jax.lax.top_k(logits, k)[0]  # sorting k values, not the whole vocabulary
        # The smallest by `min`: a slice of a slice makes XLA sort the whole vocabulary on a CPU.
        logits = jnp.where(logits >= highest.min(-1, keepdims=True), logits, -jnp.inf)
        return jnp.where(logits >= _nucleus(highest, logits, self.top_p), logits, -jnp.inf)


@flax.struct.dataclass
class BitFilter:
    """Temperature, then top-k, then top-p, for distributions over a few values such as bits.

    Attributes:
        top_k: how many values stay, static (0, or at least as many as there are values: off).
        top_p: the mass that stays, a traced number in [0, 1]; None compiles without this filter.
    """

    top_k: int = flax.struct.field(pytree_node=False, default=0)
    top_p: float | jax.Array | None = None

    def __call__(self, logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
        """Logits [..., V] -> float32 logits over `temperature`, -inf where a value is removed.

        Time and memory grow with the square of V.
        """
        logits = NucleusFilter(top_k=self.top_k)(logits, temperature)
        if self.top_p is None:
            return logits
        probs = jax.nn.softmax(logits)
        values = jnp.arange(logits.shape[-1])
        one, other = logits[..., :, None], logits[..., None, :]
        earlier = (other < one) | ((other == one) & (values <= values[:, None]))
        # The mass of all values up to each one, from the rarest on; the last of them always stays.
        mass = jnp.sum(probs[..., None, :], axis=-1, where=earlier)
        last = earlier.sum(-1) == logits.shape[-1]
        return jnp.where((mass > 1 - self.top_p) | last, logits, -jnp.inf)


@flax.struct.dataclass
class SortedFilter:
    """Temperature, then top-k, then the most probable codes in a sorted order.

    A code stays while the codes before it hold at most `top_p`. Codes with
    equal logits are sorted by their numbers (LlamaGen specification 3.2).

    Attributes:
        top_k: how many codes stay, static (0, or at least as many as there are codes: off); all
            codes that are equal to the last of them stay.
        top_p: the mass that stays, a traced number in [0, 1); None compiles without this filter.
    """

    top_k: int = flax.struct.field(pytree_node=False, default=0)
    top_p: float | jax.Array | None = None

    def __call__(self, logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
        """Logits [..., V] -> float32 logits at `temperature`, or at 1e-5 where that is lower."""
        temperature = jnp.broadcast_to(jnp.maximum(temperature, LOWEST_TEMPERATURE), logits.shape)
        # Behind a barrier it divides; otherwise XLA multiplies by its reciprocal, rounded twice.
        divisor = jax.lax.optimization_barrier(temperature.astype(jnp.float32))
        logits = NucleusFilter(top_k=self.top_k)(logits.astype(jnp.float32) / divisor)
        if self.top_p is None:
            return logits
        size = logits.shape[-1]
        highest = jax.lax.top_k(logits, min(self.top_k, size) or size)[0]
        probs = jnp.exp(highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        mass = jnp.cumsum(probs, axis=-1)
        stays = jnp.pad(mass[..., :-1], [(0, 0)] * (mass.ndim - 1) + [(1, 0)]) <= self.top_p
        least = jnp.where(stays, highest, jnp.inf).min(-1, keepdims=True)
        # The number of codes that stay among those equal to the last one; the others follow on.
        same = (stays & (highest == least)).sum(-1, keepdims=True)
        beyond = jnp.floor((self.top_p - mass[..., -1:]) / probs[..., -1:]) + 1
        same += jnp.where(stays[..., -1:], jnp.maximum(beyond, 0), 0).astype(same.dtype)
        tied = logits == least
        first = tied & (jnp.cumsum(tied, axis=-1) <= same)
        return jnp.where((logits > least) | first, logits, -jnp.inf)


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """[..., 1]: the k-th largest of float32 numbers [..., V], exactly and without sorting.

    Its 32 bits are found one by one, by counting the numbers that are at least as large; of 16,384
    numbers on a CPU in a quarter of the time that sorting the largest 2,000 takes.
    """
    sign = jnp.uint32(1 << 31)

    def flipped(bits: jax.Array) -> jax.Array:
        """The bits, changed so that as whole numbers they are ordered as the floats are."""
        return jnp.where(bits >= sign, ~bits, bits ^ sign)

    bits_V = flipped(jax.lax.bitcast_convert_type(x, jnp.uint32))

    def next_bit(place: jax.Array, found: jax.Array) -> jax.Array:
        larger = found | (sign >> place.astype(jnp.uint32))
        enough = (bits_V >= larger).sum(-1, keepdims=True, dtype=jnp.int32) >= k
        return jnp.where(enough, larger, found)

    found = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros_like(bits_V[..., :1]))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def _nucleus(highest: jax.Array, logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """[..., 1]: the smallest logit of the nucleus.

    A code stays while it and the less probable codes hold more than 1 - `top_p`; the most probable
    code always stays.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probs = jnp.exp(highest - total)
    # Summed from the smallest on: the mass above a rare code rounds to 1, and the code would go.
    below = jax.lax.cumsum(probs, axis=probs.ndim - 1, reverse=True)
    ties = jnp.isfinite(logits).sum(-1, keepdims=True) - highest.shape[-1]  # beyond the k-th
    stays = (below + ties * probs[..., -1:] > 1 - top_p).at[..., 0].set(True)
    return jnp.where(stays, highest, jnp.inf).min(-1, keepdims=True)
