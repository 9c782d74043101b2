"""How does a map of features become bits at growing scales, and back?

Multi-scale residual quantisation with one bit per channel, the sign (Infinity specification 3.4,
3.5 and 3.7). Each scale takes the signs of what the coarser ones left over; the signs, brought to
full size, add up to the canvas that the decoder turns into an image. Maps have any number of axes
between the first and the last: (height, width) of images, (time, height, width) of video.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import padding, pixels, resize
from star_jax.core.codes import Bits, Codes, Index, Sampled, Targets
from star_jax.core.schedule import Grids, Pyramid, Step
from star_jax.core.self_correction import PLAIN, SelfCorrection
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.core.templates import PUBLISHED
from star_jax.nn import layers
from star_jax.protocols import TokenizerConfig
from star_jax.tokenizers.autoencoder import Autoencoder, Decoder, Encoder

Sizes = tuple[tuple[int, ...], ...]  # of every scale, one number per axis
Flips = Callable[[int, tuple[int, ...]], jax.Array | None]  # (step, shape) -> flipped bits

SMALL = 0.05  # a residual is small below this share of the size of a code
DECAY, LEAST = 0.1, 0.1  # what codes lose per scale where they decay, and what stays at least
PATCH = 2  # cells of a token along each side where neighbouring cells are joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSQ(TokenizerConfig):
    """An image tokenizer with residual bits per scale; the defaults are the published d = 32.

    Attributes:
        autoencoder: sizes of the encoder and the decoder.
        grids: height and width of each scale in tokens, from coarse to fine.
        bits: bits of a cell of the latent.
        patchify: a token is 2 x 2 cells, and so has four times as many bits (published 8B model).
        features: channels between encoder and quantiser (0: the bits; others are projected).
        normalised: normalise the channels before the first scale, with learned scale and shift.
        decay: scale s adds max(0.1, 1 - 0.1 s) of its codes to the canvas.
        indexed: a token is one of 2^bits codes instead of its bits, the first bit the highest; for
            comparisons, not published.
    """

    has_codebook: ClassVar[bool] = False

    autoencoder: Autoencoder = Autoencoder(
        width=128, multipliers=(1, 2, 4, 4, 4), groups=0, attention=False
    )
    grids: Grids = PUBLISHED.by_name['1.0']
    bits: int = 32
    patchify: bool = False
    features: int = 0
    normalised: bool = False
    decay: bool = False
    indexed: bool = False

    def __post_init__(self) -> None:
        check_sizes(bits=self.bits)
        if self.indexed:
            check_codes(2**self.vector_width)
        Pyramid(self.grids)  # refuses grids that shrink, or none
        self.autoencoder.check_grid(self.cells[-1])
        if self.features < 0:
            raise ValueError(f'features must not be negative (0: the bits), not {self.features}')

    @property
    def schedule(self) -> Pyramid:
        return Pyramid(self.grids)

    @property
    def projected(self) -> bool:
        """Whether features have other channels than the bits."""
        return self.features not in (0, self.bits)

    @property
    def cells(self) -> Grids:
        """(height, width) of each scale in cells of the latent."""
        side = PATCH if self.patchify else 1
        return tuple((side * height, side * width) for height, width in self.grids)

    @property
    def vocabulary(self) -> Codes:
        """The codes of one token."""
        return Index(2**self.vector_width) if self.indexed else Bits(self.vector_width)

    @property
    def vector_width(self) -> int:
        return self.bits * PATCH**2 if self.patchify else self.bits

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        height, width = self.cells[-1]
        return height * self.autoencoder.downsampling, width * self.autoencoder.downsampling

    def at(self, schedule: Pyramid) -> 'BSQ':
        """This tokenizer with other scales: no parameter depends on them."""
        return dataclasses.replace(self, grids=schedule.grids)

    def build(self, dtype: str = 'float32') -> 'BSQTokenizer':
        """The tokenizer, whose decoder has activations of `dtype` if its parameters have."""
        return BSQTokenizer(self, dtype)

    def build_training(
        self, correction: SelfCorrection = PLAIN, features: bool = False
    ) -> 'BSQTokenizer':
        """The tokenizer with flipped bits in its training targets, which need `features`."""
        return BSQTokenizer(self, correction=correction, gives_features=features)

    def abstract(self) -> dict:
        """Shapes of the parameters, boxed with logical axes."""
        return _abstract(self)


@functools.lru_cache(maxsize=16)  # tracing it takes longer than reading a model
def _abstract(config: BSQ) -> dict:
    # The smallest image: the parameters depend on no size.
    config = dataclasses.replace(config, grids=((1, 1),))
    images = jax.ShapeDtypeStruct((1, *config.resolution, 3), jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), images)['params']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitTrace:
    """What happened at every scale, with K channels.

    Attributes:
        bits: per scale [B, *size, K] int8: the signs, before any flip.
        residuals: per scale [B, *size, K]: what the signs were taken of.
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
            layers.unit(residual) - code_vectors(bits)
            for residual, bits in zip(self.residuals, self.bits, strict=True)
        ]
        return commitment * jnp.stack([jnp.square(error).mean() for error in errors])

    def straight_through(self, f: jax.Array) -> jax.Array:
        """The last canvas; its gradient flows through the directions of the residuals."""
        return self.canvases[-1]


def code_vectors(bits: jax.Array) -> jax.Array:
    """Vectors of length 1 for the bits on the last axis, float32."""
    return (2 * bits.astype(jnp.float32) - 1) / math.sqrt(bits.shape[-1])


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
        sizes: of every scale; the last is the full size.
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
        code = direction + jax.lax.stop_gradient(code_vectors(bits) - direction)
        flip = flips(step, bits.shape) if flips else None
        used = code if flip is None else code_vectors(bits ^ flip)
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


class ChannelNorm(nn.Module):
    """LayerNorm over channels with learned scale and shift, which start at 1 / sqrt(width)."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def learned(name: str, init: layers.Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, (None,)), (self.width,))

        scale = learned('scale', nn.initializers.constant(self.width**-0.5))
        return layers.layer_norm(x) * scale + learned('bias', nn.initializers.zeros)


class ResidualBSQ(nn.Module):
    """Projections and norm around the bits; all arrays are float32."""

    config: BSQ

    def setup(self) -> None:
        bits, features = self.config.bits, self.config.features
        init, axes = nn.initializers.lecun_normal(), (None, None)
        if self.config.projected:
            self.project_in = layers.Linear(features, bits, axes, init)
            self.project_out = layers.Linear(bits, features, axes, init)
        if self.config.normalised:
            self.norm = ChannelNorm(bits)

    def __call__(self, f: jax.Array) -> jax.Array:
        """There and back, which creates all parameters."""
        return self.leave(self.enter(f))

    def enter(self, f: jax.Array) -> jax.Array:
        """[..., features] -> [..., bits] that are quantised."""
        f = self.project_in(f) if self.config.projected else f
        return self.norm(f) if self.config.normalised else f

    def leave(self, canvas: jax.Array) -> jax.Array:
        """A canvas [..., bits] as the decoder reads it, [..., features]."""
        return self.project_out(canvas) if self.config.projected else canvas


class BSQTokenizer(nn.Module):
    """Images <-> bits, and the canvas between them.

    Attributes:
        config: its sizes.
        dtype: of the decoder.
        correction: which bits training flips.
        gives_features: `encode` gives features although no bits are flipped.
    """

    config: BSQ
    dtype: str = 'float32'
    correction: SelfCorrection = PLAIN
    gives_features: bool = False

    @property
    def schedule(self) -> Pyramid:
        return self.config.schedule

    @property
    def codes(self) -> Codes:
        return self.config.vocabulary

    @property
    def resolution(self) -> tuple[int, int]:
        return self.config.resolution

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config.autoencoder, config.features or config.bits)
        self.quantiser = ResidualBSQ(config)
        self.decoder = Decoder(config.autoencoder)

    def __call__(self, images_BHWc: jax.Array) -> jax.Array:
        """Reconstructions of images, both in [-1, 1]."""
        return self.decode(self.quantise(self.features(images_BHWc)).canvases[-1])

    def features(self, images_BHWc: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, h, w, K] float32: what is quantised."""
        return self.quantiser.enter(self.encoder(images_BHWc))

    def quantise(self, f_BhwK: jax.Array, flips: Flips | None = None) -> BitTrace:
        return quantise(f_BhwK, self.config.cells, self.config.decay, flips=flips)

    def encode(self, images_BHWc: jax.Array) -> jax.Array:
        """Packed bits [B, L, bytes] of images in [-1, 1], or features [B, h, w, K].

        The labels of a scale depend on the flips before it, so only features serve a
        self-correction.
        """
        f_BhwK = self.features(images_BHWc)
        if self.correction.active or self.gives_features:
            return f_BhwK
        return self.codes.pack(self.token_codes(self.quantise(f_BhwK)))

    def training_targets(self, encoded: jax.Array, key: jax.Array) -> Targets:
        """Inputs and labels of teacher forcing, from features or packed bits of `encode`.

        Raises UserError for packed bits where bits are flipped.
        """
        if jnp.issubdtype(encoded.dtype, jnp.floating):
            return self.corrected(encoded, functools.partial(self.correction.flips, key))
        self.correction.check_bits()
        codes_BLK = self.codes.unpack(encoded)
        return Targets(self.inputs(codes_BLK), codes_BLK)

    def corrected(self, f_BhwK: jax.Array, flips: Flips) -> Targets:
        """Inputs and labels of features, with given flips (Infinity specification 4)."""
        trace = self.quantise(f_BhwK, flips)
        inputs = [
            self.following(canvas, Step.at(step)) for step, canvas in enumerate(trace.canvases[:-1])
        ]
        return Targets(_concatenated(inputs, f_BhwK), self.token_codes(trace))

    def tokens(self, maps: tuple[jax.Array, ...]) -> jax.Array:
        """[B, L, D]: maps [B, h, w, K] of all scales in cells, as tokens in row order."""
        return jnp.concatenate([self._tokens(x_BhwK) for x_BhwK in maps], axis=1)

    def token_codes(self, trace: BitTrace) -> jax.Array:
        """[B, L, D] bits of all tokens, or their indices [B, L]."""
        return self._codes(self.tokens(trace.bits))

    def labels(self, trace: BitTrace) -> list[jax.Array]:
        """Per scale [B, L, D]: the bits of its tokens, or their indices [B, L]."""
        return [self._codes(self._tokens(bits)) for bits in trace.bits]

    def _codes(self, bits_BLD: jax.Array) -> jax.Array:
        """The codes of tokens of bits."""
        if not self.config.indexed:
            return bits_BLD
        return (bits_BLD.astype(jnp.int32) << self._places).sum(-1)

    @property
    def _places(self) -> jax.Array:
        """[D]: the place of every bit in an index."""
        return jnp.arange(self.config.vector_width - 1, -1, -1)

    def decode_unclamped(self, canvas_BhwK: jax.Array) -> jax.Array:
        """The decoder's image, float32, not clamped."""
        return self.decoder(layers.activations(self.quantiser.leave(canvas_BhwK), self.dtype))

    def decode(self, canvas_BhwK: jax.Array) -> jax.Array:
        """[B, H, W, 3] images in [-1, 1]."""
        return self.decode_unclamped(canvas_BhwK).clip(-1, 1)

    def to_uint8(self, images_BHWc: jax.Array) -> jax.Array:
        """uint8 images of images in [-1, 1], as the published code rounds them."""
        return pixels.to_uint8(images_BHWc)

    def embed(self, codes_BLK: jax.Array) -> jax.Array:
        """[B, L, D] vectors of bits or indices: a cell of a token has length 1."""
        if self.config.indexed:
            codes_BLK = (codes_BLK[..., None] >> self._places) & 1
        return (2 * codes_BLK.astype(jnp.float32) - 1) / math.sqrt(self.config.bits)

    def mix(self, weights_BLKV: jax.Array) -> jax.Array:
        """[B, L, D]: means of the vectors, weighted by probabilities [B, L, D, 2] of the bits, or
        [B, L, V] of the indices."""
        if self.config.indexed:
            return weights_BLKV @ self.embed(jnp.arange(self.codes.num_codes))
        difference = weights_BLKV[..., 1] - weights_BLKV[..., 0]
        return difference / math.sqrt(self.config.bits)

    def blank(self, batch: int) -> jax.Array:
        """The canvas before the first step."""
        return jnp.zeros((batch, *self.config.cells[-1], self.config.bits), jnp.float32)

    def advance(
        self, canvas_BhwK: jax.Array, sampled: Sampled, step: Step
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds a step's vectors. Returns the canvas and the next inputs, None after the end."""
        tokens_BLD, config, linear = sampled.vectors_BLC, self.config, resize.linear_matrix
        alike, full = slice(step.like + 1), config.cells[-1]
        if step.padded:
            vectors = padding.place(tokens_BLD, config.grids[alike], step.index)
        else:
            vectors = tokens_BLD.reshape(-1, *config.grids[step.like], self.config.vector_width)
        cells = shuffle(vectors) if config.patchify else vectors
        cells = jnp.asarray(decays(self.schedule.steps, config.decay))[step.index] * cells
        if step.padded:
            added = padding.enlarge(cells, config.cells[alike], step.index, full, linear)
        else:
            added = resize.along_axes(cells, full, linear)
        canvas_BhwK = canvas_BhwK + added
        return canvas_BhwK, self.following(canvas_BhwK, step)

    def following(self, canvas_BhwK: jax.Array, step: Step) -> jax.Array | None:
        """The inputs of the step after `step`, [B, L, D], None after the end.

        The canvas is resampled linearly, not averaged as in the quantiser.
        """
        after = step.next()
        if after.like == self.schedule.steps:
            return None
        config, linear = self.config, resize.linear_matrix
        if not after.padded:
            return self._tokens(resize.along_axes(canvas_BhwK, config.cells[after.like], linear))
        alike = slice(after.like + 1)
        cells = padding.shrink(canvas_BhwK, config.cells[alike], after.index, linear)
        tokens = unshuffle(cells) if config.patchify else cells
        return padding.take(tokens, config.grids[alike], after.index)

    def inputs(self, codes_BLK: jax.Array) -> jax.Array:
        """[B, L - n_0, D]: the inputs of all steps but the first, under teacher forcing."""
        canvas, inputs = self.blank(len(codes_BLK)), []
        for step in range(self.schedule.steps - 1):
            first, end = self.schedule.offsets[step : step + 2]
            codes = codes_BLK[:, first:end]
            sampled = Sampled(codes, self.embed(codes))
            canvas, following = self.advance(canvas, sampled, Step.at(step))
            inputs.append(following)
        return _concatenated(inputs, canvas)

    def _tokens(self, x_BhwK: jax.Array) -> jax.Array:
        """[B, L, D] tokens of one map of cells."""
        x = unshuffle(x_BhwK) if self.config.patchify else x_BhwK
        return x.reshape(len(x), -1, x.shape[-1])


def _concatenated(inputs: list[jax.Array], like_BhwK: jax.Array) -> jax.Array:
    """The inputs of all later steps; empty for a schedule of one step."""
    if inputs:
        return jnp.concatenate(inputs, axis=1)
    return jnp.zeros((len(like_BhwK), 0, like_BhwK.shape[-1]), jnp.float32)
