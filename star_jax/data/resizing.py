"""How are images of files resized to the size that a model trains on?

`Lanczos`, `LanczosCover` and `HalvedBicubic` are fields of a dataset, so that its training and
validation images are resized alike.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from star_jax import image_io
from star_jax.image_io import height_and_width

Size = int | tuple[int, int]  # side of a square, or (height, width), in pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanczos:
    """The centre is cropped, then resized by Lanczos (STAR specification 4)."""

    def fit(self, image: Image.Image, size: Size) -> np.ndarray:
        """The centre of an image of any mode, (height, width, 3) uint8."""
        return image_io.fit(image, size)

    def decoded_side(self, size: Size) -> float:
        """Longer side in pixels for which a decoder may reduce the image."""
        return max(height_and_width(size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanczosCover:
    """Resized by Lanczos to whole pixels that cover the size, then cropped.

    Source: Infinity specification 6.
    """

    def fit(self, image: Image.Image, size: Size) -> np.ndarray:
        """The centre of an image of any mode, (height, width, 3) uint8."""
        return image_io.cover_and_crop(image, size)

    def decoded_side(self, size: Size) -> float:
        """No decoder may reduce the image: the whole pixels that cover it would be others."""
        return math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalvedBicubic:
    """Halved with a box filter, resized by bicubic, then cropped (LlamaGen specification 1.8)."""

    def fit(self, image: Image.Image, size: Size) -> np.ndarray:
        """The centre of an image of any mode, (height, width, 3) uint8."""
        return image_io.halve_and_fit(image, size)

    def decoded_side(self, size: Size) -> float:
        """No decoder may reduce the image: it would replace the box filter."""
        return math.inf


Resizing = Lanczos | LanczosCover | HalvedBicubic

LANCZOS = Lanczos()
