"""How are image files that a command names read?"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from star_jax import image_io, terminal
from star_jax.data.folder import MAX_ENLARGEMENT
from star_jax.data.image_files import MAX_ASPECT
from star_jax.errors import UserError


def load(path: Path, resolution: tuple[int, int]) -> np.ndarray:
    """An image file, uint8 (h, w, 3), of which a model can read the centre at a resolution.

    Raises UserError for a file that is no image, for too small and for too long sides.
    """
    image = image_io.load_image(path)
    height, width = image.shape[:2]
    size = max(resolution)
    short, least = min(height, width), -(-size // MAX_ENLARGEMENT)
    if short < least or max(height, width) > MAX_ASPECT * short:
        raise UserError(
            f'{path} has {width} x {height} pixels, expected a shorter side of at least {least} '
            f'for {size} px, and sides of at most {MAX_ASPECT} : 1: give another image'
        )
    return image


def read_given(
    paths: Sequence[Path], keep: int | None, *, count: int, size: tuple[int, int]
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The images from which images are sampled: their centres, at the size of the model.

    Args:
        paths: no file, one for all prompts, or one per prompt.
        keep: how many first scales of them are kept.
        count: the number of prompts.
        size: (height, width) of the images, in pixels.

    Returns:
        The images, as many as files, and for each prompt the fields of its record.

    Raises:
        UserError: another number of files, or as `load`.
    """
    if not paths:
        return [], [{}] * count
    if len(paths) not in (1, count):
        raise UserError(
            f'there are {len(paths)} images for {count} prompts: give one, or one per prompt'
        )
    images, records = [], []
    for path in paths:
        image = load(path, size)
        if image.shape[:2] != size:
            width, height = image.shape[1::-1]
            terminal.write_line(
                f'{path}: the centre of {width} x {height} px becomes {size[1]} x {size[0]} px'
            )
        images.append(image_io.crop(image, size))
        digest = hashlib.sha256(images[-1].tobytes()).hexdigest()
        records.append({'image': {'source': str(path), 'sha256': digest}, 'keep': keep})
    return images, records * (count // len(records))
