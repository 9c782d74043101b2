"""Which tensors of a published file follow from its sizes?

These buffers are not parameters. A file is refused if its buffers differ from the computed ones.
"""

from collections.abc import Callable, Mapping

import numpy as np

from star_jax.convert.infinity import block_name
from star_jax.families.infinity import Infinity
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.tokenizers.residual_bsq import BSQ

Buffers = Mapping[str, Callable[[], np.ndarray]]


def star_buffers(star: Star) -> Buffers:
    """The zero key bias of each attention."""
    kinds = ['attn'] + ['cross_attn'] * star.cross_attention
    names = [f'blocks.{layer}.{kind}' for layer in range(star.depth) for kind in kinds]
    if star.refinement:
        names += [f'feat_extract_blocks.{layer}.attn' for layer in range(star.refinement.blocks)]
    return _zero_biases(names, star.width)


def var_buffers(var: Var) -> Buffers:
    """The zero key bias of each attention, the scale of each position, and the attention mask."""

    def levels() -> np.ndarray:
        return var.schedule.step_of_row.astype(np.int64)[None]

    def mask() -> np.ndarray:
        return np.where(var.schedule.mask(), np.float32(0), np.float32(-np.inf))[None, None]

    biases = _zero_biases([f'blocks.{layer}.attn' for layer in range(var.depth)], var.width)
    return {'lvl_1L': levels, 'attn_bias_for_masking': mask, **biases}


def infinity_buffers(infinity: Infinity, chunks: int) -> Buffers:
    """The zero key bias of each attention, and the ones of RMSNorms without a scale."""
    blocks = [block_name(layer, infinity.depth, chunks) for layer in range(infinity.depth)]
    attentions = [f'{block}.{kind}' for block in blocks for kind in ('sa', 'ca')]
    biases = _zero_biases(['text_proj_for_sos.ca', *attentions], infinity.width)
    if not infinity.rms_norm:
        return biases
    norms = [*blocks, 'head_nm'] if infinity.modulated_head else blocks
    return biases | {
        f'{norm}.ln_wo_grad.weight': lambda: np.ones(infinity.width, np.float32) for norm in norms
    }


def bsq_buffers(bsq: BSQ) -> Buffers:
    """The value of each bit in an integer code, registered twice.

    The first of 64 bits has no positive value in int64 and overflows to -2^63, as published.
    """

    def mask() -> np.ndarray:
        return np.left_shift(np.int64(1), np.arange(bsq.bits - 1, -1, -1))

    return {f'{prefix}.lfq.mask': mask for prefix in ('quantizer', 'quantize')}


def _zero_biases(attentions: list[str], width: int) -> Buffers:
    return {f'{name}.zero_k_bias': lambda: np.zeros(width, np.float32) for name in attentions}
