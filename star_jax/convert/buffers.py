"""Which tensors of a published file are not parameters?

Buffers follow from the sizes: a file is refused if its buffers differ from the computed ones. Idle
tensors have any values, because nothing reads them, but strict loaders demand them: a file that is
written of a model without them, such as one that was trained here, gets zeros.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from star_jax.convert.infinity import block_name
from star_jax.convert.star import HEAD_BLOCKS
from star_jax.families.infinity import Infinity
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ

Buffers = Mapping[str, Callable[[], np.ndarray]]

CLASS_ROWS = 1001  # classes of ImageNet and none: rows of STAR's unused embedding
RECENT_CODES = 65536  # codes that LlamaGen's tokenizer remembers in training


def star_buffers(star: Star) -> Buffers:
    """The zero key bias of each attention."""
    kinds = ['attn'] + ['cross_attn'] * star.cross_attention
    names = [f'blocks.{layer}.{kind}' for layer in range(star.depth) for kind in kinds]
    if star.refinement:
        names += [f'{HEAD_BLOCKS}.{layer}.attn' for layer in range(star.refinement.blocks)]
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


def star_idle(star: Star) -> Buffers:
    """The embedding of classes; the offsets of a head without levels (STAR specification 10)."""
    shapes = {'class_emb.weight': (CLASS_ROWS, star.width)}
    if star.refinement and star.shared_adaln:
        blocks = [f'{HEAD_BLOCKS}.{layer}' for layer in range(star.refinement.blocks)]
        shapes |= {f'{block}.ada_gss': (1, 1, 6, star.width) for block in blocks}
    return _zeros(shapes)


def vq_idle(vq: VQ) -> Buffers:
    """How often each scale used each code in training (STAR specification 10)."""
    return _zeros({'quantize.ema_vocab_hit_SV': (len(vq.grids), vq.codes)})


def raster_vq_idle() -> Buffers:
    """The last codes of training (LlamaGen specification 1.5 and 6.3)."""
    return _zeros({'quantize.codebook_used': (RECENT_CODES,)})


def _zero_biases(attentions: list[str], width: int) -> Buffers:
    return _zeros({f'{name}.zero_k_bias': (width,) for name in attentions})


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> Buffers:
    return {name: functools.partial(np.zeros, shape, np.float32) for name, shape in shapes.items()}
