"""How well does a tokenizer reconstruct images?"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint.folder import StoredTokenizer
from star_jax.core import pixels
from star_jax.core.codes import Codes
from star_jax.core.schedule import Grids
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.evaluation import bootstrap
from star_jax.losses.tokenizer import psnr
from star_jax.nn.bind import bind
from star_jax.nn.perceptual import Lpips
from star_jax.tokenizers import codebook

Reconstruct = Callable[[Source], Iterable['Reconstruction']]


class Reconstruction(NamedTuple):
    """N images after encoding, quantisation and decoding.

    Attributes:
        images: uint8 [N, H, W, 3].
        psnr_N: peak signal-to-noise ratios in dB.
        lpips_N: perceptual distances, or None if they were not computed.
        usage_KV: how often each scale used each code.
    """

    images: np.ndarray
    psnr_N: np.ndarray
    lpips_N: np.ndarray | None
    usage_KV: np.ndarray


def compile_reconstruction(
    tokenizer: StoredTokenizer, lpips: Lpips | None, batch: int
) -> Reconstruct:
    """A function that reconstructs the images of a source, all with one compiled program.

    Args:
        tokenizer: its config and parameters.
        lpips: the perceptual network (None: no perceptual distances).
        batch: images per call of the program.
    """
    network, params = tokenizer.config.build(), jax.device_put(tokenizer.params)
    lpips = jax.device_put(lpips)

    @jax.jit
    def program(params: Any, lpips: Lpips | None, images: jax.Array, real: int) -> Reconstruction:
        bound, signed = bind(network, params), pixels.to_signed(images)
        codes = bound.quantise(bound.features(signed))
        decoded = bound.decode(codes.canvases[-1])
        return Reconstruction(
            images=network.to_uint8(decoded),
            psnr_N=psnr(signed, decoded),
            lpips_N=None if lpips is None else lpips(signed, decoded),
            usage_KV=codebook.usage(
                bound.labels(codes), network.codes, jnp.arange(len(images)) < real
            ),
        )

    def reconstruct(source: Source) -> Iterable[Reconstruction]:
        for padded, real in pipeline.padded_batches(source, batch):
            result = jax.tree.map(np.asarray, program(params, lpips, padded['image'], real))
            yield result._replace(
                images=result.images[:real],
                psnr_N=result.psnr_N[:real],
                lpips_N=None if lpips is None else result.lpips_N[:real],
            )

    return reconstruct


def concatenate(reconstructions: Iterable[Reconstruction]) -> Reconstruction:
    """The reconstructions of all images."""
    images, psnrs, distances, usages = zip(*reconstructions, strict=True)
    return Reconstruction(
        images=np.concatenate(images),
        psnr_N=np.concatenate(psnrs),
        lpips_N=None if distances[0] is None else np.concatenate(distances),
        usage_KV=sum(usages),
    )


def scores(reconstruction: Reconstruction, grids: Grids, codes: Codes, seed: int) -> dict[str, Any]:
    """PSNR and LPIPS; the share of used codes; the share and the perplexity of each scale.

    Args:
        reconstruction: PSNR in dB and LPIPS of all images, and how often each code was used.
        grids: (height, width) of each scale in tokens.
        codes: the codes of a token.
        seed: seed of the resamples.
    """
    usage_KV, lpips_N = reconstruction.usage_KV, reconstruction.lpips_N
    perplexity_K = np.asarray(codes.perplexity(jnp.asarray(usage_KV)))
    used_K = (usage_KV > 0).mean(1)
    return {
        'count': len(reconstruction.images),
        'psnr': bootstrap.mean(reconstruction.psnr_N, seed),
        'lpips': None if lpips_N is None else bootstrap.mean(lpips_N, seed),
        'used': float((usage_KV.sum(0) > 0).mean()),
        'scales': [
            {'grid': list(grid), 'used': float(used), 'perplexity': float(perplexity)}
            for grid, used, perplexity in zip(grids, used_K, perplexity_K, strict=True)
        ],
    }
