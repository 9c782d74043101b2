"""Which part of an enlarged image does a training step read?

`RandomCrops` and `TenCrops` are fields of a run: they state the size at which images are loaded,
how an example is cropped to the size of the model, and what a cache stores of an image.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from star_jax.core.argument_types import OMITTED, check_types
from star_jax.errors import UserError

TEN = 10
MAX_ENLARGE = 4  # beyond, a crop shows too little of an image

Size = tuple[int, int]  # (height, width) in pixels
# An example and random numbers of its own -> the example with a crop.
Crop = Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]
Encode = Callable[[np.ndarray], np.ndarray]  # images [B, H, W, 3] -> encoded images [B, ...]


def _check_enlarge(crops: 'RandomCrops | TenCrops') -> None:
    check_types(crops)
    if not 1 <= crops.enlarge <= MAX_ENLARGE:
        raise UserError(f'enlarge must lie in [1, {MAX_ENLARGE}], not {crops.enlarge}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrops:
    """Crops at random places, which are new in each step.

    Attributes:
        enlarge: load training images this many times larger than their crops (VAR: 1.125; 1: whole
            images, no crop).
        least: the smallest enlargement; each step chooses one between it and `enlarge` (LlamaGen:
            1; 0: always `enlarge`).
    """

    enlarge: float = 1.0
    least: float = dataclasses.field(default=0.0, metadata=OMITTED)

    def __post_init__(self) -> None:
        _check_enlarge(self)
        if self.least and not 1 <= self.least <= self.enlarge:
            raise UserError(
                f'least must lie in [1, {self.enlarge}], at most enlarge (0: enlarge), not '
                f'{self.least}'
            )

    @property
    def encoding(self) -> dict[str, Any]:
        """The settings on which cached encodings depend."""
        return {}

    def loaded_size(self, size: Size) -> Size:
        """The size of loaded images whose crops have this size."""
        height, width = size
        return round(self.enlarge * height), round(self.enlarge * width)

    def crop(self, size: Size) -> Crop | None:
        """Crops an example to this size. None: the example stays as it is."""
        return RandomCrop(size, self.least) if self.enlarge > 1 else None

    def check_cacheable(self) -> None:
        """Raises UserError unless a cache can hold all encodings of an image."""
        if self.enlarge > 1:
            raise UserError(
                f'crops.enlarge {self.enlarge} crops an image anew each time, and a cache holds '
                'fixed encodings of each image: leave out one of the two, or set crops to '
                'TenCrops in the config file'
            )

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a cache stores of an image, from that of one encoding."""
        return shape

    def encode_all(self, encode: Encode, size: Size) -> Encode:
        """Encodes loaded images to what a cache stores of them."""
        return encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class TenCrops:
    """One of ten crops of an image, whose codes a cache can hold (LlamaGen).

    They are at the corners and the centre of the image, and of its mirror image.

    Attributes:
        enlarge: load training images this many times larger than their crops.
    """

    enlarge: float = 1.1

    def __post_init__(self) -> None:
        _check_enlarge(self)
        if self.enlarge == 1:
            raise UserError('ten crops are parts of an enlarged image: give enlarge, such as 1.1')

    @property
    def encoding(self) -> dict[str, Any]:
        """The settings on which cached encodings depend."""
        return {'ten crops of images enlarged by': self.enlarge}

    def loaded_size(self, size: Size) -> Size:
        """The size of loaded images whose crops have this size (LlamaGen specification 4.1)."""
        height, width = size
        return int(self.enlarge * height), int(self.enlarge * width)

    def crop(self, size: Size) -> Crop:
        """Crops an example to this size, or takes one of its ten cached encodings."""
        return OneOfTenCrops(size)

    def check_cacheable(self) -> None:
        """Does nothing: a cache holds all ten encodings of an image."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a cache stores of an image, from that of one encoding."""
        return (TEN, *shape)

    def encode_all(self, encode: Encode, size: Size) -> Encode:
        """Encodes loaded images to what a cache stores of them, [B, 10, ...]."""
        crop = OneOfTenCrops(size).crop
        return lambda images: np.stack([encode(crop(images, n)) for n in range(TEN)], axis=1)


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A crop anywhere in the image.

    Attributes:
        size: (height, width) of the crop, in pixels.
        least: each image is first made smaller at random, down to this many times the crop (0: it
            stays).
    """

    size: Size
    least: float = 0.0

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The example with a crop of its image."""
        image, scale = example['image'], 1.0
        height, width = self.size
        if self.least:
            largest = image.shape[0]
            scale = rng.integers(round(self.least * height), largest + 1) / largest
        sides = np.array([round(side * scale) for side in image.shape[:2]])
        sides = np.maximum(sides, self.size)  # one side may have been rounded below the crop's
        top, left = rng.integers(0, sides - self.size + 1)
        if scale == 1:
            return {**example, 'image': image[top : top + height, left : left + width]}
        whole = Image.fromarray(image)
        box = np.array([left, top, left + width, top + height]) / scale
        box = np.minimum(box, whole.size * 2)  # the sides were rounded
        crop = whole.resize((width, height), Image.Resampling.BICUBIC, tuple(box.tolist()))
        return {**example, 'image': np.asarray(crop)}


@dataclasses.dataclass(frozen=True)
class OneOfTenCrops:
    """One of ten crops: the corners and the centre of the image, and those of its mirror image.

    Attributes:
        size: (height, width) of a crop, in pixels.
    """

    size: Size

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


Crops = RandomCrops | TenCrops

WHOLE_IMAGES = RandomCrops()
