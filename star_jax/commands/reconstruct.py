"""`star-jax reconstruct IMAGES...`"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from star_jax import files, image_io
from star_jax.checkpoint import models
from star_jax.commands import arguments
from star_jax.core import pixels
from star_jax.data.folder import MOST_ENLARGED
from star_jax.data.photos import MOST_ASPECT
from star_jax.errors import UserError
from star_jax.losses.tokenizer import psnr
from star_jax.parallel import startup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Shows images beside what a tokenizer keeps of them, scale by scale.

    Writes one picture per image (original, then the reconstruction from ever more scales) and
    grid.png with all of them. Images are cropped to their centre square and resized.

    Example: star-jax reconstruct cat.png dog.jpg --out reconstructed

    Attributes:
        images: picture files.
        model: a model or tokenizer folder, a hub id, or 'shipped'.
        out: where the pictures go.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    model: str = models.SHIPPED
    out: Path = Path('reconstructed')


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Reconstruct, words, 'reconstruct')
    if not given.images:
        raise UserError('there is no image: give the paths of some picture files')
    files.check_folder(given.out)
    startup.start()
    folder = models.read_tokenizer(given.model)
    images = [_load(path, folder.config.resolution) for path in given.images]
    reconstruct = jax.jit(lambda params, image: _by_scale(folder.config.build(), params, image))
    grids = folder.config.grids
    rows, captions = [], []
    for index, (path, image) in enumerate(zip(given.images, images, strict=True)):
        painted, psnr = reconstruct(folder.params, image[None])
        row = [image, *np.asarray(painted)]
        words = [path.name, *(f'up to {height} x {width}' for height, width in grids)]
        words[-1] += f', {float(psnr):.1f} dB'
        image_io.save_png(
            image_io.grid(row, words, columns=len(row)), given.out / f'{index:03d}-{path.stem}.png'
        )
        rows, captions = rows + row, captions + words
    grid = image_io.grid(rows, captions, columns=1 + len(grids))
    sys.stdout.write(f'{image_io.save_png(grid, given.out / "grid.png")}\n')
    return 0


def _load(path: Path, resolution: tuple[int, int]) -> np.ndarray:
    """The centre of an image file; UserError for an image too small or too long for any set."""
    image = image_io.load_image(path)
    height, width = image.shape[:2]
    size = max(resolution)
    short, least = min(height, width), -(-size // MOST_ENLARGED)
    if short < least or max(height, width) > MOST_ASPECT * short:
        raise UserError(
            f'{path} has {width} x {height} pixels, expected a shorter side of at least {least} '
            f'for {size} px, and sides of at most {MOST_ASPECT} : 1: give another picture'
        )
    return image_io.crop(image, resolution)


def _by_scale(tokenizer, params: dict, image_1HWc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 reconstructions [K, H, W, 3] from the first 1..K scales, and the PSNR of the last."""
    variables = {'params': params}
    signed = pixels.to_signed(image_1HWc)
    f_BHWC = tokenizer.apply(variables, signed, method='features')
    canvases = tokenizer.apply(variables, f_BHWC, method='quantise').canvases
    painted = tokenizer.apply(variables, jax.numpy.concatenate(canvases), method='decode')
    return pixels.to_uint8(painted), psnr(signed, painted[-1:])[0]
