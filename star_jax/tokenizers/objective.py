"""What makes a tokenizer good while it trains?"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from star_jax.core import resize
from star_jax.tokenizers.residual_vq import Quantised

# [B, H, W, 3] pairs in [-1, 1] -> [B] perceptual distances.
Perceptual = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the reconstruction losses and of the quantiser's (specification 1.8).

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
        self, images: jax.Array, painted: jax.Array, perceptual: Perceptual | None = None
    ) -> dict[str, jax.Array]:
        """The weighted losses of `painted` (not clamped) against `images` in [-1, 1]."""
        error = painted - images
        parts = {
            'l1': self.l1 * jnp.abs(error).mean(),
            'l2': self.l2 * jnp.square(error).mean(),
            'edges': self.edges * (_slope(error, 1) + _slope(error, 2)),
        }
        if perceptual is not None:
            parts['perceptual'] = self.perceptual * perceptual(images, painted).mean()
        return parts

    def quantisation(self, f_BHWC: jax.Array, quantised: Quantised) -> jax.Array:
        """The weighted loss of the quantiser."""
        losses_K = quantised.losses(f_BHWC, self.commitment)
        return self.quantiser * (losses_K.mean() if self.scales == 'mean' else losses_K.sum())


def psnr(images: jax.Array, painted: jax.Array) -> jax.Array:
    """[B] peak signal-to-noise ratios in dB of images in [-1, 1]."""
    error = (painted.clip(-1, 1) - images) / 2
    return -10 * jnp.log10(jnp.square(error).mean((1, 2, 3)) + 1e-10)


def usage(quantised: Quantised, size: int, weight_B: jax.Array | float = 1.0) -> jax.Array:
    """[K, V] float32: how often each scale chose each code; images may have weights."""

    def count(codes_Bhw: jax.Array) -> jax.Array:
        weight_B11 = jnp.asarray(weight_B, jnp.float32).reshape(-1, 1, 1)
        weights = jnp.broadcast_to(weight_B11, codes_Bhw.shape)
        return jnp.bincount(codes_Bhw.reshape(-1), weights.reshape(-1), length=size)

    return jnp.stack([count(codes) for codes in quantised.codes])


def perplexity(usage_KV: jax.Array) -> jax.Array:
    """[K]: the exponential of each scale's code entropy; V where all codes are equally likely."""
    probs = usage_KV / jnp.maximum(usage_KV.sum(-1, keepdims=True), 1)
    return jnp.exp(-jnp.sum(probs * jnp.log(probs + 1e-10), -1))


def peel(f_BHWC: jax.Array, grids: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """Per scale [B h w, C]: what a perfect quantiser would be asked for."""
    rest, peeled = f_BHWC, []
    for height, width in grids:
        coarse = resize.area(rest, height, width)
        peeled.append(coarse.reshape(-1, coarse.shape[-1]))
        rest = rest - resize.bicubic(coarse, *grids[-1])
    return peeled


def start_codebook(
    key: jax.Array, f_BHWC: jax.Array, grids: tuple[tuple[int, int], ...], size: int
) -> jax.Array:
    """[size, C]: k-means centres of what the scales of a batch of features would have to say.

    Every scale has equal weight, however few its tokens.
    """
    peeled = peel(f_BHWC, grids)
    share = -(-8 * size // len(peeled))
    keys = jax.random.split(key, len(peeled) + 1)
    chosen = [_pick(k, vectors, share) for k, vectors in zip(keys[1:], peeled, strict=True)]
    vectors_NC = jnp.concatenate(chosen)
    centres = vectors_NC[jax.random.permutation(keys[0], len(vectors_NC))[:size]]

    def refine(centres: jax.Array, _: None) -> tuple[jax.Array, None]:
        products = jnp.matmul(vectors_NC, centres.T, precision='highest')
        nearest = (jnp.square(centres).sum(-1) - 2 * products).argmin(-1)
        sums = jax.ops.segment_sum(vectors_NC, nearest, size)
        counts = jax.ops.segment_sum(jnp.ones(len(vectors_NC)), nearest, size)[:, None]
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centres), None

    return jax.lax.scan(refine, centres, None, length=10)[0]


def restart_dead(
    key: jax.Array, usage_V: jax.Array, quantised: Quantised, codebook_VC: jax.Array
) -> jax.Array:
    """Codes that nothing chose move to vectors that were asked for, every scale equally often."""
    keys = jax.random.split(key, len(quantised.targets) + 1)
    size = len(codebook_VC)
    vectors = [target.reshape(-1, target.shape[-1]) for target in quantised.targets]
    offered = jnp.stack([_pick(k, v, size) for k, v in zip(keys[1:], vectors, strict=True)])
    scale = jax.random.randint(keys[0], (size,), 0, len(offered))
    fresh = offered[scale, jnp.arange(size)]
    return jnp.where((usage_V > 0)[:, None], codebook_VC, fresh)


def _pick(key: jax.Array, vectors_NC: jax.Array, count: int) -> jax.Array:
    return vectors_NC[jax.random.randint(key, (count,), 0, len(vectors_NC))]


def _slope(error: jax.Array, axis: int) -> jax.Array:
    return jnp.abs(jnp.diff(error, axis=axis)).mean()
