"""How do features become the signs of residuals at growing scales, and how are cells joined?

Multi-scale residual quantisation with one bit per channel (Infinity specification 3.4 and 3.7);
nothing here has parameters. Maps have any number of axes between the first and the last: (height,
width) of images, (time, height, width) of video.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from star_jax.core import resize
from star_jax.nn import layers

Sizes = tuple[tuple[int, ...], ...]  # one tuple per scale, one number per axis
Flips = Callable[[int, tuple[int, ...]], jax.Array | None]  # (step, shape) -> flipped bits

SMALL = 0.05  # a residual is small below this share of the size of a code
DECAY, LEAST = 0.1, 0.1  # loss of weight per scale where codes decay; least weight
PATCH = 2  # cells of a token along each side where neighbouring cells are joined


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitTrace:
    """Intermediate results of every scale, with K channels.

    Attributes:
        bits: per scale [B, *size, K] int8: the signs, before any flip.
        residuals: per scale [B, *size, K]: the numbers whose signs are the bits.
        codes: per scale [B, *size, K]: the vectors of those signs, with the gradient of the
            residual's direction.
        flips: per scale [B, *size, K] bool, or None.
        canvases: per scale [B, *full, K]: the sum of the scales so far.
    """

    bits: tuple[jax.Array, ...]
    residuals: tuple[jax.Array, ...]
    codes: tuple[jax.Array, ...]
    flips: tuple[jax.Array | None, ...]
    canvases: tuple[jax.Array, ...]

    @property
    def small_shares(self) -> jax.Array:
        """[S]: the share of small residuals at every scale (Infinity specification 3.7)."""
        limit = SMALL / math.sqrt(self.bits[0].shape[-1])
        return jnp.stack([(jnp.abs(residual) < limit).mean() for residual in self.residuals])

    def losses(self, f: jax.Array, commitment: float) -> jax.Array:
        """[S]: the commitment loss of each scale (Infinity specification 3.6).

        The mean squared distance of the residual's direction from the code, which stays.
        """
        errors = [
            layers.unit(residual) - code_vectors(bits, residual.dtype)
            for residual, bits in zip(self.residuals, self.bits, strict=True)
        ]
        return commitment * jnp.stack([jnp.square(error).mean() for error in errors])

    def straight_through(self, f: jax.Array) -> jax.Array:
        """The last canvas; its gradient flows through the directions of the residuals."""
        return self.canvases[-1]


def code_vectors(bits: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Vectors of length 1 for the bits on the last axis."""
    return (2 * bits.astype(dtype) - 1) / math.sqrt(bits.shape[-1])


def decays(scales: int, decay: bool) -> tuple[float, ...]:
    """The factor of every scale's codes."""
    return tuple(max(LEAST, 1 - DECAY * s) if decay else 1.0 for s in range(scales))


def quantise(
    f: jax.Array,
    sizes: Sizes,
    decay: bool = False,
    detach: bool = True,
    flips: Flips | None = None,
) -> BitTrace:
    """The signs of every scale's residual.

    Args:
        f: [B, *full, K] float32 features.
        sizes: sizes of every scale; the last is the full size.
        decay: later scales count less.
        detach: no gradient flows through what earlier scales took away.
        flips: which bits are flipped before their codes are taken away.
    """
    f, full = f.astype(layers.at_least_float32(f.dtype)), sizes[-1]
    rest, canvas = f, jnp.zeros_like(f)
    trace = BitTrace((), (), (), (), ())
    for step, (size, factor) in enumerate(zip(sizes, decays(len(sizes), decay), strict=True)):
        residual = resize.along_axes(rest, size, resize.area_matrix)
        bits = (residual > 0).astype(jnp.int8)
        direction = layers.unit(residual)
        code = direction + jax.lax.stop_gradient(code_vectors(bits, f.dtype) - direction)
        flip = flips(step, bits.shape) if flips else None
        used = code if flip is None else code_vectors(bits ^ flip, f.dtype)
        added = resize.along_axes(factor * used, full, resize.linear_matrix)
        rest = rest - (jax.lax.stop_gradient(added) if detach else added)
        canvas = canvas + added
        trace = BitTrace(
            bits=(*trace.bits, bits),
            residuals=(*trace.residuals, residual),
            codes=(*trace.codes, code),
            flips=(*trace.flips, flip),
            canvases=(*trace.canvases, canvas),
        )
    return trace


def unshuffle(x_BhwC: jax.Array) -> jax.Array:
    """Joins 2 x 2 neighbouring cells, [B, h / 2, w / 2, 4 C], channel by channel.

    The order of PyTorch's pixel_unshuffle: channel, row, column.
    """
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // PATCH, width // PATCH, channels * PATCH**2)


def shuffle(x_BhwC: jax.Array) -> jax.Array:
    """The inverse of `unshuffle`."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height, width, channels // PATCH**2, PATCH, PATCH)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height * PATCH, width * PATCH, channels // PATCH**2)
