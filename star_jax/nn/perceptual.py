"""What is the perceptual distance of two images?

LPIPS: the squared difference of VGG-16 features, normalised to unit length at each position and
weighted per channel by learned heads (LlamaGen specification 1.6). The dropout of the heads'
training is left out.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.errors import UserError

STAGES = (2, 2, 3, 3, 3)  # convolutions of each stage; a 2 x 2 max-pool opens all but the first
MIN_SIDE = 2 ** (len(STAGES) - 1)  # px; the pools leave one position of it
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10  # added to the length of a feature vector


@flax.struct.dataclass
class Lpips:
    """The network and its weights. A pytree: pass it to a jitted program as an argument, so that
    59 MB of constants stay out of the program.

    Attributes:
        convs: kernel [3, 3, in, out] and bias [out] of each convolution.
        heads_C: for each stage one weight per channel of its last features.
    """

    convs: tuple[tuple[jax.Array, jax.Array], ...]
    heads_C: tuple[jax.Array, ...]

    def __call__(self, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """The distances of pairs of images.

        Args:
            images: [B, H, W, 3] in [-1, 1].
            decoded: [B, H, W, 3], compared with `images`.

        Returns:
            [B], at least float32; 0 for equal images.

        Raises:
            UserError: images of fewer than 16 px.
        """
        if min(images.shape[1:3]) < MIN_SIDE:
            raise UserError(
                f'the perceptual loss needs images of at least {MIN_SIDE} px, '
                f'not {images.shape[1]} x {images.shape[2]}: set its weight to 0'
            )
        distance_B = 0
        stages = zip(self.features(images), self.features(decoded), self.heads_C, strict=True)
        for f_BhwC, other_BhwC, head_C in stages:
            difference_BhwC = unit_vectors(f_BhwC) - unit_vectors(other_BhwC)
            distance_B += (jnp.square(difference_BhwC) @ head_C).mean((1, 2))
        return distance_B

    def features(self, x_BhwC: jax.Array) -> list[jax.Array]:
        """The last features of each stage, [B, h, w, C], from fine to coarse."""
        x_BhwC = (x_BhwC - SHIFT) / SCALE
        convs, features = iter(self.convs), []
        for stage, count in enumerate(STAGES):
            if stage:
                x_BhwC = nn.max_pool(x_BhwC, (2, 2), (2, 2))
            for _ in range(count):
                x_BhwC = _convolve(x_BhwC, *next(convs))
            features.append(x_BhwC)
        return features


def unit_vectors(f_BhwC: jax.Array) -> jax.Array:
    """f / (length + 1e-10) over channels; zero, with zero gradient, where f is all zero."""
    square = jnp.square(f_BhwC).sum(-1, keepdims=True)
    # The gradient of the root is infinite at zero, so zeros are replaced before it.
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, f_BhwC / (length + EPSILON), 0)


def _convolve(x_BhwC: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    axes = ('NHWC', 'HWIO', 'NHWC')
    kernel, bias = (jnp.asarray(array, x_BhwC.dtype) for array in (kernel, bias))
    x_BhwC = jax.lax.conv_general_dilated(x_BhwC, kernel, (1, 1), 'SAME', dimension_numbers=axes)
    return nn.relu(x_BhwC + bias)
