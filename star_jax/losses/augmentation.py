"""How are images changed before a discriminator gets them?

Differentiable augmentation (Zhao et al. 2020): real and decoded images are changed at random in the
same ways, so that a discriminator cannot remember a small training set.
"""

import dataclasses

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of images, each with its strength (0: off); defaults are the published ones.

    Attributes:
        brightness: largest amount that is added, of a range of pixels of 2.
        saturation: largest change of the distance from gray, as a share.
        contrast: largest change of the distance from the mean of the image, as a share.
        translation: largest shift along each axis, as a share of it; zeros move in.
        cutout: side of the square that is set to zero, as a share of the side of the image.
    """

    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    translation: float = 0.125
    cutout: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        for field in dataclasses.fields(self):
            if not 0 <= (strength := getattr(self, field.name)) <= 1:
                raise UserError(f'{field.name} must lie in [0, 1], not {strength}')

    def __call__(self, key: jax.Array, images_BHWc: jax.Array) -> jax.Array:
        """The changed images; every image has random numbers of its own."""
        keys_B = jax.random.split(key, len(images_BHWc))
        return jax.vmap(self._one)(keys_B, images_BHWc)

    def _one(self, key: jax.Array, image_HWc: jax.Array) -> jax.Array:
        color_key, shift_key, hole_key = jax.random.split(key, 3)
        bright, saturated, contrasted = jax.random.uniform(color_key, (3,), minval=-1, maxval=1)
        x = image_HWc + self.brightness * bright
        gray = x.mean(-1, keepdims=True)
        x = gray + (x - gray) * (1 + self.saturation * saturated)
        x = x.mean() + (x - x.mean()) * (1 + self.contrast * contrasted)
        if self.translation:
            x = _translated(shift_key, x, self.translation)
        return _cut(hole_key, x, self.cutout) if self.cutout else x


def _translated(key: jax.Array, x_HWc: jax.Array, share: float) -> jax.Array:
    """An image, moved by a random whole number of pixels along each axis."""
    height, width, _ = x_HWc.shape
    most = jnp.array([round(height * share), round(width * share)])
    y, x = jax.random.randint(key, (2,), -most, most + 1)
    rows, columns = jnp.arange(height) - y, jnp.arange(width) - x
    inside = _within(rows, height)[:, None] & _within(columns, width)
    moved = x_HWc[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return jnp.where(inside[..., None], moved, 0)


def _cut(key: jax.Array, x_HWc: jax.Array, share: float) -> jax.Array:
    """An image with a rectangle of zeros around a random pixel."""
    sizes = jnp.array(x_HWc.shape[:2])
    holes = jnp.round(sizes * share).astype(int)
    first = jax.random.randint(key, (2,), 0, sizes + (1 - holes % 2)) - holes // 2
    rows = _within(jnp.arange(x_HWc.shape[0]) - first[0], holes[0])
    columns = _within(jnp.arange(x_HWc.shape[1]) - first[1], holes[1])
    return jnp.where((rows[:, None] & columns)[..., None], 0, x_HWc)


def _within(index: jax.Array, size: jax.Array | int) -> jax.Array:
    return (index >= 0) & (index < size)
