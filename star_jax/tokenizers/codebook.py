"""Which vectors does the codebook of a tokenizer start with, and which are replaced?

Residual k-means finds the first codes; codes that no image uses move to vectors that images need.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from star_jax.core import resize
from star_jax.core.codes import Codes
from star_jax.tokenizers.residual_vq import Quantised


def usage(
    labels: Sequence[jax.Array], codes: Codes, weight_B: jax.Array | float = 1.0
) -> jax.Array:
    """[K, num_logits] float32: how often each scale used each value of a code.

    Args:
        labels: codes of each scale, [B, ..., *codes.shape].
        codes: the kind of codes.
        weight_B: weights of the images.
    """

    def count(values: jax.Array) -> jax.Array:
        tokens = values.shape[: values.ndim - len(codes.shape)]
        weight = jnp.asarray(weight_B, jnp.float32).reshape(-1, *[1] * (len(tokens) - 1))
        return codes.count(values, jnp.broadcast_to(weight, tokens))

    return jnp.stack([count(values) for values in labels])


def peel(f_BHWC: jax.Array, grids: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """The vectors [B h w, C] that each scale would quantise if earlier scales were exact."""
    rest, vectors = f_BHWC, []
    for height, width in grids:
        coarse = resize.area(rest, height, width)
        vectors.append(coarse.reshape(-1, coarse.shape[-1]))
        rest = rest - resize.bicubic(coarse, *grids[-1])
    return vectors


def start_codebook(
    key: jax.Array, f_BHWC: jax.Array, grids: tuple[tuple[int, int], ...], size: int
) -> jax.Array:
    """[size, C]: k-means centres of the vectors that a batch of features needs.

    Every scale has equal weight, however few its tokens.

    Args:
        key: chooses vectors and first centres.
        f_BHWC: features.
        grids: (height, width) of each scale.
        size: number of codes.
    """
    vectors_of_scales = peel(f_BHWC, grids)
    count = -(-8 * size // len(vectors_of_scales))
    keys = jax.random.split(key, len(vectors_of_scales) + 1)
    chosen = [
        _pick(k, vectors, count) for k, vectors in zip(keys[1:], vectors_of_scales, strict=True)
    ]
    vectors_NC = jnp.concatenate(chosen)
    centres = vectors_NC[jax.random.permutation(keys[0], len(vectors_NC))[:size]]

    def refine(centres: jax.Array, _: None) -> tuple[jax.Array, None]:
        products = jnp.matmul(vectors_NC, centres.T, precision='highest')
        nearest = (jnp.square(centres).sum(-1) - 2 * products).argmin(-1)
        sums = jax.ops.segment_sum(vectors_NC, nearest, size)
        counts = jax.ops.segment_sum(jnp.ones(len(vectors_NC)), nearest, size)[:, None]
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centres), None

    return jax.lax.scan(refine, centres, None, length=10)[0]


def restart_unused(
    key: jax.Array, usage_V: jax.Array, quantised: Quantised, codebook_VC: jax.Array
) -> jax.Array:
    """The codebook with its unused codes replaced by target vectors, equally often of each scale.

    Args:
        key: chooses scales and vectors.
        usage_V: how often each code was used.
        quantised: a batch of quantised features.
        codebook_VC: the codebook.
    """
    keys = jax.random.split(key, len(quantised.targets) + 1)
    size = len(codebook_VC)
    vectors = [target.reshape(-1, target.shape[-1]) for target in quantised.targets]
    candidates = jnp.stack([_pick(k, v, size) for k, v in zip(keys[1:], vectors, strict=True)])
    scale = jax.random.randint(keys[0], (size,), 0, len(candidates))
    fresh = candidates[scale, jnp.arange(size)]
    return jnp.where((usage_V > 0)[:, None], codebook_VC, fresh)


def _pick(key: jax.Array, vectors_NC: jax.Array, count: int) -> jax.Array:
    return vectors_NC[jax.random.randint(key, (count,), 0, len(vectors_NC))]
