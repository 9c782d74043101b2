"""Which losses let a tokenizer and a discriminator compete? (LlamaGen specification 1.6)

Logits are large where the discriminator takes an image for a real one. The released
"non-saturating" losses pass logits and labels in swapped order (item 10 of LlamaGen specification
7): they are linear in the logits, and the discriminator learns nothing from decoded images.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import MAX_STEPS, check_not_negative, check_sizes
from star_jax.errors import UserError

GeneratorLoss = Literal['hinge', 'non_saturating', 'non_saturating_released']
DiscriminatorLoss = Literal['hinge', 'vanilla', 'non_saturating', 'non_saturating_released']

SWAPPED = math.log1p(math.exp(-1))  # log(1 + 1 / e), a constant of the swapped losses
ADAPTIVE_EPSILON = 1e-4  # added to the norm of the adversarial gradient


def _hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def _vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def _swapped(real: jax.Array, fake: jax.Array) -> jax.Array:
    return 0.5 * ((1 - real + SWAPPED).mean() + math.log(2))


OF_GENERATOR: Mapping[GeneratorLoss, Callable[[jax.Array], jax.Array]] = {
    'hinge': lambda fake: -fake.mean(),
    'non_saturating': lambda fake: jax.nn.softplus(-fake).mean(),
    'non_saturating_released': lambda fake: (1 - fake + SWAPPED).mean(),
}
OF_DISCRIMINATOR: Mapping[DiscriminatorLoss, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'hinge': _hinge,
    'vanilla': _vanilla,
    'non_saturating': _vanilla,  # the intended form of the released loss
    'non_saturating_released': _swapped,
}


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array, largest: float) -> jax.Array:
    """The factor that makes both gradients equally long, at most `largest`.

    Args:
        reconstruction: gradient of the weighted reconstruction losses at the decoder's last kernel.
        adversarial: gradient of the adversarial loss there.
        largest: upper limit.
    """
    ratio = _length(reconstruction) / (_length(adversarial) + ADAPTIVE_EPSILON)
    return jax.lax.stop_gradient(ratio.clip(0, largest))


def accuracy(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The share of logits with the right sign; 0.5 if it guesses."""
    return 0.5 * ((real > 0).mean() + (fake < 0).mean())


class PenaltyInputs(NamedTuple):
    """What a penalty on a discriminator is computed from.

    Attributes:
        logits_of: the discriminator, images [B, H, W, 3] -> logits.
        images: real images.
        real: logits of real images.
        fake: logits of decoded images.
        means_2: moving averages of both logits, for a penalty that has them.
        step: training step, counted from 0.
    """

    logits_of: Callable[[jax.Array], jax.Array]
    images: jax.Array
    real: jax.Array
    fake: jax.Array
    means_2: jax.Array | None
    step: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class R1:
    """A penalty on the discriminator's gradient at real images (Mescheder et al. 2018).

    Attributes:
        weight: weight of half the mean squared length of the gradient.
        every: steps between two penalties, each of which counts as often.
    """

    weight: float = 10.0
    every: int = 16

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(weight=self.weight)
        check_sizes(MAX_STEPS, every=self.every)

    def start(self) -> None:
        """It has no moving averages."""

    def penalty(self, batch: PenaltyInputs) -> jax.Array:
        """The weighted penalty of a step; 0 between two penalties."""

        def due() -> jax.Array:
            gradient = jax.grad(lambda x: batch.logits_of(x).sum())(batch.images)
            squares_B = jnp.square(gradient).sum((1, 2, 3))
            return (0.5 * self.weight * self.every) * squares_B.mean()

        kind = jax.eval_shape(due)
        return jax.lax.cond(batch.step % self.every == 0, due, lambda: jnp.zeros((), kind.dtype))

    def update(self, batch: PenaltyInputs) -> None:
        """It has no moving averages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeCam:
    """A penalty on logits far from the earlier ones of the other kind (Tseng et al. 2021).

    Attributes:
        weight: weight of the penalty.
        decay: decay of the moving averages of the logits.
    """

    weight: float = 0.001
    decay: float = 0.999

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(weight=self.weight)
        if not 0 <= self.decay < 1:
            raise UserError(f'decay must lie in [0, 1), not {self.decay}')

    def start(self) -> jax.Array:
        """The moving averages [2] of the logits of real and of decoded images before step 0."""
        return jnp.zeros(2)

    def penalty(self, batch: PenaltyInputs) -> jax.Array:
        """The weighted penalty of a step."""
        high = jnp.square(jax.nn.relu(batch.real - batch.means_2[1])).mean()
        low = jnp.square(jax.nn.relu(batch.means_2[0] - batch.fake)).mean()
        return self.weight * (high + low)

    def update(self, batch: PenaltyInputs) -> jax.Array:
        """The moving averages [2] after a step."""
        new_2 = jnp.stack([batch.real.mean(), batch.fake.mean()]).astype(batch.means_2.dtype)
        return self.decay * batch.means_2 + (1 - self.decay) * new_2


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum())
