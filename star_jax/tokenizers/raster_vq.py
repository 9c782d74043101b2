"""How does a map of features become one grid of codes, and back?

The single-scale quantiser of LlamaGen (LlamaGen specification 1.5): every cell has one code, the
nearest vector of the codebook. The codes are predicted one by one, in row order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import pixels
from star_jax.core.argument_types import check_types
from star_jax.core.codes import Index, Sampled
from star_jax.core.schedule import Grids, Pyramid, Raster, Step
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.errors import UserError
from star_jax.nn import layers
from star_jax.tokenizers.autoencoder import Autoencoder, Decoder, Encoder
from star_jax.tokenizers.image_tokenizer import CodebookTokenizer, ImageTokenizerConfig
from star_jax.tokenizers.residual_vq import Quantised, squared_distances

PUBLISHED = Autoencoder(width=128, latent=256, fused_attention=False)  # 16 px a code: VQ-16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RasterVQ(ImageTokenizerConfig):
    """An image tokenizer with one code per cell; the defaults are the published VQ-16 at 256 px.

    Attributes:
        autoencoder: sizes of the encoder and the decoder.
        grid: height and width of an image in tokens.
        codes: number of entries of the codebook.
        channels: channels of a code vector.
        normalised: features and code vectors have length 1, each when it is used.
    """

    autoencoder: Autoencoder = PUBLISHED
    grid: tuple[int, int] = (16, 16)
    codes: int = 16384
    channels: int = 8
    normalised: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_codes(self.codes)
        check_sizes(channels=self.channels)
        Raster(*self.grid)  # refuses empty grids
        self.autoencoder.check_grid(self.grid)

    @property
    def grids(self) -> Grids:
        """The grid of the only scale."""
        return (self.grid,)

    @property
    def schedule(self) -> Raster:
        return Raster(*self.grid)

    @property
    def vocabulary(self) -> Index:
        """The codes of one token."""
        return Index(self.codes)

    @property
    def vector_width(self) -> int:
        return self.channels

    def at(self, schedule: Raster | Pyramid) -> 'RasterVQ':
        """This tokenizer with another grid: no parameter depends on it.

        Raises UserError for more than one scale.
        """
        if len(schedule.grids) != 1:
            raise UserError(
                f'this tokenizer has one scale and cannot serve the {len(schedule.grids)} of '
                f'{schedule.grids}: give one grid'
            )
        return dataclasses.replace(self, grid=schedule.grids[0])

    def build(self, dtype: str = 'float32') -> 'RasterVQTokenizer':
        """The tokenizer, whose decoder has activations of `dtype` if its parameters have."""
        return RasterVQTokenizer(self, dtype)


class Codebook(nn.Module):
    """The vectors of all codes; all arrays are float32, products have full precision.

    Attributes:
        codes: number of vectors.
        channels: channels of a vector.
        normalised: vectors have length 1 when they are used, however they are stored.
    """

    codes: int
    channels: int
    normalised: bool

    def setup(self) -> None:
        self.codebook = self.param(
            'codebook',
            nn.with_logical_partitioning(self._init, ('codes', None)),
            (self.codes, self.channels),
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """The nearest vectors, which creates the parameter."""
        return self.vectors[self.distances(z).argmin(-1)]

    @property
    def vectors(self) -> jax.Array:
        """[V, C]: all vectors as they are used."""
        return layers.unit(self.codebook) if self.normalised else self.codebook

    def enter(self, f: jax.Array) -> jax.Array:
        """Features [..., C] as they are compared with the vectors."""
        return layers.unit(f) if self.normalised else f

    def distances(self, z: jax.Array) -> jax.Array:
        """[..., V]: squared distances to all vectors."""
        return squared_distances(z, self.vectors)

    def _init(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
        """Uniform in [-1 / V, 1 / V], then of length 1 if vectors are normalised."""
        vectors = jax.random.uniform(key, shape, dtype, -1 / self.codes, 1 / self.codes)
        return layers.unit(vectors) if self.normalised else vectors


class RasterVQTokenizer(CodebookTokenizer):
    """Images <-> codes, and the canvas of code vectors between them.

    Attributes:
        config: the sizes.
        dtype: dtype of the decoder's activations.
    """

    def setup(self) -> None:
        config = self.config
        latent = config.autoencoder.latent or config.channels
        self.encoder = Encoder(config.autoencoder, latent)
        self.quant_conv = layers.conv(config.channels, 1)
        self.quantiser = Codebook(config.codes, config.channels, config.normalised)
        self.post_quant_conv = layers.conv(latent, 1)
        self.decoder = Decoder(config.autoencoder)

    def features(self, images_BHWc: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, h, w, C], compared with code vectors."""
        return self.quantiser.enter(self.quant_conv(self.encoder(images_BHWc)))

    def quantise(self, f_BhwC: jax.Array) -> Quantised:
        """The nearest codes, the lowest on ties, and their vectors as the only canvas."""
        codes_Bhw = self.quantiser.distances(f_BhwC).argmin(-1).astype(jnp.int32)
        return Quantised((codes_Bhw,), (f_BhwC,), (self.embed(codes_Bhw),))

    def to_uint8(self, images_BHWc: jax.Array) -> jax.Array:
        """uint8 images of images in [-1, 1], as the published code rounds them."""
        return pixels.to_nearest_uint8(images_BHWc)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Code vectors, [..., C]."""
        return self.quantiser.enter(self.quantiser.codebook[codes])

    def mix(self, weights_BLV: jax.Array) -> jax.Array:
        """Weighted means of the code vectors, [B, L, C]."""
        return jnp.matmul(weights_BLV, self.quantiser.vectors, precision='highest')

    def blank(self, batch: int) -> jax.Array:
        """The canvas before the first step."""
        return jnp.zeros((batch, *self.config.grid, self.config.channels), jnp.float32)

    def advance(
        self, canvas_BhwC: jax.Array, sampled: Sampled, step: Step
    ) -> tuple[jax.Array, jax.Array | None]:
        """Writes the vector of a token. The next inputs are its code [B, 1], None after the end."""
        rows_BLC = canvas_BhwC.reshape(len(canvas_BhwC), -1, self.config.channels)
        rows_BLC = jax.lax.dynamic_update_slice_in_dim(
            rows_BLC, sampled.vectors_BLC.astype(rows_BLC.dtype), step.index, axis=1
        )
        last = step.like + 1 == self.schedule.steps
        return rows_BLC.reshape(canvas_BhwC.shape), None if last else sampled.codes_BL

    def inputs(self, codes_BL: jax.Array) -> jax.Array:
        """[B, L - 1] int32: the codes of all tokens but the last, under teacher forcing."""
        return codes_BL[:, :-1]
