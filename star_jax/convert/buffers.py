"""Which tensors of a published file follow from the sizes alone?

They are not parameters: a file's must be what they would be made again as.
"""

from collections.abc import Callable, Mapping

import numpy as np

from star_jax.families.star import Star
from star_jax.families.var import Var

Buffers = Mapping[str, Callable[[], np.ndarray]]


def of_star(star: Star) -> Buffers:
    """Each attention's zero key bias."""
    kinds = ['attn'] + ['cross_attn'] * star.cross_attention
    names = [f'blocks.{layer}.{kind}' for layer in range(star.depth) for kind in kinds]
    if star.refinement:
        names += [f'feat_extract_blocks.{layer}.attn' for layer in range(star.refinement.blocks)]
    return _zero_biases(names, star.width)


def of_var(var: Var) -> Buffers:
    """Each attention's zero key bias, the scale of every position, and the attention mask."""

    def levels() -> np.ndarray:
        return var.schedule.step_of_row.astype(np.int64)[None]

    def mask() -> np.ndarray:
        return np.where(var.schedule.mask(), np.float32(0), np.float32(-np.inf))[None, None]

    biases = _zero_biases([f'blocks.{layer}.attn' for layer in range(var.depth)], var.width)
    return {'lvl_1L': levels, 'attn_bias_for_masking': mask, **biases}


def _zero_biases(attentions: list[str], width: int) -> Buffers:
    return {f'{name}.zero_k_bias': lambda: np.zeros(width, np.float32) for name in attentions}
