"""How are image files that a command names read?"""

from pathlib import Path

import numpy as np

from star_jax import image_io
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
