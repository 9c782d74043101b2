"""How does a map of features become bits at growing scales, and back?

Multi-scale residual quantisation with one bit per channel, the sign (Infinity specification 3.4,
3.5 and 3.7). Each scale takes the signs of what the coarser ones left over; the signs, brought to
full size, add up to the canvas that the decoder turns into an image.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import padding, resize
from star_jax.core.argument_types import check_types
from star_jax.core.codes import Bits, Codes, Index, Sampled, Targets
from star_jax.core.schedule import Grids, Pyramid, Step
from star_jax.core.self_correction import PLAIN, SelfCorrection
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.core.templates import PUBLISHED
from star_jax.errors import UserError
from star_jax.nn import layers
from star_jax.tokenizers.autoencoder import Autoencoder, Decoder, Encoder
from star_jax.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from star_jax.tokenizers.sign_quantiser import (
    PATCH,
    BitTrace,
    Flips,
    decays,
    quantise,
    shuffle,
    unshuffle,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSQ(ImageTokenizerConfig):
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
        check_types(self)
        check_sizes(bits=self.bits)
        if self.indexed:
            check_codes(2**self.vector_width)
        Pyramid(self.grids)  # refuses grids that shrink, or none
        self.autoencoder.check_grid(self.cells[-1])
        if self.features < 0:
            raise UserError(f'features must not be negative (0: the bits), not {self.features}')

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


class ChannelNorm(nn.Module):
    """LayerNorm over channels with learned scale and shift, which start at 1 / sqrt(width).

    Attributes:
        width: number of channels.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def learned(name: str, init: layers.Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, (None,)), (self.width,))

        scale = learned('scale', nn.initializers.constant(self.width**-0.5))
        return layers.layer_norm(x) * scale + learned('bias', nn.initializers.zeros)


class ResidualBSQ(nn.Module):
    """Projections and norm around the bits; all arrays are float32.

    Attributes:
        config: sizes of the tokenizer.
    """

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


class BSQTokenizer(ImageTokenizer):
    """Images <-> bits, and the canvas between them.

    Attributes:
        config: its sizes.
        dtype: dtype of the decoder.
        correction: which bits training flips.
        gives_features: `encode` gives features although no bits are flipped.
    """

    correction: SelfCorrection = PLAIN
    gives_features: bool = False

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config.autoencoder, config.features or config.bits)
        self.quantiser = ResidualBSQ(config)
        self.decoder = Decoder(config.autoencoder)

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
        return Targets(self.joined(inputs, f_BhwK), self.token_codes(trace))

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

    def _tokens(self, x_BhwK: jax.Array) -> jax.Array:
        """[B, L, D] tokens of one map of cells."""
        x = unshuffle(x_BhwK) if self.config.patchify else x_BhwK
        return x.reshape(len(x), -1, x.shape[-1])
