"""Which loss trains a tokenizer?"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from star_jax.tokenizers.residual_vq import Quantised

# [B, H, W, 3] pairs in [-1, 1] -> [B] perceptual distances.
Perceptual = Callable[[jax.Array, jax.Array], jax.Array]


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
    """

    l1: float = 1.0
    l2: float = 1.0
    edges: float = 1.0
    perceptual: float = 0.0
    quantiser: float = 1.0
    commitment: float = 0.25
    scales: Literal['mean', 'sum'] = 'mean'

    def __post_init__(self) -> None:
        weights = (self.l1, self.l2, self.edges, self.perceptual, self.quantiser, self.commitment)
        if min(weights) < 0:
            raise ValueError(f'weights of losses must not be negative: {self}')

    def reconstruction(
        self, images: jax.Array, decoded: jax.Array, perceptual: Perceptual | None = None
    ) -> dict[str, jax.Array]:
        """The weighted losses of `decoded` (not clamped) against `images` in [-1, 1]."""
        error = decoded - images
        parts = {
            'l1': self.l1 * jnp.abs(error).mean(),
            'l2': self.l2 * jnp.square(error).mean(),
            'edges': self.edges * (_slope(error, 1) + _slope(error, 2)),
        }
        if perceptual is not None:
            parts['perceptual'] = self.perceptual * perceptual(images, decoded).mean()
        return parts

    def quantisation(self, f_BHWC: jax.Array, quantised: Quantised) -> jax.Array:
        """The weighted loss of the quantiser."""
        losses_K = quantised.losses(f_BHWC, self.commitment)
        return self.quantiser * (losses_K.mean() if self.scales == 'mean' else losses_K.sum())


class BitEntropies(NamedTuple):
    """How decided and how varied bits are, in nats (Infinity specification 3.6).

    Attributes:
        per_sample: entropy of the bits of one vector, averaged over the vectors; small where every
            bit is decided.
        codebook: entropy of the averaged bits; large where all codes are used.
        probs_K2: averaged probabilities of the negative and the positive code of every bit.
    """

    per_sample: jax.Array
    codebook: jax.Array
    probs_K2: jax.Array


def bit_entropies(z: jax.Array, inverse_temperature: float = 100.0) -> BitEntropies:
    """Entropies of the soft bits of vectors [..., K] of length 1."""
    sharpness = -4 * inverse_temperature / math.sqrt(z.shape[-1])
    negative = jax.nn.sigmoid(sharpness * z.astype(jnp.float32)).reshape(-1, z.shape[-1])
    probs_NK2 = jnp.stack([negative, 1 - negative], axis=-1)
    probs_K2 = probs_NK2.mean(0)
    return BitEntropies(_entropy(probs_NK2).sum(-1).mean(), _entropy(probs_K2).sum(), probs_K2)


def _entropy(probs: jax.Array) -> jax.Array:
    """Of distributions over the last axis."""
    return -(probs * jnp.log(probs + 1e-8)).sum(-1)


def psnr(images: jax.Array, decoded: jax.Array) -> jax.Array:
    """[B] peak signal-to-noise ratios in dB of images in [-1, 1]."""
    error = (decoded.clip(-1, 1) - images) / 2
    return -10 * jnp.log10(jnp.square(error).mean((1, 2, 3)) + 1e-10)


def _slope(error: jax.Array, axis: int) -> jax.Array:
    return jnp.abs(jnp.diff(error, axis=axis)).mean()
