"""Which kernel computes attention here?

The one dispatcher: the kernel that suits the platform and the shapes, or the one that a run names.
"""

import dataclasses
from typing import Literal

import jax

from star_jax.core.cache import KV
from star_jax.core.visibility import ALL, Visibility
from star_jax.errors import UserError
from star_jax.nn.flash import HALVES, Flash
from star_jax.nn.kernels import ByScale, Chunked, Dense, Tiled
from star_jax.protocols import Kernel

Name = Literal['automatic', 'dense', 'by_scale', 'chunked', 'flash', 'splash']
PLATFORMS = {'flash': 'gpu', 'splash': 'tpu'}  # the platform that a kernel is made for
CHUNKED = ByScale(Chunked(), Chunked())
TEACHER_FORCED = ByScale(Tiled())  # teacher-forced, on a CPU
# Sampling, on a CPU: a step of one image fits in smaller turns, which would slow a gradient.
CACHED = ByScale(Tiled(most=6 * 2**20))


@dataclasses.dataclass(frozen=True)
class Automatic:
    """The kernel that suits a platform and the shapes.

    Attributes:
        platform: cpu, gpu or tpu; empty: the platform of this process.
        most_scores: bytes of scores of one image up to which they may be kept.
        least_rows: rows from which on a platform's own kernel is worth its blocks.
    """

    platform: str = ''
    most_scores: int = 2**27
    least_rows: int = 128

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        return self.choose(q_BLNH, past, new)(q_BLNH, past, new, visibility)

    def choose(self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV) -> Kernel:
        """The kernel for such arrays.

        Few scores are computed at once, many in chunks; the kernels of GPUs and TPUs serve many
        rows and head widths that are multiples of 8 up to 128.

        Args:
            q_BLNH: queries.
            past: cached keys and values of earlier rows, in pieces.
            new: keys and values of the rows.
        """
        _, rows, heads, width = q_BLNH.shape
        keys = sum(kv.rows for kv in (*past, new))
        few = 4 * heads * rows * keys <= self.most_scores
        platform = self.platform or jax.default_backend()
        plain = CHUNKED
        if few:
            plain = ByScale()
            if platform == 'cpu':
                plain = CACHED if past else TEACHER_FORCED
        if rows < self.least_rows or width % 8 or width > 128:
            return plain
        if platform == 'gpu' and q_BLNH.dtype in HALVES:
            return Flash(plain)
        if platform == 'tpu':
            return _splash(plain)
        return plain


AUTOMATIC = Automatic()


def named(name: Name, platform: str) -> Kernel:
    """The kernel that a run names, on a platform: cpu, gpu or tpu.

    Raises UserError for a kernel of another platform.
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
