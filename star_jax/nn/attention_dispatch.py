"""Which kernel computes attention here?

The one door to all of them: what suits the platform and the shapes, or what a run asks for.
"""

import dataclasses
from typing import Literal

import jax

from star_jax.errors import UserError
from star_jax.nn.flash import HALVES, Flash
from star_jax.nn.kernels import KV, ByScale, Chunked, Dense, Kernel, Tiled, Visibility

Name = Literal['automatic', 'dense', 'by_scale', 'chunked', 'flash', 'splash']
PLATFORMS = {'flash': 'gpu', 'splash': 'tpu'}  # which kernels are made for one
CHUNKED = ByScale(Chunked(), Chunked())
CACHED = ByScale(Tiled())


@dataclasses.dataclass(frozen=True)
class Automatic:
    """The kernel that suits a platform (none: where this process computes) and the shapes."""

    platform: str = ''
    most_scores: int = 2**27  # of one image, in bytes, that the formula may keep
    least_rows: int = 128  # for which a platform's own kernel is worth its blocks

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        return self.choose(q_BLNH, kv, visibility)(q_BLNH, kv, visibility)

    def choose(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility) -> Kernel:
        """The kernel for such arrays."""
        _, rows, heads, width = q_BLNH.shape
        keys = kv.keys.shape[1]
        few = 4 * heads * rows * keys <= self.most_scores
        platform = self.platform or jax.default_backend()
        plain = CHUNKED
        if few:
            plain = CACHED if platform == 'cpu' else ByScale()
        if rows < self.least_rows or width % 8 or width > 128:
            return plain
        if platform == 'gpu' and q_BLNH.dtype in HALVES:
            return Flash(plain)
        if platform == 'tpu':
            return _splash(plain)
        return plain


AUTOMATIC = Automatic()


def named(name: Name, platform: str) -> Kernel:
    """The kernel that a run asks for, on a platform: cpu, gpu or tpu.

    Raises UserError where that has no such kernel.
    """
    needed = PLATFORMS.get(name, platform)
    if platform != needed:
        raise UserError(
            f'attention {name} is a kernel of {needed.upper()}s, and the devices here are '
            f'{platform.upper()}s: leave it automatic'
        )
    match name:
        case 'automatic':
            return Automatic(platform)
        case 'dense':
            return Dense()
        case 'by_scale':
            return ByScale()
        case 'chunked':
            return CHUNKED
        case 'flash':
            return Flash()
        case 'splash':
            return _splash(CHUNKED)


def _splash(otherwise: Kernel) -> Kernel:
    from star_jax.nn.splash import Splash  # its kernels take a second to import

    return Splash(otherwise)
