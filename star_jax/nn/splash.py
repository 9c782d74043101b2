"""How is attention computed on a TPU?

JAX's "splash" kernels go over blocks of rows and keys: scores never leave the chip's fast memory,
and blocks that no row attends to are not computed. They take upper bounds as a function of row and
key, and what each image hides as segments: a row attends to the keys of its own segment.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from star_jax.core.cache import KV, join
from star_jax.core.visibility import ALL, StaticVisibility, Visibility
from star_jax.nn.kernels import Chunked
from star_jax.protocols import Kernel

BLOCKS = (512, 256, 128)  # block sizes of the kernels, the fastest first
FILLING = 1.125  # a larger block may cost this many times the least cost of padding
BEHIND = -1  # the segment of keys that an image hides at its end; no row has it


@dataclasses.dataclass(frozen=True)
class Splash:
    """Rows and keys are padded to whole blocks.

    Attributes:
        otherwise: the kernel for a mask.
        interpret: computes the same anywhere, slowly: for tests.
    """

    otherwise: Kernel = Chunked()
    interpret: bool = False

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        if visibility.mask is not None:
            return self.otherwise(q_BLNH, past, new, visibility)
        kv, visibility = join(past, new, visibility)
        rows, heads, bounds = *q_BLNH.shape[1:3], visibility.bounds
        if bounds is None:
            bounds = StaticVisibility(((rows, kv.rows),))
        if isinstance(bounds, StaticVisibility):
            # Keys that no row attends to would have undefined gradients.
            kv = kv.part(0, min(kv.rows, int(bounds.bound_L.max())))
            bound_L, pad = bounds.bound_L, np.pad
        else:  # masked too, but no block is skipped
            bound_L, pad = jnp.broadcast_to(bounds.bound_L, rows), jnp.pad
        blocks = _block(rows), _block(kv.rows)
        q_BNLH = _fill(q_BLNH.swapaxes(1, 2), blocks[0])
        kv_BKMH = KV(*(_fill(x, blocks[1]) for x in kv))
        bound_L = pad(bound_L, (0, -rows % blocks[0]), mode='edge')
        kernel = self._kernel(bound_L, heads, kv_BKMH.rows, _sizes(*blocks))
        segments = _segments(bound_L, kv.rows, kv_BKMH.rows, visibility)
        return jax.vmap(kernel)(q_BNLH, *kv_BKMH, segments).swapaxes(1, 2)[:, :rows]

    def _kernel(
        self, bound_L: np.ndarray | jax.Array, heads: int, keys: int, sizes: splash.BlockSizes
    ) -> Callable[..., jax.Array]:
        """[N, L, H] queries, [K, M, H] keys and values, segments -> [N, L, H]."""
        if isinstance(bound_L, np.ndarray):
            mask = splash.MultiHeadMask([VisibilityMask(bound_L, keys)] * heads)
            return splash.make_splash_mha_single_device(
                mask, block_sizes=sizes, interpret=self.interpret
            )
        info = MaskInfo(None, None, None, None, bound_L)
        return splash_attention_kernel.SplashAttentionKernel(
            info,
            info,
            info,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=attends,
            interpret=self.interpret,
        )


def _segments(
    bound_L: np.ndarray | jax.Array, keys: int, padded: int, visibility: Visibility
) -> splash.SegmentIds | None:
    """Segments of the rows and of the `padded` keys of each image; None where none are hidden.

    Visible keys and most rows are of segment 0. A hidden key before the first visible one has a
    segment of its own, shared by the row that attends to it alone.
    """
    first_B, end_B = visibility.first_B, visibility.end_B
    if first_B is None and end_B is None:
        return None
    batch = len(end_B if first_B is None else first_B)
    first_B1 = jnp.zeros((batch, 1), jnp.int32) if first_B is None else first_B[:, None]
    end_B1 = jnp.full((batch, 1), keys, jnp.int32) if end_B is None else end_B[:, None]
    upper_1L, number_1M = jnp.asarray(bound_L, jnp.int32)[None], jnp.arange(padded)[None]
    before_BM = jnp.where(number_1M < first_B1, number_1M + 1, 0)
    return splash.SegmentIds(
        q=jnp.where(upper_1L <= first_B1, upper_1L, 0),
        kv=jnp.where(number_1M < end_B1, before_BM, BEHIND),
    )


def attends(keys: jax.Array, key: jax.Array) -> jax.Array:
    """Whether rows of these upper bounds attend to the keys of these numbers."""
    return key < keys


class VisibilityMask(splash.Mask):
    """Upper bounds in the form that the kernels take.

    They give `q_sequence`, meant for the numbers of the rows, to `mask_function`.
    """

    mask_function = staticmethod(attends)

    def __init__(self, bound_L: np.ndarray, keys: int) -> None:
        self.q_sequence = bound_L.astype(np.int32)
        self.keys = keys

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), self.keys

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, keys = block
        return attends(self.q_sequence[rows, None], np.arange(self.keys)[None, keys])


def _block(count: int) -> int:
    """The largest block with which `count` takes little more than with the smallest."""
    filled = [-(-count // block) * block for block in BLOCKS]
    return next(b for b, n in zip(BLOCKS, filled, strict=True) if n <= FILLING * filled[-1])


def _fill(x_BNLH: jax.Array, block: int) -> jax.Array:
    """The array with L padded to whole blocks."""
    return jnp.pad(x_BNLH, ((0, 0), (0, 0), (0, -x_BNLH.shape[2] % block), (0, 0)))


def _sizes(block_q: int, block_kv: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
