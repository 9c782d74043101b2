"""`star-jax reconstruct IMAGES...`"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from star_jax import files, image_io, terminal
from star_jax.checkpoint import models
from star_jax.commands import arguments, image_files
from star_jax.core import pixels
from star_jax.errors import UserError
from star_jax.files import SHIPPED
from star_jax.losses.tokenizer import psnr
from star_jax.nn.bind import bind
from star_jax.parallel import startup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Reconstructs images with a tokenizer, scale by scale.

    For each image it writes a row (the original, then the reconstructions from the first scale, the
    first two, and so on), and grid.png with all rows. Images are cropped to their centre square and
    resized.

    Example: star-jax reconstruct cat.png dog.jpg --out reconstructed

    Attributes:
        images: image files.
        model: model or tokenizer folder, hub id, 'shipped' or 'shipped/infinity'.
        out: folder of the reconstructions.
        check: compare the weights with the SHA-256 that the model folder keeps.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    model: str = SHIPPED
    out: Path = Path('reconstructed')
    check: bool = True


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Reconstruct, words, 'reconstruct')
    if not options.images:
        raise UserError('there is no image: give the paths of some image files')
    files.check_folder(options.out)
    outputs = [
        *(options.out / f'{i:03d}-{path.stem}.png' for i, path in enumerate(options.images)),
        options.out / 'grid.png',
    ]
    given = {os.path.realpath(path) for path in options.images}
    for path in outputs:
        files.check_file(path)
        if os.path.realpath(path) in given:
            raise UserError(
                f'{path} is one of the images, and is not overwritten: give another --out'
            )
    startup.start()
    folder = models.read_tokenizer(options.model, options.check)
    resolution = folder.config.resolution
    images = [
        image_io.crop(image_files.load(path, resolution), resolution) for path in options.images
    ]
    reconstruct = jax.jit(lambda params, image: _by_scale(folder.config.build(), params, image))
    grids = folder.config.grids
    rows, captions = [], []
    for path, image, output in zip(options.images, images, outputs[:-1], strict=True):
        reconstructions, decibels = reconstruct(folder.params, image[None])
        row = [image, *np.asarray(reconstructions)]
        titles = [path.name, *(f'up to {height} x {width}' for height, width in grids)]
        titles[-1] += f', {float(decibels):.1f} dB'
        row_image = image_io.grid(row, titles, columns=len(row))
        image_io.save_png(row_image, output)
        rows, captions = rows + row, captions + titles
    grid = image_io.grid(rows, captions, columns=1 + len(grids))
    terminal.write_line(image_io.save_png(grid, outputs[-1]))
    return 0


def _by_scale(tokenizer, params: dict, image_1HWc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 reconstructions [K, H, W, 3] from the first 1..K scales, and the PSNR of the last."""
    bound, signed = bind(tokenizer, params), pixels.to_signed(image_1HWc)
    canvases = bound.quantise(bound.features(signed)).canvases
    decoded = bound.decode(jax.numpy.concatenate(canvases))
    return tokenizer.to_uint8(decoded), psnr(signed, decoded[-1:])[0]
