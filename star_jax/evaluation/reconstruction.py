"""What does a tokenizer keep of images?"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint.folder import StoredTokenizer
from star_jax.core import pixels
from star_jax.core.schedule import Grids
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.evaluation import bootstrap
from star_jax.losses.tokenizer import psnr
from star_jax.nn.bind import bind
from star_jax.nn.perceptual import Lpips
from star_jax.tokenizers import codebook

Reconstruct = Callable[[Source], Iterable['Reconstructed']]


class Reconstructed(NamedTuple):
    """Some images after the tokenizer.

    `images`: uint8 [N, H, W, 3]. `psnr_N` in dB. `lpips_N`: distances, or None where nothing
    measures them. `usage_KV`: how often each scale chose each code.
    """

    images: np.ndarray
    psnr_N: np.ndarray
    lpips_N: np.ndarray | None
    usage_KV: np.ndarray


def compile_tokenizer(tokenizer: StoredTokenizer, lpips: Lpips | None, batch: int) -> Reconstruct:
    """What reconstructs a source, `batch` images at a time, all through one program."""
    network, params = tokenizer.config.build(), jax.device_put(tokenizer.params)
    lpips = jax.device_put(lpips)

    @jax.jit
    def program(params: Any, lpips: Lpips | None, images: jax.Array, real: int) -> Reconstructed:
        bound, signed = bind(network, params), pixels.to_signed(images)
        codes = bound.quantise(bound.features(signed))
        decoded = bound.decode(codes.canvases[-1])
        usage_KV = codebook.usage(codes, network.codes.size, jnp.arange(len(images)) < real)
        distance_B = None if lpips is None else lpips(signed, decoded)
        ratio_B = psnr(signed, decoded)
        return Reconstructed(network.to_uint8(decoded), ratio_B, distance_B, usage_KV)

    def reconstruct(source: Source) -> Iterable[Reconstructed]:
        for some in pipeline.sequential(source, batch):
            filled, real = pipeline.pad(some, batch)
            images, ratio_B, distance_B, usage_KV = program(params, lpips, filled['image'], real)
            yield Reconstructed(
                np.asarray(images)[:real],
                np.asarray(ratio_B)[:real],
                None if distance_B is None else np.asarray(distance_B)[:real],
                np.asarray(usage_KV),
            )

    return reconstruct


def join(parts: Iterable[Reconstructed]) -> Reconstructed:
    """All of them as one."""
    images, ratios, distances, counts = zip(*parts, strict=True)
    return Reconstructed(
        np.concatenate(images),
        np.concatenate(ratios),
        None if distances[0] is None else np.concatenate(distances),
        sum(counts),
    )


def scores(found: Reconstructed, grids: Grids, seed: int) -> dict[str, Any]:
    """PSNR, LPIPS, and per scale the share of codes that is used and their perplexity."""
    usage_KV = found.usage_KV
    perplexity_K = np.asarray(codebook.perplexity(jnp.asarray(usage_KV)))
    used_K = (usage_KV > 0).mean(1)
    lpips = None if found.lpips_N is None else bootstrap.mean(found.lpips_N, seed)
    return {
        'images': len(found.images),
        'psnr': bootstrap.mean(found.psnr_N, seed),
        'lpips': lpips,
        'used': float((usage_KV.sum(0) > 0).mean()),
        'scales': [
            {'grid': list(grid), 'used': float(used), 'perplexity': float(perplexity)}
            for grid, used, perplexity in zip(grids, used_K, perplexity_K, strict=True)
        ],
    }
