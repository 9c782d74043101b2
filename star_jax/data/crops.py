"""Which part of an enlarged image does a training step see?"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

TEN = 10


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A crop anywhere in the image.

    Attributes:
        size: (height, width) of the crop, in pixels.
    """

    size: tuple[int, int]

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The example with a crop of its image."""
        image = example['image']
        height, width = self.size
        top, left = rng.integers(0, np.array(image.shape[:2]) - self.size + 1)
        return {**example, 'image': image[top : top + height, left : left + width]}


@dataclasses.dataclass(frozen=True)
class TenCrop:
    """One of ten crops: the corners and the centre of the image, and those of its mirror image.

    Attributes:
        size: (height, width) of a crop, in pixels.
    """

    size: tuple[int, int]

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The example with one crop of its image, or with one of the ten encoded ones."""
        number = rng.integers(TEN)
        if 'encoded' in example:
            return {**example, 'encoded': example['encoded'][number]}
        return {**example, 'image': self.crop(example['image'], number)}

    def crop(self, images: np.ndarray, number: int) -> np.ndarray:
        """Crop `number` of images [..., H, W, 3], in the order of torchvision's TenCrop."""
        mirrored, place = divmod(number, TEN // 2)
        if mirrored:  # before the crop: the centre of an odd margin is not in the middle
            images = images[..., ::-1, :]
        height, width = self.size
        down, right = images.shape[-3] - height, images.shape[-2] - width
        places = ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2)))
        top, left = places[place]
        return images[..., top : top + height, left : left + width, :]
