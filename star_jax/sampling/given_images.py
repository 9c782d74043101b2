"""Which images are continued: their first scales are kept, and finer ones are sampled?"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from PIL import Image

from star_jax import image_io
from star_jax.core import pixels
from star_jax.core.argument_types import show, whole_number
from star_jax.core.schedule import Schedule
from star_jax.errors import UserError, UserTypeError
from star_jax.nn.bind import bind
from star_jax.sampling.sampler import GivenCodes

CHANNELS = ((), (1,), (3,), (4,))  # shape after the sides: grey, grey, RGB, RGBA
AnyImage = np.ndarray | Image.Image
Encode = Callable[[Any, np.ndarray], jax.Array]  # tokenizer parameters, uint8 [1, H, W, 3] -> codes


def prepare(
    image: AnyImage | Sequence[AnyImage] | None,
    keep: int,
    count: int,
    schedule: Schedule,
    size: tuple[int, int],
) -> list[np.ndarray]:
    """The given images as the model reads them: their centres, resized by Lanczos.

    Args:
        image: uint8 (h, w, 3) or a Pillow image, for all prompts; or a sequence of one per prompt.
        keep: how many first scales, or rows of tokens of a raster, are kept.
        count: the number of prompts.
        schedule: schedule of the model.
        size: (height, width) of its images in pixels.

    Returns:
        A list of no, one or `count` uint8 images (height, width, 3); of none where nothing is kept.

    Raises:
        UserError: more is kept than an image has, there is no image to keep it of, or their number
            is another than that of the prompts; a UserTypeError for what is no image.
    """
    steps = schedule.first_steps(whole_number('keep', keep))
    if image is None:
        if not steps:
            return []
        raise UserError(f'keep is {keep}, but there is no image: give one, or leave keep out')
    if isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.ndim < 4):
        image = [image]
    if isinstance(image, str) or not isinstance(image, Sequence | np.ndarray):
        raise UserTypeError(f'image must be one image or a list of them, not {show(image)}')
    if len(image) not in (1, count):
        raise UserError(
            f'there are {len(image)} images for {count} prompts: give one, or one per prompt'
        )
    images = [_crop(number, one, size) for number, one in enumerate(image)]
    return images if steps else []


def encoder(tokenizer: nn.Module) -> Encode:
    """Images -> codes, jitted; one image at a time, so that none depends on others."""

    def encode(params: Any, image_1HWc: jax.Array) -> jax.Array:
        encoded = bind(tokenizer, params).encode(pixels.to_signed(image_1HWc))
        return tokenizer.codes.unpack(encoded)[0]

    return jax.jit(encode)


def given_codes(
    codes: Sequence[np.ndarray], batch: int, keep: int, schedule: Schedule
) -> GivenCodes:
    """The codes of the first scales of a batch, of one image for all or of one per image.

    Where the images are fewer than the batch, the last one fills it up.

    Args:
        codes: codes [L, *codes.shape] of one image, or of each.
        batch: rows of the batch.
        keep: first scales that are kept; of a raster, first rows of tokens.
        schedule: the steps of an image.
    """
    rows = [*codes, *[codes[-1]] * (batch - len(codes))]
    return GivenCodes(np.stack(rows), np.arange(schedule.steps) < schedule.first_steps(keep))


def _crop(number: int, image: object, size: tuple[int, int]) -> np.ndarray:
    """The centre of an image, resized; UserTypeError for what is no image."""
    if isinstance(image, Image.Image):
        return _fit(number, image, size)
    if not isinstance(image, np.ndarray):
        shown = show(image)
    elif image.dtype != np.uint8 or not _is_image(image.shape):
        shown = f'{show(image)} of {image.dtype}'
    else:
        return image_io.crop(image, size)
    raise UserTypeError(
        f'image {number} is {shown}, expected a uint8 array (height, width, 3) or a Pillow image'
    )


def _fit(number: int, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The centre of a Pillow image, resized; UserError if its pixels cannot be read."""
    if image.mode not in image_io.MODES or 0 in image.size:
        raise UserError(
            f'image {number} has {image.width} x {image.height} pixels of mode {image.mode}, '
            'expected RGB, grey or a palette: convert it'
        )
    try:
        return image_io.fit(image, size)
    except (OSError, ValueError) as error:  # it is read from its file only now
        raise UserError(f'image {number} cannot be read ({error}): give another') from error


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and 0 not in shape and shape[2:] in CHANNELS
