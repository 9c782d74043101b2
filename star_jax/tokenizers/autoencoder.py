"""How does an image become a small map of features, and back?

The convolutional encoder and decoder of STAR and VAR (STAR specification 1.1-1.3) and, without
attention, of Infinity (Infinity specification 3.1-3.2). Images are NHWC float32 in [-1, 1]. Widths,
multipliers, groups and the stem are fields, so that a narrow one trains on two cores: a stem of 4
folds 4 x 4 pixels into channels before the first convolution (1: as published) and removes the work
at full resolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import check_sizes
from star_jax.errors import UserError
from star_jax.nn import layers

LARGEST_SIDE = 2**14  # px, of an image
MOST_BLOCKS = 32  # blocks of a level: each is traced on its own
MOST_LEVELS = 16  # each halves the image
ZEROS = nn.initializers.zeros  # residual branches start as the identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Sizes of the encoder and the decoder; the defaults are the published ones.

    Attributes:
        width: channels of the first level.
        multipliers: channels of each level, as multiples of width; every level after the first
            halves the resolution.
        blocks: residual blocks of a level.
        groups: groups of the group norms; a divisor of width (0: 32, or 24 where 32 does not divide
            the channels, as Infinity has them).
        stem: side of the squares of pixels that the first layer folds into channels (1: none, as
            published); removes the work at full resolution.
        attention: self-attention at the coarsest level and in the middle.
        fused_attention: one convolution makes its queries, keys and values (False: three, as in
            LlamaGen's files).
        latent: channels between encoder and quantiser (0: the channels of the codebook).
    """

    width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    stem: int = 1
    attention: bool = True
    fused_attention: bool = True
    latent: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(width=self.width, groups=self.groups or 1, stem=self.stem)
        check_sizes(MOST_BLOCKS, blocks=self.blocks)
        if len(self.multipliers) > MOST_LEVELS:
            raise UserError(
                f'an autoencoder of {len(self.multipliers):,} multipliers has too many levels, '
                f'expected at most {MOST_LEVELS}'
            )
        check_sizes(multipliers=self.multipliers, widths=self.widths)
        if self.latent < 0:
            raise UserError(f'latent must not be negative (0: the codebook), not {self.latent}')
        check_sizes(latent=self.latent or 1)
        if not self.multipliers:
            raise UserError('an autoencoder needs at least one of the multipliers of its width')
        if self.groups < 0:
            raise UserError(f'groups must not be negative (0: 32 or 24), not {self.groups}')
        if self.groups and self.width % self.groups:
            raise UserError(f'width {self.width} does not divide into {self.groups} norm groups')
        if not self.groups and (odd := [w for w in self.widths if w % 32 and w % 24]):
            raise UserError(f'{odd[0]} channels divide into neither 32 nor 24 norm groups')

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along a side."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError for a last grid (height, width) in cells whose images are too large."""
        height, width = (side * self.downsampling for side in grid)
        if max(height, width) > LARGEST_SIDE:
            raise UserError(
                f'a last grid of {grid} and a downsampling of {self.downsampling} make images of '
                f'{height} x {width} px, expected at most {LARGEST_SIDE} px a side'
            )


class ResBlock(nn.Module):
    """Two normalised convolutions beside the identity (1x1 convolution to another width).

    Attributes:
        width: channels of the output.
        groups: groups of the norms, as for an `Autoencoder`.
    """

    width: int
    groups: int

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.groups, x_BhwC, 'norm1'))
        h = layers.conv(self.width, name='conv1')(h)
        h = nn.silu(_norm(self.groups, h, 'norm2'))
        h = layers.conv(self.width, init=ZEROS, name='conv2')(h)
        if x_BhwC.shape[-1] != self.width:
            x_BhwC = layers.conv(self.width, 1, name='nin_shortcut')(x_BhwC)
        return x_BhwC + h


class AttnBlock(nn.Module):
    """One head of self-attention over all cells.

    Attributes:
        groups: groups of the norm.
        fused: one convolution makes queries, keys and values.
    """

    groups: int
    fused: bool = True

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BhwC.shape
        h = _norm(self.groups, x_BhwC, 'norm')
        if self.fused:
            qkv = layers.conv(3 * channels, 1, name='qkv')(h)
            parts = jnp.split(qkv.reshape(batch, height * width, -1), 3, axis=-1)
        else:
            parts = [layers.conv(channels, 1, name=name)(h) for name in 'qkv']
        q_BLC, k_BLC, v_BLC = (x.reshape(batch, height * width, channels) for x in parts)
        wide = layers.at_least_float32(x_BhwC.dtype)
        scores_BLM = jnp.einsum('BLC,BMC->BLM', q_BLC, k_BLC, preferred_element_type=wide)
        weights_BLM = jax.nn.softmax(scores_BLM * channels**-0.5).astype(v_BLC.dtype)
        h = jnp.einsum('BLM,BMC->BLC', weights_BLM, v_BLC).reshape(x_BhwC.shape)
        return x_BhwC + layers.conv(channels, 1, init=ZEROS, name='proj_out')(h)


class Encoder(nn.Module):
    """[B, H, W, 3] images -> [B, h, w, channels] features.

    Attributes:
        sizes: the config.
        channels: channels of the features.
    """

    sizes: Autoencoder
    channels: int

    @nn.compact
    def __call__(self, image_BhwC: jax.Array) -> jax.Array:
        sizes = self.sizes
        last = len(sizes.widths) - 1
        h = layers.conv(sizes.width, name='conv_in')(space_to_depth(image_BhwC, sizes.stem))
        for level, width in enumerate(sizes.widths):
            for block in range(sizes.blocks):
                h = ResBlock(width, sizes.groups, name=f'down_{level}_block_{block}')(h)
                if level == last and sizes.attention:
                    h = _attention(sizes, f'down_{level}_attn_{block}')(h)
            if level < last:
                # One zero row below and one zero column to the right, none above or to the left.
                down = layers.conv(
                    width, name=f'down_{level}_downsample', strides=2, padding=(0, 1)
                )
                h = down(h)
        h = _middle(sizes, h)
        h = nn.silu(_norm(sizes.groups, h, 'norm_out'))
        return layers.conv(self.channels, name='conv_out')(h)


class Decoder(nn.Module):
    """[B, h, w, channels] features -> [B, H, W, 3] images, not yet clamped.

    Attributes:
        sizes: the config.
    """

    sizes: Autoencoder

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        sizes = self.sizes
        last = len(sizes.widths) - 1
        h = layers.conv(sizes.widths[-1], name='conv_in')(h)
        h = _middle(sizes, h)
        for level in reversed(range(len(sizes.widths))):
            for block in range(sizes.blocks + 1):
                h = ResBlock(sizes.widths[level], sizes.groups, name=f'up_{level}_block_{block}')(h)
                if level == last and sizes.attention:
                    h = _attention(sizes, f'up_{level}_attn_{block}')(h)
            if level > 0:
                h = h.repeat(2, axis=1).repeat(2, axis=2)
                h = layers.conv(sizes.widths[level], name=f'up_{level}_upsample')(h)
        h = nn.silu(_norm(sizes.groups, h, 'norm_out'))
        return depth_to_space(layers.conv(3 * sizes.stem**2, name='conv_out')(h), sizes.stem)


def space_to_depth(x_BhwC: jax.Array, factor: int) -> jax.Array:
    """Folds factor x factor pixels into channels."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.swapaxes(2, 3).reshape(batch, height // factor, width // factor, -1)


def depth_to_space(x_BhwC: jax.Array, factor: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height, width, factor, factor, channels // factor**2)
    return x.swapaxes(2, 3).reshape(batch, height * factor, width * factor, -1)


def _norm(groups: int, x_BhwC: jax.Array, name: str) -> jax.Array:
    """A group norm of the enclosing module; `groups` as for an `Autoencoder`."""
    by_width = 24 if x_BhwC.shape[-1] % 32 else 32
    return layers.group_norm(groups or by_width, name)(x_BhwC)


def _attention(sizes: Autoencoder, name: str) -> AttnBlock:
    """A self-attention of the enclosing module."""
    return AttnBlock(sizes.groups, sizes.fused_attention, name=name)


def _middle(sizes: Autoencoder, h: jax.Array) -> jax.Array:
    h = ResBlock(sizes.widths[-1], sizes.groups, name='mid_block_1')(h)
    if sizes.attention:
        h = _attention(sizes, 'mid_attn_1')(h)
    return ResBlock(sizes.widths[-1], sizes.groups, name='mid_block_2')(h)
