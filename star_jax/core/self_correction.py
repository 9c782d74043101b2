"""Which bits does training flip, so that later scales learn to repair mistakes?

Bitwise self-correction (Infinity specification 4): the inputs of a scale come from bits of which
some were flipped, and the labels of that scale are the signs of what the flipped bits left over.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.argument_types import check_types
from star_jax.errors import UserError

PERCENT = (np.arange(101) * 0.01).astype(np.float32)  # rounded from float64, as in the original


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfCorrection:
    """How often bits are flipped; strength 0 is plain teacher forcing.

    Attributes:
        strength: the largest probability of a flip; each scale of a batch has a whole percentage,
            chosen uniformly from 0 to this one (published: 0.3).
        scales: how many scales, from the first on, have flips (published: 13).
        requant: later scales are quantised from what the flipped bits leave over; otherwise nothing
            is flipped, as in the original.
    """

    strength: float = 0.0
    scales: int = 13
    requant: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.strength <= 1 or self.scales < 0:
            raise UserError(
                'correction needs a strength in [0, 1] and no negative number of scales, not '
                f'{self.strength:g} and {self.scales}'
            )

    @property
    def active(self) -> bool:
        return self.strength > 0 and self.scales > 0 and self.requant

    @property
    def rates(self) -> int:
        """How many percentages there are, 0 included; 29 % of the original come to 28."""
        return int(100 * self.strength + 1)

    def check_bits(self) -> None:
        """Raises UserError where cached bits cannot serve, because some of them are flipped."""
        if self.active:
            raise UserError(
                f'a self-correction of strength {self.strength} flips bits, and the labels of '
                'later scales depend on the flips, so that a cache of bits cannot serve it: make '
                'one with `star-jax data cache --features`, train without a cache, or set '
                'correction.strength to 0'
            )

    def flips(self, key: jax.Array, step: int, shape: tuple[int, ...]) -> jax.Array | None:
        """Which bits of a scale are flipped, bool of this shape; None without flips.

        Args:
            key: the key of the batch.
            step: the scale.
            shape: the shape of the scale's bits.
        """
        if not self.active or step >= self.scales:
            return None
        rate_key, bit_key = jax.random.split(jax.random.fold_in(key, step))
        percent = jax.random.randint(rate_key, (), 0, self.rates)
        return flip_mask(jax.random.uniform(bit_key, shape), percent)


PLAIN = SelfCorrection()


def flip_mask(uniform: jax.Array, percent: jax.Array) -> jax.Array:
    """Which bits are flipped at a whole percentage, from uniform numbers in [0, 1)."""
    return uniform < jnp.asarray(PERCENT)[percent]
