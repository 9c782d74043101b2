"""How far apart do two images look to a network that was trained on photographs?

LPIPS: the distance of two images' VGG-16 features, each position of unit length, weighed by
learned heads (LlamaGen specification 1.6). Without the dropout of its own training.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.errors import UserError

STAGES = (2, 2, 3, 3, 3)  # convolutions of each stage; a 2 x 2 max-pool opens all but the first
LEAST_SIDE = 2 ** (len(STAGES) - 1)  # what the pools leave something of
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10  # beside the length of a feature vector


@flax.struct.dataclass
class Lpips:
    """The network and its weights. A pytree: pass it to a jitted program as an argument, so that
    59 MB of constants stay out of the program.

    `convs`: kernel [3, 3, in, out] and bias of each convolution. `heads_C`: one weight per channel
    of the last features of each stage.
    """

    convs: tuple[tuple[jax.Array, jax.Array], ...]
    heads_C: tuple[jax.Array, ...]

    def __call__(self, images: jax.Array, painted: jax.Array) -> jax.Array:
        """[B] distances of images [B, H, W, 3] in [-1, 1]; 0 for equal ones.

        Raises UserError for images of fewer than 16 px.
        """
        if min(images.shape[1:3]) < LEAST_SIDE:
            raise UserError(
                f'the perceptual loss needs images of at least {LEAST_SIDE} px, '
                f'not {images.shape[1]} x {images.shape[2]}: set its weight to 0'
            )
        distance_B = jnp.zeros(len(images))
        stages = zip(self.features(images), self.features(painted), self.heads_C, strict=True)
        for one, other, head_C in stages:
            distance_B += (jnp.square(direct(one) - direct(other)) @ head_C).mean((1, 2))
        return distance_B

    def features(self, x_BhwC: jax.Array) -> list[jax.Array]:
        """The features that end each stage, from fine to coarse."""
        x_BhwC = (x_BhwC - SHIFT) / SCALE
        convs, features = iter(self.convs), []
        for stage, count in enumerate(STAGES):
            if stage:
                x_BhwC = nn.max_pool(x_BhwC, (2, 2), (2, 2))
            for _ in range(count):
                x_BhwC = _convolve(x_BhwC, *next(convs))
            features.append(x_BhwC)
        return features


def direct(f_BhwC: jax.Array) -> jax.Array:
    """f / (length + 1e-10) over channels; zero, with zero gradient, where f is all zero."""
    square = jnp.square(f_BhwC).sum(-1, keepdims=True)
    # The root's gradient is infinite at zero, so it never sees one.
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, f_BhwC / (length + EPSILON), 0)


def _convolve(x_BhwC: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    axes = ('NHWC', 'HWIO', 'NHWC')
    x_BhwC = jax.lax.conv_general_dilated(x_BhwC, kernel, (1, 1), 'SAME', dimension_numbers=axes)
    return nn.relu(x_BhwC + bias)
