"""How does a map of features become codes at growing scales, and back?

The multi-scale residual quantiser (STAR specification 1.5-1.8) of VAR and STAR. Each scale
quantises what the coarser ones left over; its code vectors, brought to full size and passed
through a phi convolution, add up to the canvas that the decoder turns into an image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import padding, resize
from star_jax.core.argument_types import check_types
from star_jax.core.codes import Index, Sampled
from star_jax.core.schedule import Grids, Pyramid, Step, square_grids
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.errors import UserError
from star_jax.nn import layers
from star_jax.tokenizers.autoencoder import Autoencoder, Decoder, Encoder
from star_jax.tokenizers.image_tokenizer import CodebookTokenizer, ImageTokenizerConfig

# Which of four phi convolutions serves each of K scales. At K = 10 scales 2 and 7 lie exactly
# between two; only the rounding of the published float64 code decides (STAR specification 1.5).
PHI_OF_FOUR = {
    2: (0, 3),
    3: (0, 2, 3),
    4: (0, 1, 2, 3),
    5: (0, 1, 2, 2, 3),
    6: (0, 0, 1, 2, 3, 3),
    7: (0, 0, 1, 2, 2, 3, 3),
    8: (0, 0, 1, 1, 2, 2, 3, 3),
    9: (0, 0, 1, 1, 2, 2, 2, 3, 3),
    10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    11: (0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3),
    12: (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
    13: (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
    14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
    15: (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
    16: (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQ(ImageTokenizerConfig):
    """An image tokenizer with residual codes per scale; the defaults are the published ones.

    Attributes:
        autoencoder: sizes of the encoder and the decoder.
        grids: height and width of each scale in tokens, from coarse to fine.
        codes: number of entries of the codebook.
        channels: channels of a code vector.
        phis: number of phi convolutions (1: shared by all scales; as many as scales: one each).
        phi_ratio: share of a phi convolution's output in the map that a scale adds to the canvas.
        normalised: look codes up by direction (cosine) instead of distance.
    """

    autoencoder: Autoencoder = Autoencoder()
    grids: Grids = square_grids((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    codes: int = 4096
    channels: int = 32
    phis: int = 4
    phi_ratio: float = 0.5
    normalised: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_codes(self.codes)
        check_sizes(channels=self.channels, phis=self.phis)
        Pyramid(self.grids)  # refuses grids that shrink, or none
        self.autoencoder.check_grid(self.grids[-1])
        if not 0 <= self.phi_ratio <= 1:
            raise UserError(f'phi_ratio must lie in [0, 1], not {self.phi_ratio}')

    @property
    def vocabulary(self) -> Index:
        """The codes of one token."""
        return Index(self.codes)

    @property
    def vector_width(self) -> int:
        return self.channels

    def at(self, schedule: Pyramid) -> 'VQ':
        """This tokenizer with other scales, as one published file serves 10 and 14 of them.

        Raises UserError where each scale has a phi convolution of its own and their number differs.
        """
        scales = len(schedule.grids)
        if self.phis == len(self.grids) != scales and self.phis not in (1, 4):
            raise UserError(
                f'this tokenizer has one phi convolution for each of its {self.phis} scales '
                f'and cannot serve {scales}: choose as many scales'
            )
        return dataclasses.replace(self, grids=schedule.grids)

    def build(self, dtype: str = 'float32') -> 'VQTokenizer':
        """The tokenizer, whose decoder has activations of `dtype` if its parameters have."""
        return VQTokenizer(self, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """The result of quantising features f; gradients flow through it to codebook and phi.

    Attributes:
        codes: per scale [B, h, w] int32.
        targets: per scale [B, h, w, C], the vectors whose nearest code was searched.
        canvases: per scale [B, H, W, C], the sum of the scales so far.
    """

    codes: tuple[jax.Array, ...]
    targets: tuple[jax.Array, ...]
    canvases: tuple[jax.Array, ...]

    @property
    def codes_BL(self) -> jax.Array:
        return jnp.concatenate([codes.reshape(len(codes), -1) for codes in self.codes], axis=1)

    def commitments(self, f_BHWC: jax.Array) -> list[jax.Array]:
        """The mean squared distance of the features from each canvas, which stays."""
        stop = jax.lax.stop_gradient
        return [jnp.square(stop(canvas) - f_BHWC).mean() for canvas in self.canvases]

    def distortions(self, f_BHWC: jax.Array) -> list[jax.Array]:
        """The mean squared distance of each canvas from the features, which stay."""
        stop = jax.lax.stop_gradient
        return [jnp.square(canvas - stop(f_BHWC)).mean() for canvas in self.canvases]

    def losses(self, f_BHWC: jax.Array, commitment: float) -> jax.Array:
        """[K] commitment and codebook loss of each scale (STAR specification 1.8).

        VAR averages over the scales; STAR's modified file sums.
        """
        parts = zip(self.commitments(f_BHWC), self.distortions(f_BHWC), strict=True)
        return jnp.stack([commitment * pulled + moved for pulled, moved in parts])

    def straight_through(self, f_BHWC: jax.Array) -> jax.Array:
        """The last canvas, with the gradient of the identity to f and none to the codebook."""
        return f_BHWC + jax.lax.stop_gradient(self.canvases[-1] - f_BHWC)


class ResidualVQ(nn.Module):
    """Codebook and phi convolutions; all arrays are float32, products have full precision.

    Attributes:
        schedule: grids of the scales.
        codes: entries of the codebook.
        channels: channels of a code vector.
        phis: phi convolutions.
        phi_ratio: share of the convolution in the output of a phi.
        normalised: compare directions instead of distances.
    """

    schedule: Pyramid
    codes: int
    channels: int
    phis: int
    phi_ratio: float
    normalised: bool

    def setup(self) -> None:
        partitioned = nn.with_logical_partitioning
        scattered = nn.initializers.uniform(2 / self.codes)
        self.codebook = self.param(
            'codebook',
            partitioned(lambda *args: scattered(*args) - 1 / self.codes, ('codes', None)),
            (self.codes, self.channels),
        )
        kernel = (self.phis, 3, 3, self.channels, self.channels)
        zeros = nn.initializers.zeros
        self.phi_kernel = self.param(
            'phi_kernel', partitioned(_identity_kernels, (None,) * 4 + ('channels',)), kernel
        )
        self.phi_bias = self.param(
            'phi_bias', partitioned(zeros, (None, 'channels')), (self.phis, self.channels)
        )

    def embed(self, codes: jax.Array) -> jax.Array:
        """Code vectors, [..., C]."""
        return self.codebook[codes]

    def mix(self, weights_BLV: jax.Array) -> jax.Array:
        """Weighted means of the code vectors, [B, L, C]."""
        return jnp.matmul(weights_BLV, self.codebook, precision='highest')

    def search(self, z: jax.Array) -> jax.Array:
        """The nearest code of every vector, int32; the lowest on ties."""
        return self.distances(z).argmin(-1).astype(jnp.int32)

    def distances(self, z: jax.Array) -> jax.Array:
        """[..., V]: squared distances from all code vectors; cosines, negative, if normalised."""
        if self.normalised:
            return -jnp.matmul(layers.unit(z), layers.unit(self.codebook).T, precision='highest')
        return squared_distances(z, self.codebook)

    def refine(self, vectors_BhwC: jax.Array, step: Step) -> jax.Array:
        """The maps that a scale adds to the canvas: its vectors at full size, through its phi."""
        return self._convolve(resize.bicubic(vectors_BhwC, *self.schedule.grids[-1]), step)

    def _convolve(self, full: jax.Array, step: Step) -> jax.Array:
        """Maps of full size, through the phi of a scale."""
        phi = jnp.asarray(phi_of_scale(self.phis, self.schedule.steps))[step.index]
        convolved = jax.lax.conv_general_dilated(
            full,
            self.phi_kernel[phi],
            window_strides=(1, 1),
            padding='SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            precision='highest',
        )
        return (1 - self.phi_ratio) * full + self.phi_ratio * (convolved + self.phi_bias[phi])

    def quantise(self, f_BHWC: jax.Array) -> Quantised:
        """Finds, scale by scale, the nearest codes of the residual (STAR specification 1.6)."""
        codes, targets, canvases = [], [], []
        canvas = jnp.zeros_like(f_BHWC)
        for step, (height, width) in enumerate(self.schedule.grids):
            rest = jax.lax.stop_gradient(f_BHWC - canvas)
            targets.append(resize.area(rest, height, width))
            codes.append(self.search(targets[-1]))
            canvas = canvas + self.refine(self.embed(codes[-1]), Step.at(step))
            canvases.append(canvas)
        return Quantised(tuple(codes), tuple(targets), tuple(canvases))

    def blank(self, batch: int) -> jax.Array:
        """The canvas before the first step."""
        return jnp.zeros((batch, *self.schedule.grids[-1], self.channels), jnp.float32)

    def advance(
        self, canvas_BHWC: jax.Array, sampled: Sampled, step: Step
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds a step's vectors. Returns the canvas and the next inputs, None after the end."""
        grids = self.schedule.grids
        if step.padded:
            alike = grids[: step.like + 1]
            vectors_BhwC = padding.place(sampled.vectors_BLC, alike, step.index)
            full = padding.enlarge(
                vectors_BhwC, alike, step.index, grids[-1], resize.bicubic_matrix
            )
            canvas_BHWC = canvas_BHWC + self._convolve(full, step)
        else:
            vectors_BhwC = sampled.vectors_BLC.reshape(-1, *grids[step.like], self.channels)
            canvas_BHWC = canvas_BHWC + self.refine(vectors_BhwC, step)
        return canvas_BHWC, self.following(canvas_BHWC, step)

    def following(self, canvas_BHWC: jax.Array, step: Step) -> jax.Array | None:
        """The inputs of the step after `step`, [B, L, C], None after the end."""
        after = step.next()
        if after.like == self.schedule.steps:
            return None
        if after.padded:
            alike = self.schedule.grids[: after.like + 1]
            small = padding.shrink(canvas_BHWC, alike, after.index, resize.area_matrix)
            return padding.take(small, alike, after.index)
        inputs = resize.area(canvas_BHWC, *self.schedule.grids[after.like])
        return inputs.reshape(len(inputs), -1, self.channels)


class VQTokenizer(CodebookTokenizer):
    """Images <-> codes, and the canvas between them.

    Attributes:
        config: the sizes.
        dtype: dtype of the decoder's activations.
    """

    def setup(self) -> None:
        config = self.config
        latent = config.autoencoder.latent or config.channels
        self.encoder = Encoder(config.autoencoder, latent)
        self.quant_conv = layers.conv(config.channels)
        self.quantiser = ResidualVQ(
            schedule=self.schedule,
            codes=config.codes,
            channels=config.channels,
            phis=config.phis,
            phi_ratio=config.phi_ratio,
            normalised=config.normalised,
        )
        self.post_quant_conv = layers.conv(latent)
        self.decoder = Decoder(config.autoencoder)

    def features(self, images_BHWc: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, h, w, C]."""
        return self.quant_conv(self.encoder(images_BHWc))

    def quantise(self, f_BHWC: jax.Array) -> Quantised:
        return self.quantiser.quantise(f_BHWC)

    def embed(self, codes_BL: jax.Array) -> jax.Array:
        return self.quantiser.embed(codes_BL)

    def mix(self, weights_BLV: jax.Array) -> jax.Array:
        return self.quantiser.mix(weights_BLV)

    def blank(self, batch: int) -> jax.Array:
        return self.quantiser.blank(batch)

    def advance(
        self, canvas_BHWC: jax.Array, sampled: Sampled, step: Step
    ) -> tuple[jax.Array, jax.Array | None]:
        return self.quantiser.advance(canvas_BHWC, sampled, step)

    def following(self, canvas_BHWC: jax.Array, step: Step) -> jax.Array | None:
        return self.quantiser.following(canvas_BHWC, step)


def squared_distances(z: jax.Array, vectors_VC: jax.Array) -> jax.Array:
    """[..., V]: squared distances of z [..., C] from all vectors; products have full precision."""
    products = jnp.matmul(z, vectors_VC.T, precision='highest')
    squares = jnp.square(z).sum(-1, keepdims=True) + jnp.square(vectors_VC).sum(-1)
    return squares - 2 * products


def phi_of_scale(phis: int, scales: int) -> tuple[int, ...]:
    """Which phi convolution serves each scale (STAR specification 1.5)."""
    if phis == 4 and scales in PHI_OF_FOUR:
        return PHI_OF_FOUR[scales]
    margin = 1 / (3 * phis) if phis == 4 else 1 / (2 * phis)
    ticks = np.linspace(margin, 1 - margin, phis)
    places = np.arange(scales) / max(scales - 1, 1)
    return tuple(int(np.abs(ticks - place).argmin()) for place in places)


def _identity_kernels(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Each phi starts near the identity, so that the first codes mean something."""
    noise = 0.01 * jax.random.normal(key, shape, dtype)
    return noise.at[:, 1, 1].add(jnp.eye(shape[-1], dtype=dtype))
