"""Which networks distinguish real images from decoded ones? (LlamaGen specification 1.6)

Batch statistics are explicit values: a network returns those of its batch, and normalises with
given ones instead if it gets any. Statistics are those of the whole batch, over all devices, so
that no result depends on the mesh; the published code keeps those of each device.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import check_sizes
from star_jax.errors import UserError
from star_jax.nn import layers

SLOPE = 0.2  # slope of LeakyReLU below zero
WIDEST = 8  # a patch discriminator widens up to this multiple of its width
STATISTICS_MOMENTUM = 0.1
STATISTICS_EPSILON = 1e-5
STYLE_WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
STYLE_TOP = 512  # channels after the last block

leaky_relu = functools.partial(jax.nn.leaky_relu, negative_slope=SLOPE)


class Statistics(NamedTuple):
    """Statistics of a batch, at least float32.

    Attributes:
        mean_C: mean of every channel.
        variance_C: unbiased variance of every channel.
    """

    mean_C: jax.Array
    variance_C: jax.Array


AllStatistics = Mapping[str, Statistics]  # statistics of every batch norm, by name


def follow(running: AllStatistics, batch: AllStatistics) -> AllStatistics:
    """The running statistics after a batch."""
    return jax.tree.map(
        lambda old, new: (1 - STATISTICS_MOMENTUM) * old + STATISTICS_MOMENTUM * new, running, batch
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchGAN:
    """A convolutional network with one logit per patch of the image; the published default.

    Attributes:
        width: channels of the first layer.
        layers: layers that halve the resolution.
    """

    any_size: ClassVar[bool] = True  # one network serves images of several sizes

    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(width=self.width, layers=self.layers)

    def check(self, resolution: tuple[int, int]) -> None:
        """Raises UserError for images without a patch."""
        least = 2 ** (self.layers + 1) + 2 ** (self.layers)
        if min(resolution) < least:
            raise UserError(
                f'a PatchGAN of {self.layers} layers needs images of at least {least} px, not '
                f'{" x ".join(map(str, resolution))}: give fewer layers'
            )

    def build(self, resolution: tuple[int, int]) -> 'PatchDiscriminator':
        return PatchDiscriminator(self.width, self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleGAN:
    """A residual network with one logit per image, whose widths follow from the image size."""

    any_size: ClassVar[bool] = False

    def check(self, resolution: tuple[int, int]) -> None:
        """Raises UserError for images whose size has no published width."""
        if resolution[0] != resolution[1] or resolution[0] not in STYLE_WIDTHS:
            raise UserError(
                f'a StyleGAN discriminator needs square images of one of '
                f'{", ".join(map(str, STYLE_WIDTHS))} px, not '
                f'{" x ".join(map(str, resolution))}: use a PatchGAN'
            )

    def build(self, resolution: tuple[int, int]) -> 'StyleDiscriminator':
        return StyleDiscriminator(resolution[0])


class BatchNorm(nn.Module):
    """Normalises by statistics of the batch, or by given ones; learned scale and shift."""

    @nn.compact
    def __call__(self, x_BhwC: jax.Array, given: Statistics | None) -> tuple[jax.Array, Statistics]:
        """The normalised maps, and the statistics of the batch."""
        wide = x_BhwC.astype(layers.at_least_float32(x_BhwC.dtype))
        mean_C = wide.mean((0, 1, 2))
        variance_C = jnp.square(wide - mean_C).mean((0, 1, 2))
        count = math.prod(x_BhwC.shape[:3])
        batch = Statistics(mean_C, variance_C * (count / max(count - 1, 1)))
        if given is not None:
            mean_C, variance_C = given
        about_one = lambda *args: 1 + nn.initializers.normal(0.02)(*args)  # noqa: E731
        scale = nn.with_logical_partitioning(about_one, ('channels',))
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ('channels',))
        wide = (wide - mean_C) * jax.lax.rsqrt(variance_C + STATISTICS_EPSILON)
        wide = wide * self.param('scale', scale, mean_C.shape)
        wide = wide + self.param('bias', bias, mean_C.shape)
        return wide.astype(x_BhwC.dtype), batch


class PatchDiscriminator(nn.Module):
    """[B, H, W, 3] images -> [B, h, w, 1] logits.

    Attributes:
        width: channels of the first layer.
        layers: layers that halve the resolution.
    """

    width: int
    layers: int

    @nn.compact
    def __call__(
        self, images_BHWc: jax.Array, given: AllStatistics | None = None
    ) -> tuple[jax.Array, AllStatistics]:
        """Logits and the statistics of the batch; `given` ones normalise instead of these."""
        h = leaky_relu(_conv(self.width, 4, 2, 'conv_0')(images_BHWc))
        batch = {}
        for layer in range(1, self.layers + 1):
            stride = 2 if layer < self.layers else 1
            width = self.width * min(2**layer, WIDEST)
            h = _conv(width, 4, stride, f'conv_{layer}', bias=False)(h)
            name = f'norm_{layer}'
            h, batch[name] = BatchNorm(name=name)(h, given[name] if given else None)
            h = leaky_relu(h)
        return _conv(1, 4, 1, 'conv_out')(h), batch


class StyleBlock(nn.Module):
    """Two convolutions and a blurred halving, plus a strided projection of the input.

    Attributes:
        width: channels of the output.
    """

    width: int

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        rest = _conv(self.width, 1, 2, 'shortcut', pad=0)(x_BhwC)
        h = leaky_relu(_conv(self.width, 3, 1, 'conv_0')(x_BhwC))
        h = leaky_relu(_conv(self.width, 3, 1, 'conv_1')(h))
        return (_conv(self.width, 3, 2, 'downsample')(blur(h)) + rest) / math.sqrt(2)


class StyleDiscriminator(nn.Module):
    """[B, H, W, 3] images -> [B, 1] logits.

    Attributes:
        size: side of the images in pixels.
    """

    size: int

    @nn.compact
    def __call__(
        self, images_BHWc: jax.Array, given: AllStatistics | None = None
    ) -> tuple[jax.Array, AllStatistics]:
        """Logits; there are no statistics."""
        side = self.size
        h = leaky_relu(_conv(STYLE_WIDTHS[side], 3, 1, 'conv_in')(images_BHWc))
        while side > 4:
            side //= 2
            h = StyleBlock(STYLE_WIDTHS[side], name=f'block_{side}')(h)
        h = leaky_relu(_conv(STYLE_TOP, 3, 1, 'conv_out')(h)).reshape(len(h), -1)
        init, axes = nn.initializers.lecun_normal(), (None, 'channels')
        h = leaky_relu(layers.Linear(h.shape[-1], STYLE_TOP, axes, init, name='linear')(h))
        return layers.Linear(STYLE_TOP, 1, (None, None), init, name='logit')(h), {}


def blur(x_BhwC: jax.Array) -> jax.Array:
    """Maps averaged with the weights 1, 2, 1 along both axes, mirrored at the border."""
    for axis in (1, 2):
        edges = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(x_BhwC, edges, 'reflect'), x_BhwC.shape[axis]
        left, middle, right = (
            jax.lax.slice_in_dim(padded, first, first + size, axis=axis) for first in range(3)
        )
        x_BhwC = (left + 2 * middle + right) / 4
    return x_BhwC


def _conv(
    width: int, size: int, stride: int, name: str, *, bias: bool = True, pad: int = 1
) -> nn.Conv:
    partitioned = nn.with_logical_partitioning
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        padding=pad,
        use_bias=bias,
        kernel_init=partitioned(nn.initializers.normal(0.02), (None, None, None, 'channels')),
        bias_init=partitioned(nn.initializers.zeros, ('channels',)),
        name=name,
    )


AnyDiscriminator = PatchGAN | StyleGAN


def abstract(config: Any, resolution: tuple[int, int], batch: int = 2) -> tuple[dict, Any]:
    """Shapes of the parameters, boxed with logical axes, and of the statistics."""
    network = config.build(resolution)
    images = jax.ShapeDtypeStruct((batch, *resolution, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)['params']
    statistics = jax.eval_shape(
        lambda params, x: network.apply({'params': params}, x)[1], nn.unbox(params), images
    )
    return params, statistics
