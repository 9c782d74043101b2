"""How is attention computed on a TPU?

JAX's "splash" kernels go over blocks of rows and keys: scores never leave the chip's fast memory,
and blocks that no row sees are not computed. They know what is seen as a function, never as an
array of rows by keys.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from star_jax.core.visibility import StaticVisibility, TracedVisibility
from star_jax.nn.kernels import KV, Chunked, Kernel, Visibility

BLOCKS = (512, 256, 128)  # what the kernels take, the fastest first
FILLING = 1.125  # of the least that filling up costs, what a larger block may cost


@dataclasses.dataclass(frozen=True)
class Splash:
    """Rows and keys are filled up to whole blocks.

    A traced reach is masked too, but no block is skipped. What is no reach goes to `otherwise`.
    `interpret` computes the same anywhere, slowly: for tests.
    """

    otherwise: Kernel = Chunked()
    interpret: bool = False

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        rows, keys, heads = q_BLNH.shape[1], kv.keys.shape[1], q_BLNH.shape[2]
        if visibility is None:
            visibility = StaticVisibility(((rows, keys),))
        if not isinstance(visibility, StaticVisibility | TracedVisibility):
            return self.otherwise(q_BLNH, kv, visibility)
        if isinstance(
            visibility, StaticVisibility
        ):  # keys that no row sees would have undefined gradients
            keys = min(keys, int(visibility.keys_L.max()))
        blocks = _block(rows), _block(keys)
        q_BNLH = _fill(q_BLNH, blocks[0])
        kv_BNMH = KV(*(_fill(x[:, :keys], blocks[1]) for x in kv))
        pad = np.pad if isinstance(visibility, StaticVisibility) else jnp.pad
        keys_L = pad(visibility.keys_L, (0, -rows % blocks[0]), mode='edge')
        kernel = self._kernel(keys_L, heads, kv_BNMH.keys.shape[2], _sizes(*blocks))
        return jax.vmap(kernel)(q_BNLH, *kv_BNMH).swapaxes(1, 2)[:, :rows]

    def _kernel(
        self, keys_L: np.ndarray | jax.Array, heads: int, keys: int, sizes: splash.BlockSizes
    ) -> Callable[..., jax.Array]:
        """[N, L, H] queries, [N, M, H] keys and values -> [N, L, H]."""
        if isinstance(keys_L, np.ndarray):
            mask = splash.MultiHeadMask([VisibilityMask(keys_L, keys)] * heads)
            return splash.make_splash_mha_single_device(
                mask, block_sizes=sizes, interpret=self.interpret
            )
        info = MaskInfo(None, None, None, None, keys_L)
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
            mask_function=sees,
            interpret=self.interpret,
        )


def sees(keys: jax.Array, key: jax.Array) -> jax.Array:
    """Whether rows of this reach see the keys of these numbers."""
    return key < keys


class VisibilityMask(splash.Mask):
    """The leading keys of each row, as the kernels ask for them.

    They hand `q_sequence`, meant for the numbers of the rows, to `mask_function`.
    """

    mask_function = staticmethod(sees)

    def __init__(self, keys_L: np.ndarray, keys: int) -> None:
        self.q_sequence = keys_L.astype(np.int32)
        self.keys = keys

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), self.keys

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, keys = block
        return sees(self.q_sequence[rows, None], np.arange(self.keys)[None, keys])


def _block(count: int) -> int:
    """The largest block that takes little more than `count` filled up to the smallest."""
    filled = [-(-count // block) * block for block in BLOCKS]
    return next(b for b, n in zip(BLOCKS, filled, strict=True) if n <= FILLING * filled[-1])


def _fill(x_BLNH: jax.Array, block: int) -> jax.Array:
    """[B, N, L, H] with L filled up to whole blocks."""
    x_BLNH = jnp.pad(x_BLNH, ((0, 0), (0, -x_BLNH.shape[1] % block), (0, 0), (0, 0)))
    return x_BLNH.swapaxes(1, 2)


def _sizes(block_q: int, block_kv: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
