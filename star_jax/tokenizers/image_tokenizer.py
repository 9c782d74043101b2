"""What do all tokenizers of images share?"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import pixels, resize
from star_jax.core.codes import Codes, Sampled, Targets
from star_jax.core.schedule import Grids, Pyramid, Schedule, Step
from star_jax.nn import layers
from star_jax.protocols import TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig(TokenizerConfig):
    """Sizes of a tokenizer with an `autoencoder` and `grids`, the height and width of each scale in
    tokens."""

    @property
    def cells(self) -> Grids:
        """(height, width) of each scale in cells of the latent."""
        return self.grids

    @property
    def schedule(self) -> Schedule:
        return Pyramid(self.grids)

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        height, width = self.cells[-1]
        return height * self.autoencoder.downsampling, width * self.autoencoder.downsampling

    def abstract(self) -> dict:
        """Shapes of the parameters, boxed with logical axes."""
        return _abstract(self)


@functools.lru_cache(maxsize=16)  # tracing it takes longer than reading a model
def _abstract(config: ImageTokenizerConfig) -> dict:
    # The smallest images: parameters may depend on the number of scales, and on no size.
    config = config.at(Pyramid(((1, 1),) * len(config.grids)))
    images = jax.ShapeDtypeStruct((1, *config.resolution, 3), jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), images)['params']


class ImageTokenizer(nn.Module):
    """Images <-> codes, and the canvas between them.

    Attributes:
        config: its sizes.
        dtype: dtype of the decoder.
        shown: (height, width) to which decoded images are resized (None: they stay).
    """

    config: Any
    dtype: str = 'float32'
    shown: tuple[int, int] | None = None

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule

    @property
    def codes(self) -> Codes:
        return self.config.vocabulary

    @property
    def resolution(self) -> tuple[int, int]:
        return self.config.resolution

    def __call__(self, images_BHWc: jax.Array) -> jax.Array:
        """Reconstructions of images, both in [-1, 1]."""
        return self.decode(self.quantise(self.features(images_BHWc)).canvases[-1])

    def decode(self, canvas_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, 3] images in [-1, 1], resized before they are clamped."""
        images_BHWc = self.decode_unclamped(canvas_BHWC)
        if self.shown:
            images_BHWc = resize.bicubic(images_BHWc, *self.shown)
        return images_BHWc.clip(-1, 1)

    def to_uint8(self, images_BHWc: jax.Array) -> jax.Array:
        """uint8 images of images in [-1, 1], as the published code rounds them."""
        return pixels.to_uint8(images_BHWc)

    def inputs(self, codes_BL: jax.Array) -> jax.Array:
        """[B, L - n_0, C]: the inputs of all steps but the first, under teacher forcing."""
        canvas, inputs = self.blank(len(codes_BL)), []
        for step in range(self.schedule.steps - 1):
            first, end = self.schedule.offsets[step : step + 2]
            codes = codes_BL[:, first:end]
            canvas, following = self.advance(
                canvas, Sampled(codes, self.embed(codes)), Step.at(step)
            )
            inputs.append(following)
        return self.joined(inputs, canvas)

    def joined(self, inputs: list[jax.Array], like_BHWC: jax.Array) -> jax.Array:
        """The inputs of all later steps; empty for a schedule of one step."""
        if inputs:
            return jnp.concatenate(inputs, axis=1)
        return jnp.zeros((len(like_BHWC), 0, self.config.vector_width), jnp.float32)


class CodebookTokenizer(ImageTokenizer):
    """A tokenizer with a codebook, its `quantiser`, between two convolutions."""

    def labels(self, quantised: Any) -> tuple[jax.Array, ...]:
        """Per scale [B, h, w]: the codes."""
        return quantised.codes

    def distances(self, vectors: jax.Array) -> jax.Array:
        """[..., V]: squared distances from all code vectors."""
        return self.quantiser.distances(vectors)

    def encode(self, images_BHWc: jax.Array) -> jax.Array:
        """[B, L] int32 codes of images in [-1, 1]."""
        return self.quantise(self.features(images_BHWc)).codes_BL

    def training_targets(self, encoded_BL: jax.Array, key: jax.Array) -> Targets:
        """Inputs and labels of teacher forcing, from the codes [B, L] of `encode`."""
        return Targets(self.inputs(encoded_BL), encoded_BL)

    def decode_unclamped(self, canvas_BHWC: jax.Array) -> jax.Array:
        """The decoder's image, float32, not clamped."""
        return self.decoder(layers.activations(self.post_quant_conv(canvas_BHWC), self.dtype))
