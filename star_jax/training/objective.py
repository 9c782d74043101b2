"""Which losses does a tokenizer minimise?

The weights and the parts of a run's objective; the losses are pure functions in `losses/`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import MAX_STEPS, check_not_negative
from star_jax.errors import UserError
from star_jax.losses.adversarial import R1, DiscriminatorLoss, GeneratorLoss, LeCam
from star_jax.losses.augmentation import Augmentation
from star_jax.losses.tokenizer import EntropyOfBits, EntropyOfCodes, Perceptual, slope
from star_jax.nn.discriminators import AnyDiscriminator, PatchGAN
from star_jax.protocols import TokenizerConfig
from star_jax.training.optimizer import AdamW
from star_jax.training.schedules import LearningRate

# Of a tokenizer and of its discriminator: Adam, constant, no decay (LlamaGen specification 1.7).
PUBLISHED_OPTIMIZER = AdamW(
    learning_rate=LearningRate(peak=1e-4, warmup_steps=0, end=1.0),
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    clip=1.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """A discriminator that the tokenizer learns to deceive (LlamaGen specification 1.6 and 1.7).

    Attributes:
        discriminator: the network.
        generator_loss: the loss that the tokenizer minimises: hinge, non_saturating, or the
            published loss of that name as it was released, with swapped arguments.
        discriminator_loss: the loss that the discriminator minimises; vanilla is non_saturating.
        weight: weight of the adversarial loss, and of the loss of the discriminator with its
            penalty.
        start: the first step, counted from 1, at which it counts; before it the discriminator runs
            with gradients of zero.
        adaptive: scale the adversarial loss so that its gradient at the decoder's last kernel is as
            long as that of the reconstruction losses.
        largest: upper limit of that scale.
        optimizer: optimizer of the discriminator and its schedules.
        penalty: a penalty on the discriminator, R1 or LeCam.
        augmentation: random changes of the images that the discriminator gets.
    """

    discriminator: AnyDiscriminator = PatchGAN()
    generator_loss: GeneratorLoss = 'hinge'
    discriminator_loss: DiscriminatorLoss = 'hinge'
    weight: float = 0.5
    start: int = 20_000
    adaptive: bool = False
    largest: float = 1e4
    optimizer: AdamW = PUBLISHED_OPTIMIZER
    penalty: R1 | LeCam | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(weight=self.weight, start=self.start, largest=self.largest)
        if self.start > MAX_STEPS:
            raise UserError(f'adversary.start must be at most {MAX_STEPS} steps, not {self.start}')
        if self.optimizer.accumulate > 1:
            raise UserError(
                'a discriminator has an update for every micro-batch of the tokenizer: give '
                f'adversary.optimizer.accumulate 1, not {self.optimizer.accumulate}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the reconstruction losses and of the quantiser's (STAR specification 1.8).

    Attributes:
        l1: weight of the mean absolute error of the pixels.
        l2: weight of their mean squared error.
        edges: weight of the mean absolute error of differences between neighbouring pixels.
        perceptual: weight of the LPIPS distance (0: off; needs the extra lpips).
        quantiser: weight of the quantiser's losses, those of codebook and commitment.
        commitment: weight of the commitment loss within them.
        scales: how the quantiser's losses of all scales combine: VAR takes the mean, STAR's
            modified file the sum.
        entropy: a loss of the entropies of the codes, EntropyOfCodes or EntropyOfBits.
        scale_dropout: probability that an image is decoded from its first scales alone, as many as
            chosen at random.
        adversary: a discriminator, with its losses and its optimizer.
    """

    l1: float = 1.0
    l2: float = 1.0
    edges: float = 1.0
    perceptual: float = 0.0
    quantiser: float = 1.0
    commitment: float = 0.25
    scales: Literal['mean', 'sum'] = 'mean'
    entropy: EntropyOfCodes | EntropyOfBits | None = None
    scale_dropout: float = 0.0
    adversary: Adversary | None = None

    def __post_init__(self) -> None:
        check_types(self)
        weights = ('l1', 'l2', 'edges', 'perceptual', 'quantiser', 'commitment')
        check_not_negative(**{name: getattr(self, name) for name in weights})
        if not 0 <= self.scale_dropout <= 1:
            raise UserError(f'scale_dropout is a probability, not {self.scale_dropout}')

    def check(self, model: TokenizerConfig) -> None:
        """Raises UserError if parts do not fit the codes, the scales or the image size of a
        tokenizer."""
        if self.entropy:
            self.entropy.check(model.has_codebook)
        if self.scale_dropout and len(model.schedule.grids) == 1:
            raise UserError(
                f'scale_dropout {self.scale_dropout} decodes images from their first scales, but '
                'this tokenizer has one scale: leave objective.scale_dropout out'
            )
        if self.adversary:
            self.adversary.discriminator.check(model.resolution)

    def reconstruction(
        self, images: jax.Array, decoded: jax.Array, perceptual: Perceptual | None = None
    ) -> dict[str, jax.Array]:
        """The weighted losses of `decoded` (not clamped) against `images` in [-1, 1].

        Args:
            images: [B, H, W, 3] float32.
            decoded: [B, H, W, 3] float32.
            perceptual: gives the perceptual distance of each pair; None: without it.
        """
        error = decoded - images
        parts = {
            'l1': self.l1 * jnp.abs(error).mean(),
            'l2': self.l2 * jnp.square(error).mean(),
            'edges': self.edges * (slope(error, 1) + slope(error, 2)),
        }
        if perceptual is not None:
            parts['perceptual'] = self.perceptual * perceptual(images, decoded).mean()
        return parts

    def quantisation(self, f_BHWC: jax.Array, quantised: Any) -> jax.Array:
        """The weighted loss of the quantiser, without entropies."""
        return self.quantiser * self._combined(quantised.losses(f_BHWC, self.commitment))

    def entropies(self, tokenizer: Any, quantised: Any) -> dict[str, jax.Array]:
        """The weighted loss of the entropies, if there is one."""
        if self.entropy is None:
            return {}
        return {'entropy': self._combined(self.entropy.losses(tokenizer, quantised))}

    @property
    def _combined(self) -> Callable[[jax.Array], jax.Array]:
        """[K] losses of all scales -> one."""
        return jnp.mean if self.scales == 'mean' else jnp.sum
