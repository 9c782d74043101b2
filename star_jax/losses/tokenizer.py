"""Which losses train a tokenizer?

Losses of pixels and of codes; the `Objective` of a run has their weights.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import check_not_negative
from star_jax.errors import UserError
from star_jax.nn import layers

# [B, H, W, 3] pairs in [-1, 1] -> [B] perceptual distances.
Perceptual = Callable[[jax.Array, jax.Array], jax.Array]


class CodeEntropies(NamedTuple):
    """How certain and how varied codes are, in nats (LlamaGen specification 1.5).

    Attributes:
        per_sample: entropy of the soft code of one vector, averaged over the vectors.
        codebook: entropy of the averaged soft codes; large where all codes are used.
    """

    per_sample: jax.Array
    codebook: jax.Array


def code_entropies(distances: jax.Array, temperature: float = 0.01) -> CodeEntropies:
    """Entropies of the soft codes softmax(-distance / temperature).

    Args:
        distances: [..., V] squared distances of vectors from all code vectors.
        temperature: small where the soft code is close to the nearest one.
    """
    logits_NV = -distances.reshape(-1, distances.shape[-1]) / temperature
    probs_NV, log_probs_NV = jax.nn.softmax(logits_NV), jax.nn.log_softmax(logits_NV)
    probs_V = probs_NV.mean(0)
    per_sample = -(probs_NV * log_probs_NV).sum(-1).mean()
    return CodeEntropies(per_sample, -(probs_V * jnp.log(probs_V + 1e-5)).sum())


class BitEntropies(NamedTuple):
    """How certain and how varied bits are, in nats (Infinity specification 3.6).

    Attributes:
        per_sample: entropy of the bits of one vector, averaged over the vectors; small where every
            bit is certain.
        codebook: entropy of the averaged bits; large where all codes are used.
        probs_K2: averaged probabilities of the negative and the positive code of every bit.
    """

    per_sample: jax.Array
    codebook: jax.Array
    probs_K2: jax.Array


def bit_entropies(z: jax.Array, inverse_temperature: float = 100.0) -> BitEntropies:
    """Entropies of the soft bits of vectors [..., K] of length 1."""
    sharpness = -4 * inverse_temperature / math.sqrt(z.shape[-1])
    z = z.astype(layers.at_least_float32(z.dtype))
    negative = jax.nn.sigmoid(sharpness * z).reshape(-1, z.shape[-1])
    probs_NK2 = jnp.stack([negative, 1 - negative], axis=-1)
    probs_K2 = probs_NK2.mean(0)
    return BitEntropies(_entropy(probs_NK2).sum(-1).mean(), _entropy(probs_K2).sum(), probs_K2)


def _entropy(probs: jax.Array) -> jax.Array:
    """Entropies, in nats, of distributions over the last axis."""
    return -(probs * jnp.log(probs + 1e-8)).sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyOfCodes:
    """The entropy loss of tokenizers with a codebook (LlamaGen specification 1.5).

    It trains codebook and encoder of a RasterVQ, but the codebook alone of a VQ, whose residuals
    have no gradient.

    Attributes:
        weight: weight of the entropy of each vector minus that of the averaged codes.
        temperature: temperature of the soft codes.
    """

    weight: float = 0.1
    temperature: float = 0.01

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(weight=self.weight)
        if not self.temperature > 0:
            raise UserError(f'temperature must be positive, not {self.temperature}')

    def check(self, has_codebook: bool) -> None:
        """Raises UserError for tokenizers of bits."""
        if not has_codebook:
            raise UserError('EntropyOfCodes is for codebooks, not for bits: use EntropyOfBits')

    def losses(self, tokenizer: Any, quantised: Any) -> jax.Array:
        every = [
            code_entropies(tokenizer.distances(target), self.temperature)
            for target in quantised.targets
        ]
        return self.weight * jnp.stack([each.per_sample - each.codebook for each in every])


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyOfBits:
    """The entropy loss of tokenizers of bits (Infinity specification 3.6).

    Attributes:
        weight: weight of the entropy of each vector minus that of the averaged bits.
        inverse_temperature: inverse temperature of the soft bits.
        diversity: weight of the entropy of the averaged bits within the loss.
    """

    weight: float = 0.1
    inverse_temperature: float = 100.0
    diversity: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(weight=self.weight, diversity=self.diversity)
        if not self.inverse_temperature > 0:
            raise UserError(f'inverse_temperature must be positive, not {self.inverse_temperature}')

    def check(self, has_codebook: bool) -> None:
        """Raises UserError for tokenizers with a codebook."""
        if has_codebook:
            raise UserError('EntropyOfBits is for bits, not for codebooks: use EntropyOfCodes')

    def losses(self, tokenizer: Any, quantised: Any) -> jax.Array:
        every = [
            bit_entropies(layers.unit(residual), self.inverse_temperature)
            for residual in quantised.residuals
        ]
        return self.weight * jnp.stack(
            [each.per_sample - self.diversity * each.codebook for each in every]
        )


def psnr(images: jax.Array, decoded: jax.Array) -> jax.Array:
    """[B] peak signal-to-noise ratios in dB of images in [-1, 1]."""
    error = (decoded.clip(-1, 1) - images) / 2
    return -10 * jnp.log10(jnp.square(error).mean((1, 2, 3)) + 1e-10)


def slope(error: jax.Array, axis: int) -> jax.Array:
    """The mean absolute difference of neighbours along an axis."""
    return jnp.abs(jnp.diff(error, axis=axis)).mean()
