"""Which tensors does the published file of a model have?

One layout per family and tokenizer: the parameters, the buffers that follow from the sizes, the
endings of names that are ignored, and the idle tensors among these that a file must have. Some
names depend on the file they come from; then they follow from the names of that file, or from the
hint of its layout.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from star_jax.convert import buffers
from star_jax.convert.bsq import bsq_entries
from star_jax.convert.buffers import Buffers
from star_jax.convert.entries import Entry
from star_jax.convert.infinity import chunks_of, infinity_entries
from star_jax.convert.llamagen import BUFFERS, llamagen_entries
from star_jax.convert.raster_vq import IGNORED as RASTER_IGNORED
from star_jax.convert.raster_vq import raster_vq_entries
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.convert.var import var_entries
from star_jax.families.infinity import Infinity
from star_jax.families.llamagen import Llama, LlamaGen, LlamaGenText
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.protocols import Family, TokenizerConfig
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a published file.

    Attributes:
        entries: one per tensor that is a parameter.
        buffers: tensors that follow from the sizes, by name.
        ignored: endings of the names of unused tensors.
        idle: unused tensors without which the original code refuses a file, by name; these values
            are written where the folder keeps none.
        hint: the name of a tensor from which all names follow ('': they follow from the config).
        place: the keys of the dicts around the state dict in a file of torch that the original
            code opens to sample, the outermost first.
        trainer_place: the same for the original trainer; None: it has no file with the weights
            alone, or opens that for sampling.
    """

    entries: Sequence[Entry]
    buffers: Buffers = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    idle: Buffers = dataclasses.field(default_factory=dict)
    hint: str = ''
    place: tuple[str, ...] = ()
    trainer_place: tuple[str, ...] | None = None


def layout(config: Family | TokenizerConfig, names: Iterable[str] = ()) -> Layout:
    """The layout of a config.

    Args:
        config: the config of a transformer or a tokenizer.
        names: the tensor names of a file, or the hint of its layout; if empty, the names are those
            of the original code.
    """
    return LAYOUTS[type(config)](config, list(names))


def _star(config: Star, names: list[str]) -> Layout:
    idle = buffers.star_idle(config)
    return Layout(
        entries=star_entries(config),
        buffers=buffers.star_buffers(config),
        ignored=(*IGNORED, *idle),
        idle=idle,
        place=('trainer', 'var_wo_ddp'),
    )


def _var(config: Var, names: list[str]) -> Layout:
    return Layout(entries=var_entries(config), buffers=buffers.var_buffers(config))


def _infinity(config: Infinity, names: list[str]) -> Layout:
    chunks = chunks_of(config, names)
    entries = infinity_entries(config, chunks)
    last = next(entry.torch_name for entry in reversed(entries) if entry.row == config.depth - 1)
    return Layout(
        entries=entries,
        buffers=buffers.infinity_buffers(config, chunks),
        hint=last,
        trainer_place=('trainer', 'gpt_fsdp'),
    )


def _llamagen(config: Llama, names: list[str]) -> Layout:
    return Layout(entries=llamagen_entries(config), ignored=BUFFERS, place=('model',))


def _vq(config: VQ, names: list[str]) -> Layout:
    if len(names) == 1:  # a hint
        phis = range(config.phis)
        names = [re.sub(r'\.0\.weight$', f'.{phi}.weight', names[0]) for phi in phis]
    entries = vq_entries(config, names)
    kernels = (entry for entry in entries if entry.param_name == 'quantiser/phi_kernel')
    return Layout(
        entries=entries,
        ignored=IGNORED,
        idle=buffers.vq_idle(config),
        hint=next(kernels).torch_name,
    )


def _bsq(config: BSQ, names: list[str]) -> Layout:
    entries = bsq_entries(config, names)
    convolution = (entry for entry in entries if entry.param_name == 'encoder/conv_in/kernel')
    return Layout(
        entries=entries,
        buffers=buffers.bsq_buffers(config),
        hint=next(convolution).torch_name,
        place=('vae',),
        trainer_place=('vae',),
    )


def _raster_vq(config: RasterVQ, names: list[str]) -> Layout:
    return Layout(
        entries=raster_vq_entries(config),
        ignored=RASTER_IGNORED,
        idle=buffers.raster_vq_idle(),
        place=('model',),
    )


LAYOUTS: Mapping[type, Callable[[Any, list[str]], Layout]] = {
    Star: _star,
    Var: _var,
    Infinity: _infinity,
    LlamaGen: _llamagen,
    LlamaGenText: _llamagen,
    VQ: _vq,
    BSQ: _bsq,
    RasterVQ: _raster_vq,
}
